"""The GPU's own account of a step, from events that are read when they have long passed: nothing waits for it."""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any


class DeviceClock:
    """Mark the stages of one step in `every`; `seconds` sums what lay between the marks on the device.

    Time that lies between two marks of a stage which gives the device nothing to do (data, logging, callbacks) is time it idled.
    """

    def __init__(self, event: Callable[[], Any], *, every: int = 8) -> None:
        self.event, self.every = event, every
        self.seconds: dict[str, float] = {}
        self.steps = 0
        self._count = 0
        self._marks: list[tuple[str, Any]] | None = None
        self._waiting: deque[list[tuple[str, Any]]] = deque()
        self._free: list[Any] = []

    def mark(self, stage: str) -> None:
        """From here on the device works for `stage`."""
        if self._marks is not None and self._marks[-1][0] != stage:
            self._marks.append((stage, self._recorded()))

    def step(self) -> None:
        """A step ends here, and the next one begins."""
        if self._marks is not None:
            self._marks.append(("", self._recorded()))
            self._waiting.append(self._marks)
        self.harvest()
        self._count += 1
        self._marks = [("other", self._recorded())] if self._count % self.every == 0 else None

    def harvest(self) -> None:
        """Read the steps whose last event has passed."""
        while self._waiting and self._waiting[0][-1][1].query():
            marks = self._waiting.popleft()
            for (stage, begin), (_, end) in pairwise(marks):
                self.seconds[stage] = self.seconds.get(stage, 0.0) + begin.elapsed_time(end) / 1e3
            self._free += [event for _, event in marks]
            self.steps += 1

    def _recorded(self) -> Any:
        event = self._free.pop() if self._free else self.event()
        event.record()
        return event
