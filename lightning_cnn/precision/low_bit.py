"""Train with weights and activations of k bits: 1 is the sign, 2 is ternary, 3 to 8 learn their step (LSQ)."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cnn.errors import NoEffectWarning, UnsupportedLayerError, raise_all
from lightning_cnn.nn.low_bit import STEPS, BitWidths, candidates, drop_relus, lower
from lightning_cnn.precision import _left_out, _shard

log = logging.getLogger(__name__)


class LowBit(Precision):
    """`Trainer(plugins=[LowBit(weights=2, activations=2)])`: forward with few bits, gradients and optimizer in float.

    weights, activations: bits, 1 to 8, or None for float.
    scale: multiply each output channel by the mean |w| of its filter (1 and 2 bits).
    ste: slope of the straight-through estimator, "clip" (1 where |x| <= 1) or "approx" (2 - 2|x|, Bi-Real).
    keep: which ends stay float, of the layers in order of registration; skip: further layers by name.
    relu: "drop" turns nn.ReLU modules into identities when activations have 1 or 2 bits, as their signs would all be +1.
    signed: whether inputs of 3 bits and more have a sign; False after a ReLU buys one bit.
    """

    def __init__(
        self,
        *,
        weights: int | None = 1,
        activations: int | None = 1,
        scale: bool = True,
        ste: Literal["clip", "approx"] = "clip",
        keep: Iterable[Literal["first", "last"]] = ("first", "last"),
        skip: Iterable[str] = (),
        relu: Literal["drop", "keep"] = "drop",
        signed: bool = True,
    ) -> None:
        super().__init__()
        self.keep, self.skip, self.relu = tuple(keep), tuple(skip), relu
        raise_all(_problems(weights, activations, ste, self.keep, relu))
        self.bits = BitWidths(weights, activations, scale, ste, signed)
        self._lowered: dict[str, nn.Module] = {}
        self._optimizers: list[Optimizer] = []
        self._moments: dict[str, dict[str, Any]] = {}  # of the learned steps, between a checkpoint and the optimizer it goes to

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Lower the layers in place; checkpoints keep their keys. Called again for validation it finds nothing left to do."""
        raise_all(_shard.problems(module, self._name))
        found = candidates(module)
        unknown = [name for name in self.skip if name not in found]
        raise_all(
            [f"skip names '{name}', which is no Conv2d or Linear of the model; it has {', '.join(found)}." for name in unknown],
            UnsupportedLayerError,
        )
        names = [name for name in list(found)[("first" in self.keep) : len(found) - ("last" in self.keep)] if name not in self.skip]
        self._lowered = {name: found[name] for name in names}
        for layer in self._lowered.values():
            lower(layer, self.bits)
        few = self.bits.activations is not None and self.bits.activations <= 2
        dropped = drop_relus(module.modules()) if few and names and self.relu == "drop" else 0
        if names:
            log.info("%s: %s of %d layers compute with %s; %d ReLUs dropped", self._name, len(names), len(found), self.bits, dropped)
        else:
            warnings.warn(
                f"{self._name} lowered no layer: the model has {len(found)}, keep={self.keep}.", NoEffectWarning, stacklevel=2
            )
        return module

    def optimizer_step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step, then clamp the latent weights to +-1, where the straight-through estimator still hears them."""
        result = super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        self.clamp_latent_weights()
        return result

    @torch.no_grad()
    def clamp_latent_weights(self) -> None:
        if self.bits.weights is not None and self.bits.weights <= 2:
            for layer in self._lowered.values():
                layer.weight.clamp_(-1, 1)  # pyright: ignore[reportCallIssue]

    def connect(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        self._optimizers = list(optimizers)
        for optimizer in optimizers:
            _left_out.leave_out(optimizer, {step: name for name, step in self._steps()}, self._moments)
        return model, optimizers, lr_schedulers

    def state_dict(self) -> dict[str, Any]:
        """The learned steps and their moments, which the checkpoint of model and optimizer leaves out: it stays that of a plain run."""
        steps = {name: step.detach().clone() for name, step in self._steps()}
        moments = {
            name: optimizer.state[step] for optimizer in self._optimizers for name, step in self._steps() if step in optimizer.state
        }
        return {"steps": steps, "moments": moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moments.update(state_dict["moments"])
        with torch.no_grad():
            for name, step in self._steps():
                step.copy_(state_dict["steps"][name])

    def _steps(self) -> Iterator[tuple[str, Tensor]]:
        for name, layer in self._lowered.items():
            yield from ((f"{name}.{step}", getattr(layer, step)) for step in STEPS if hasattr(layer, step))

    @property
    def _name(self) -> str:
        return type(self).__name__


def _problems(weights: int | None, activations: int | None, ste: str, keep: tuple[str, ...], relu: str) -> Iterator[str]:
    for name, bits in (("weights", weights), ("activations", activations)):
        if bits is not None and not 1 <= bits <= 8:
            yield f"{name} must have 1 to 8 bits, or None for float; got {bits}."
    if weights is None and activations is None:
        yield "weights and activations are both None: leave the plugin out instead."
    if ste not in ("clip", "approx"):
        yield f"ste is 'clip' or 'approx', got {ste!r}."
    if wrong := [end for end in keep if end not in ("first", "last")]:
        yield f"keep takes 'first' and 'last', got {wrong}; name other layers in skip."
    if relu not in ("drop", "keep"):
        yield f"relu is 'drop' or 'keep', got {relu!r}."
