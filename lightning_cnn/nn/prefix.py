"""The frozen prefix of a network: where it ends, whether it is a fixed function, and how to answer in its place."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_cnn.errors import UnsupportedLayerError, raise_all
from lightning_cnn.nn.stages import Unit


def frozen_prefix(chain: list[Unit]) -> list[Unit]:
    """The longest run of units (of `stages.units`), from the picture on, that is frozen and gives the same answer every time.

    Layers without weights behind the last frozen weights belong to it while they are fixed (global pooling does, dropout
    does not), so that what leaves it is small. Refuses with the reasons when a frozen part is not a fixed function, or nothing is.
    """
    frozen = chain[: next((i for i, unit in enumerate(chain) if any(w.requires_grad for w in unit.weights)), len(chain) - 1)]
    last = max((i for i, unit in enumerate(frozen) if unit.weights), default=-1)
    if last < 0:
        raise UnsupportedLayerError(
            f"the first layer, '{next(unit.name for unit in chain if unit.weights)}', is trainable, so there is no frozen prefix: "
            "freeze it (callbacks.GradualUnfreezing(up_to=1)), listed before this."
        )
    raise_all((reason for unit in frozen[: last + 1] for reason in unsteady(unit.name, unit.module)), UnsupportedLayerError)
    end = next((i for i in range(last + 1, len(frozen)) if list(unsteady(frozen[i].name, frozen[i].module))), len(frozen))
    return frozen[:end]


def unsteady(name: str, module: nn.Module) -> Iterator[str]:
    """Why the answers of `module` change from call to call, layer by layer; nothing when they do not."""
    for inner, layer in module.named_modules(prefix=name):
        kind = type(layer).__name__
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            yield (
                f"'{inner}' ({kind}) is frozen but in training mode, so it normalises by the batch and its statistics "
                "move: use GradualUnfreezing or FrozenBatchNorm, listed before this"
            )
        elif layer.training and _drops(layer):
            yield (
                f"'{inner}' ({kind}) is in training mode, so the prefix is random: use GradualUnfreezing, which puts "
                "frozen stages into evaluation mode"
            )


def _drops(layer: nn.Module) -> bool:
    kind = type(layer).__name__.lower()
    return (isinstance(layer, _DropoutNd) or "drop" in kind or "stochasticdepth" in kind) and any(
        getattr(layer, rate, 0) for rate in ("p", "drop_prob")
    )


class PrefixSwitch:
    """Stands in front of the units of a prefix: records what leaves it, or answers with `features` and computes nothing."""

    def __init__(self, prefix: list[Unit]) -> None:
        self.features: Tensor | None = None
        self.record: Callable[[Tensor], None] | None = None
        self._own = [(unit.module, vars(unit.module).get("forward")) for unit in prefix]
        *passing, cut = [unit.module for unit in prefix]
        for module in passing:
            vars(module)["forward"] = self._passing(module.forward)
        vars(cut)["forward"] = self._cut(cut.forward)

    def remove(self) -> None:
        for module, own in self._own:
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own
        self._own = []

    def _passing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if self.features is None else args[0]

        return answer

    def _cut(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            if self.features is not None:
                return self.features
            output = forward(*args, **kwargs)
            if self.record is not None:
                self.record(output)
            return output

        return answer
