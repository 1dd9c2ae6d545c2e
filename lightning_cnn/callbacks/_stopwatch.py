"""Where the time of a training step goes: an exclusive account of every action that Lightning tells its profiler about.

Each moment belongs to the innermost action that is running, so the stages add up to the wall clock and nothing is counted twice.
The Trainer's own profiler goes on working: its three methods are wrapped, and given back by `detach`.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.profilers import PassThroughProfiler

from lightning_cnn.callbacks._cpu_clock import OwnClock
from lightning_cnn.callbacks._device_clock import DeviceClock
from lightning_cnn.functional.bottleneck import STAGES

BY_SUFFIX = {
    "train_dataloader_next": "data", "transfer_batch_to_device": "copy", "batch_to_device": "augment",
    "on_before_batch_transfer": "augment", "on_after_batch_transfer": "augment", "training_step": "forward", "backward": "backward",
    "optimizer_step": "optimizer", "optimizer_zero_grad": "optimizer", "configure_gradient_clipping": "optimizer",
    "lr_scheduler_step": "optimizer", "log_metrics": "logging", "save": "logging",
}  # fmt: skip
FETCH = ".train_dataloader_next"


def stage_of(action: str, inside: str) -> str:
    """The stage of an action as Lightning names it; one that nobody knows belongs to the stage it runs in."""
    known = BY_SUFFIX.get(action.rpartition(".")[2])
    if known:
        return known
    return "callbacks" if action.startswith(("[Callback]", "[LightningModule]", "[LightningDataModule]")) else inside


class Span:
    """One action; a context that may be entered again and again, also inside itself."""

    __slots__ = ("action", "seconds", "stage", "total", "watch")

    def __init__(self, watch: "Stopwatch", action: str, stage: str) -> None:
        self.watch, self.action, self.stage, self.seconds, self.total = watch, action, stage, 0.0, 0.0

    def __enter__(self) -> None:
        watch = self.watch
        now = time.perf_counter()
        running = watch.running[-1]
        running.seconds += now - watch.last
        watch.last = now
        watch.running.append(self)
        if watch.device is not None:
            watch.device.mark(self.stage)
        if watch.trace is not None:
            watch.trace.append(("B", self.action, now))

    def __exit__(self, *error: object) -> None:
        watch = self.watch
        now = time.perf_counter()
        self.seconds += now - watch.last
        watch.last = now
        watch.running.pop()
        if watch.device is not None:
            watch.device.mark(watch.running[-1].stage)
        if watch.trace is not None:
            watch.trace.append(("E", self.action, now))


class Stopwatch:
    """`on_step` is called between two steps with the seconds of each of `STAGES`."""

    def __init__(self, on_step: Callable[[list[float]], None], device: DeviceClock | None = None) -> None:
        self.on_step, self.device = on_step, device
        self.spans: dict[str, Span] = {}
        self.running = [Span(self, "", "other")]
        self.last = time.perf_counter()
        self.cpu = OwnClock()
        self.cpu_s = 0.0  # in which this process worked while its loop waited for data
        self.trace: list[tuple[str, str, float]] | None = None
        self._kept = [0.0] * len(STAGES)
        self._cpu_from = 0.0
        self._totals: dict[Span, float] = {}
        self._undo = ExitStack()

    def attach(self, trainer: Trainer) -> None:
        profiler: Any = vars(trainer)["profiler"]
        start, stop = profiler.start, profiler.stop
        self._replace(profiler, "start", lambda action: (start(action), self._start(action)))
        self._replace(profiler, "stop", lambda action: (self._stop(action), stop(action)))
        if type(profiler) is PassThroughProfiler:  # any other one's `profile` ends in the two above
            self._replace(profiler, "profile", self.span)
        connector = trainer._logger_connector
        self._replace(connector, "log_metrics", self.timed("[Logger].log_metrics", connector.log_metrics))
        for logger in trainer.loggers:
            self._replace(logger, "save", self.timed("[Logger].save", logger.save))
        self.last = time.perf_counter()

    def detach(self) -> None:
        self._undo.close()
        self.cpu.close()

    def span(self, action: str) -> Span:
        found = self.spans.get(action)
        if found is None:
            found = self.spans[action] = Span(self, action, stage_of(action, self.running[-1].stage))
        return found

    def timed(self, action: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.span(action):
                return function(*args, **kwargs)

        return call

    def drain(self) -> list[float]:
        """The seconds of each stage since the last call, running actions included."""
        now = time.perf_counter()
        self.running[-1].seconds += now - self.last
        self.last = now
        row = dict.fromkeys(STAGES, 0.0)
        for span in (self.running[0], *self.spans.values()):
            row[span.stage] += span.seconds
            span.total += span.seconds
            span.seconds = 0.0
        return list(row.values())

    def end_step(self) -> None:
        row = [a + b for a, b in zip(self._kept, self.drain(), strict=True)]
        self._kept = [0.0] * len(STAGES)
        self.on_step(row)

    def forget(self) -> None:
        """Begin anew, after steps that are not like the others."""
        self.drain()
        self.cpu_s = 0.0
        for span in self.spans.values():
            span.total = 0.0

    def pause(self) -> None:
        """What follows, until `resume`, is not training."""
        self._kept = [a + b for a, b in zip(self._kept, self.drain(), strict=True)]
        self._totals = {span: span.total for span in self.spans.values()}

    def resume(self) -> None:
        self.drain()
        for span in self.spans.values():
            span.total = self._totals.get(span, 0.0)

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        before = vars(owner).get(name)
        setattr(owner, name, method)
        if before is not None:
            self._undo.callback(setattr, owner, name, before)  # runs after the next one
        self._undo.callback(vars(owner).pop, name, None)

    def _start(self, action: str) -> None:
        if action.endswith(FETCH):
            self.end_step()
            if self.device is not None:
                self.device.step()
            self._cpu_from = self.cpu.seconds()
        self.span(action).__enter__()

    def _stop(self, action: str) -> None:
        if self.running[-1].action != action:  # it was started before the stopwatch was
            return
        self.running[-1].__exit__()
        if action.endswith(FETCH):
            self.cpu_s += self.cpu.seconds() - self._cpu_from
