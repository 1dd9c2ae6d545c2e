"""A head for finetuning: a linear classifier on standardised features, which can start as a fitted probe.

A new head on raw features learns slowly and spoils the layers below it while it does (SqueezeNet's pooled features reach 1,000). On
standardised features one learning rate suits all of them; and a head that starts as a fitted classifier has small gradients from
the first step on, so finetuning begins where the probe ended.

Source: Kumar et al. 2022, "Fine-tuning can distort pretrained features and underperform out-of-distribution", arXiv:2202.10054
(linear probing, then finetuning). Departs: the probe is a regularised logistic regression.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.nn.features import image_of, label_of, pooled
from lightning_cnn.nn.probe import LinearForm, linear_form
from lightning_cnn.nn.stages import Unit, evaluating, units


class MeanMaxPool(nn.Module):
    """(b c h w) -> (b 2c): the mean and the maximum of each map."""

    def forward(self, maps: Tensor) -> Tensor:
        return pooled(maps)


class Standardise(nn.Module):
    """Subtract `mean` and divide by `std`: constants, which `start_head` fills in."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def transfer_head(network: nn.Module, classes: int) -> None:
    """Exchange the last layer of `network` for standardisation and a linear classifier, in place.

    Where a global average pooling, or nothing, stands between the last maps and the head, maps are pooled to mean and maximum.
    """
    chain = units(network)
    place = max(i for i, unit in enumerate(chain) if unit.weights)
    head, before = chain[place], chain[:place]
    if isinstance(head.module, nn.Conv2d):
        width, layers = 2 * head.module.in_channels, [MeanMaxPool()]
        for unit in chain[place + 1 :]:
            network.set_submodule(unit.name, nn.Identity())
    elif isinstance(head.module, nn.Linear):
        width, layers = head.module.in_features, []
        if (pool := _global_pool(before)) is not None:
            network.set_submodule(pool.name, MeanMaxPool())
            width = 2 * width
    else:
        raise UnsupportedLayerError(
            f"the head '{head.name}' is a {type(head.module).__name__}; a transfer head replaces Linear or Conv2d."
        )
    linear = nn.Linear(width, classes)
    nn.init.zeros_(linear.weight)  # all classes equally likely, until a probe or training says more
    nn.init.zeros_(linear.bias)
    network.set_submodule(head.name, nn.Sequential(*layers, Standardise(width), linear))


@torch.no_grad()
def head_probe(model: nn.Module, loader: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> LinearForm:
    """A linear classifier fitted to what the last linear layer of `model` sees of all pictures of `loader`.

    `forward` maps a batch to the model's call where it is not `model(image)`.
    """
    standardise, linear = _last_layers(model)
    run = forward or (lambda batch: model(image_of(batch)))
    probe = linear_form(*_seen_by(standardise or linear, model, loader, run))
    if probe.classes != tuple(range(linear.out_features)):
        raise UnsupportedLayerError(
            f"the pictures are of the classes {probe.classes}, and the last layer tells {linear.out_features} apart."
        )
    return probe


@torch.no_grad()
def start_head(model: nn.Module, probe: LinearForm) -> None:
    """Let the last linear layer of `model` answer as `probe`, in place.

    `Standardise` right before it takes the mean and deviation; without one they are folded into the weights.
    """
    standardise, linear = _last_layers(model)
    weight, bias = probe.weight, probe.bias
    if standardise is not None:
        standardise.mean.copy_(probe.mean)
        standardise.std.copy_(probe.std)
    else:
        weight = weight / probe.std
        bias = bias - weight @ probe.mean
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)


def _last_layers(model: nn.Module) -> tuple[Standardise | None, nn.Linear]:
    chain = [unit for unit in units(model) if unit.weights or isinstance(unit.module, Standardise)]
    linear, before = chain[-1].module, chain[-2].module if len(chain) > 1 else None
    if not isinstance(linear, nn.Linear):
        raise UnsupportedLayerError(
            f"the last layer '{chain[-1].name}' is a {type(linear).__name__}, and only a Linear can start as a probe: exchange the head "
            "(nn.transfer_head(network, classes), or Classifier(head='transfer'))."
        )
    return (before if isinstance(before, Standardise) else None), linear


def _global_pool(before: list[Unit]) -> Unit | None:
    """The global average pooling right before the head, dropout and flattening aside."""
    passing = (nn.Dropout, nn.Flatten, nn.Identity)
    last = next((unit for unit in reversed(before) if not isinstance(unit.module, passing)), None)
    return (
        last if last is not None and isinstance(last.module, nn.AdaptiveAvgPool2d) and last.module.output_size in (1, (1, 1)) else None
    )


def _seen_by(layer: nn.Module, model: nn.Module, loader: Iterable[Any], forward: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    labels: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].float().cpu()))
    try:
        with evaluating(model):
            for batch in loader:
                forward(batch)
                labels.append(label_of(batch).cpu())
    finally:
        handle.remove()
    return torch.cat(seen), torch.cat(labels)
