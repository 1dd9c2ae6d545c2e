"""Learning-rate schedules by the job's clock: with stolen batches the ranks take different numbers of steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from lightning_cnn.strategy._stealing import StealingSampler


class GlobalClock:
    """Replaces a module's `lr_scheduler_step`: a per-step scheduler steps as often as the average rank has, on every rank alike."""

    def __init__(self, module: LightningModule, sampler: StealingSampler) -> None:
        self.module, self.sampler = module, sampler

    def __call__(self, scheduler: Any, metric: Any) -> None:
        for _ in range(self._due(scheduler)):
            type(self.module).lr_scheduler_step(self.module, scheduler, metric)

    def __deepcopy__(self, memo: object) -> "GlobalClock":
        return self  # a copy of the module (weight averaging) is never trained

    def _due(self, scheduler: Any) -> int:
        trainer = self.module.trainer
        config = next(config for config in trainer.lr_scheduler_configs if config.scheduler is scheduler)
        if config.interval != "step" or config.reduce_on_plateau or not hasattr(scheduler, "last_epoch"):
            return 1
        steps = (self.sampler.progress + 1) // (self.sampler.team.size * trainer.accumulate_grad_batches * config.frequency)
        return max(0, steps - scheduler.last_epoch)


@contextmanager
def fair_share(module: LightningModule, sampler: StealingSampler) -> Iterator[None]:
    """Inside, `trainer.estimated_stepping_batches` is what an average rank will do; the loader itself has no length."""
    loop = module.trainer.fit_loop
    unknown, loop.max_batches = loop.max_batches, -(-sampler.total // sampler.team.size)
    try:
        yield
    finally:
        loop.max_batches = unknown


Step = TypeVar("Step", bound=Callable[..., Any])


def known_to_schedulers(step: Step) -> Step:
    """torch's schedulers warn when `optimizer.step` is not the one that they wrapped; this one calls it, or counts as it."""
    vars(step)["_wrapped_by_lr_sched"] = True
    return step
