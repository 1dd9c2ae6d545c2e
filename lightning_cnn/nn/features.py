"""Features of a trained network: what its stages say about a set of pictures (DeCAF).

Source: Donahue et al. 2014, "DeCAF", arXiv:1310.1531; Razavian et al. 2014, arXiv:1403.6382.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cnn.errors import ConfigurationError, DataError, UnsupportedLayerError
from lightning_cnn.nn.stages import evaluating, stages


class _EnoughError(Exception):
    """The last layer asked for has run."""


@torch.no_grad()
def features(
    model: nn.Module,
    layers: Sequence[str] | None,
    loader: Iterable[Any],
    *,
    pool: str = "mean+max",
    forward: Callable[[Any], Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """What each of `layers` (module names; None: the end of every stage below the head) says about the pictures, and their labels.

    The model runs in evaluation mode, and only up to the last layer asked for. `pool` turns maps into vectors: "mean", "max",
    "mean+max" (both, twice as long), or "none". `forward` maps a batch to the model's call where it is not `model(image)`.
    """
    if pool not in ("mean", "max", "mean+max", "none"):
        raise ConfigurationError(f"pool must be mean, max, mean+max or none, got {pool!r}.")
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    run = forward or (lambda batch: model(image_of(batch).to(device)))
    wanted = _layers(model, layers)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    now: dict[str, Tensor] = {}
    handles = [module.register_forward_hook(_keep(name, now, pool, len(wanted))) for name, module in wanted.items()]
    labels = []
    try:
        with evaluating(model):
            for batch in loader:
                now.clear()
                _run(run, batch, wanted, now)
                for name, value in now.items():
                    found[name].append(value.cpu())
                labels.append(label_of(batch).cpu())
    finally:
        for handle in handles:
            handle.remove()
    if not labels:
        raise DataError("the loader gave no batch to read features from.")
    return {name: torch.cat(values) for name, values in found.items()}, torch.cat(labels)


def pooled(maps: Tensor, pool: str = "mean+max") -> Tensor:
    """(b c h w) -> (b c) or (b 2c); what is no map is only flattened."""
    if maps.dim() != 4 or pool == "none":
        return maps.flatten(1) if pool != "none" else maps
    mean, peak = maps.mean((2, 3)), maps.amax((2, 3))
    return {"mean": mean, "max": peak}.get(pool, torch.cat([mean, peak], 1))


def image_of(batch: Any) -> Tensor:
    """The picture tensor of a batch: `.image`, the key "image", or the first tensor with four axes."""
    if isinstance(getattr(batch, "image", None), Tensor):
        return batch.image
    values = list(batch.values()) if isinstance(batch, dict) else [batch] if isinstance(batch, Tensor) else list(batch)
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim() == 4]
    if not tensors:
        raise DataError(f"a batch of type {type(batch).__name__} holds no picture tensor (b, c, h, w).")
    return tensors[0]


def label_of(batch: Any) -> Tensor:
    """The label tensor of a batch: `.label`, the key "label", or the second entry."""
    if isinstance(getattr(batch, "label", None), Tensor):
        return batch.label
    label = batch.get("label") if isinstance(batch, dict) else batch[1] if not isinstance(batch, Tensor) and len(batch) > 1 else None
    if not isinstance(label, Tensor):
        raise DataError(f"a batch of type {type(batch).__name__} holds no labels: give pairs (image, label).")
    return label


def _layers(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    if layers is None:
        return {stage.name: stage.modules[-1] for stage in stages(model)[:-1]}
    known = dict(model.named_modules())
    missing = [name for name in layers if name not in known]
    if missing:
        raise UnsupportedLayerError(f"there is no module {', '.join(map(repr, missing))}; there are {', '.join(list(known)[1:9])}, ...")
    return {name: known[name] for name in layers}


def _keep(name: str, now: dict[str, Tensor], pool: str, count: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        now[name] = pooled(output.detach().float(), pool)
        if len(now) == count:
            raise _EnoughError

    return hook


def _run(run: Callable[[Any], Any], batch: Any, wanted: dict[str, nn.Module], now: dict[str, Tensor]) -> None:
    try:
        run(batch)
    except _EnoughError:
        return
    missing = sorted(set(wanted) - set(now))
    if missing:
        raise UnsupportedLayerError(f"{', '.join(missing)} did not run in a forward pass, so there are no features to read.")
