"""Run somebody's training_step around a network whose answer is already known, or not wanted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_cnn.errors import UnsupportedLayerError


class Reached(Exception):  # noqa: N818  a way out, not a failure
    """The step has called the network: it stops here."""

    picture: Tensor


class Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], anchor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> Any:
        found = [g if g is None else g * scale[0].to(g.dtype) for g in ctx.gradients]
        return None, None, torch.zeros_like(scale[0]), *found


def loss_of(output: Any) -> Tensor:
    """The loss in what a training_step returned."""
    return output if isinstance(output, Tensor) else output["loss"]


def network_of(model: LightningModule) -> nn.Module:
    """The outermost part of the model that holds all its weights and is not the LightningModule itself."""
    weighty = [(name, child) for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if len(weighty) != 1 or next(model.parameters(recurse=False), None) is not None:
        names = ", ".join(name for name, _ in weighty) or "none"
        raise UnsupportedLayerError(
            f"{type(model).__name__} must hold all its weights in one child (it has {names}), the network that its steps call once; put "
            "them into one nn.Module, such as nn.Sequential"
        )
    return weighty[0][1]


@contextmanager
def quiet(module: LightningModule) -> Iterator[None]:
    """A step inside logs nothing and counts nothing."""
    silent: dict[nn.Module, tuple[str, ...]] = {m: ("forward", "update") for m in module.modules() if isinstance(m, Metric)}
    silent[module] = ("log", "log_dict")
    before = {(m, name): m.__dict__.get(name) for m, names in silent.items() for name in names}
    for m, name in before:
        m.__dict__[name] = _nothing
    try:
        yield
    finally:
        for (m, name), value in before.items():
            m.__dict__.pop(name)
            if value is not None:
                m.__dict__[name] = value


def _nothing(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(())


def bare(network: nn.Module) -> nn.Module:
    """The network without our forward, over the same layers, to be traced."""
    twin = network.__class__.__new__(network.__class__)
    twin.__dict__ = {key: value for key, value in network.__dict__.items() if key != "forward"}
    return twin
