"""Each stage learns at its own rate: the new head fast, the pretrained stages 10 and 100 times slower.

Every parameter group exists before the first scheduler does, and the schedule stays the one that was written: a group's `lr` is the
scheduled rate, and its `lr_factor` multiplies it for the duration of a step. So any scheduler works, also the ones that are given one
number for all groups (`OneCycleLR(max_lr=0.1)`) or one function a group (`LambdaLR`).

Source: CS231n 2016, lecture 11 (1/10 for the top, 1/100 for intermediate layers); Howard & Ruder 2018, arXiv:1801.06146, section 3.2
(a factor of 2.6 a layer: decay=0.385).
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_cnn.callbacks._sharded import sharded_problems
from lightning_cnn.errors import ConfigurationError, NoEffectWarning, raise_all
from lightning_cnn.nn.stages import Stage, stages

log = logging.getLogger(__name__)


class DiscriminativeLR(Callback):
    """Learning-rate factors by stage.

    `factors` from the head downwards, the last one for all stages below; or `decay`, a factor a stage. `patterns` name the stages as
    in `stages`. A factor of 0 holds a stage still, but costs its backward pass: `GradualUnfreezing` does not.
    """

    def __init__(
        self, *, factors: Sequence[float] = (1.0, 0.1, 0.01), decay: float | None = None, patterns: Sequence[str] | None = None
    ) -> None:
        problems = [f"factors must be at least 0, got {factor}" for factor in factors if factor < 0]
        problems += ["factors must not be empty"] if not factors else []
        problems += [f"decay must be in (0, 1], got {decay}"] if decay is not None and not 0 < decay <= 1 else []
        raise_all(problems)
        self.factors, self.decay, self.patterns = tuple(factors), decay, patterns
        self._undo: list[Callable[[], Any]] = []
        self._scheduled: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        raise_all(sharded_problems(trainer, "DiscriminativeLR"))
        configure = pl_module.configure_optimizers

        @functools.wraps(configure)
        def configure_by_stage() -> Any:
            with _split_by_stage(self._stages(pl_module)):
                return configure()

        pl_module.__dict__["configure_optimizers"] = configure_by_stage
        self._undo.append(lambda: pl_module.__dict__.pop("configure_optimizers", None))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if not any("lr_factor" in group for group in groups):
            raise ConfigurationError(
                "DiscriminativeLR saw no optimizer being built in configure_optimizers: build it there, not earlier, so "
                "that all groups exist before a scheduler does."
            )
        if all(group.get("lr_factor", 1.0) == 1.0 for group in groups):
            warnings.warn("DiscriminativeLR: every factor is 1, so nothing changed.", NoEffectWarning, stacklevel=2)
        for optimizer in trainer.optimizers:
            self._undo.append(optimizer.register_step_pre_hook(self._scale).remove)
            self._undo.append(optimizer.register_step_post_hook(self._unscale).remove)
        log.info("learning-rate factors: %s", ", ".join(f"{group['name']} x{group['lr_factor']:g}" for group in groups))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(trainer)

    def _stages(self, pl_module: nn.Module) -> list[tuple[Stage, float]]:
        found = stages(pl_module, self.patterns)
        return [(stage, self._factor(depth)) for depth, stage in enumerate(reversed(found))]

    def _factor(self, depth: int) -> float:
        return self.decay**depth if self.decay is not None else self.factors[min(depth, len(self.factors) - 1)]

    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            self._scheduled[id(group)] = group["lr"]
            group["lr"] = group["lr"] * group.get("lr_factor", 1.0)

    def _unscale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self._scheduled.pop(id(group), group["lr"])

    def _restore(self, trainer: Trainer) -> None:
        # A step that raised has not been unscaled.
        for optimizer in trainer.optimizers:
            self._unscale(optimizer, (), {})
        while self._undo:
            self._undo.pop()()


@contextmanager
def _split_by_stage(factors: list[tuple[Stage, float]]) -> Iterator[None]:
    """Inside, every group that any optimizer is given becomes one group a stage, with its own settings kept."""
    owner = {id(parameter): (i, stage, factor) for i, (stage, factor) in enumerate(factors) for parameter in stage.parameters()}
    add = Optimizer.add_param_group

    def add_by_stage(self: Optimizer, param_group: dict[str, Any]) -> None:
        given = param_group["params"]
        members = list(given) if not isinstance(given, nn.Parameter) else [given]
        places: dict[tuple[int, str, float], list] = {}
        for member in members:
            place = owner.get(id(member[1] if isinstance(member, tuple) else member))
            key = (place[0], place[1].name, place[2]) if place else (len(factors), "other", 1.0)
            places.setdefault(key, []).append(member)
        for (_, stage, factor), params in sorted(places.items()):
            taken = {existing.get("name") for existing in self.param_groups}
            base = f"{param_group['name']}/{stage}" if "name" in param_group else stage
            name = base if base not in taken else f"{base}/{len(self.param_groups)}"
            add(self, {**param_group, "params": params, "name": name, "lr_factor": factor})

    Optimizer.add_param_group = add_by_stage
    try:
        yield
    finally:
        Optimizer.add_param_group = add
