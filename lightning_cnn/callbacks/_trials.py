"""Changes that are kept only where they are faster here: each is timed against its absence, in turns, on the user's own model."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Undo = Callable[[], None]
REPEATS = 3  # timed steps after one that is not, each time
TURNS = 6  # of two things compared call by call
CALLS = 2 * 2 * (1 + REPEATS)  # of a step that a trial makes at most


@dataclass(frozen=True)
class Change:
    """`apply` makes the change and returns how to take it back; `step` is what it should make faster."""

    name: str
    apply: Callable[[], Undo]
    step: Callable[[], object]


@dataclass(frozen=True)
class Trial:
    """Seconds a step without and with a change; `note` says why it was not timed."""

    name: str
    before_s: float = 0.0
    after_s: float = 0.0
    kept: bool = False
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return f"{self.name} {self.note}"
        ratio = self.before_s / self.after_s
        return (
            f"{self.name} {'kept' if self.kept else 'left'} at {ratio:.2f}x ({self.before_s * 1e3:.2f} -> {self.after_s * 1e3:.2f} ms)"
        )


class Allowance:
    """Trials may take a share of what lies ahead, all together; their clock runs from here."""

    def __init__(self, ahead_s: float, share: float) -> None:
        self.ahead_s, self.share, self.began = ahead_s, share, time.perf_counter()

    def refuses(self, cost_s: float) -> str:
        """Why a trial of so many seconds is not made, or nothing."""
        spent_s = time.perf_counter() - self.began
        if spent_s + cost_s <= self.share * self.ahead_s:
            return ""
        so_far = f" after {_time(spent_s)} of trials" if spent_s > cost_s / CALLS else ""
        return f"was not tried: {_time(cost_s)} for a trial{so_far} is over {self.share:.0%} of the {_time(self.ahead_s)} ahead"


def choose(
    changes: Sequence[Change], least: float, device: torch.device, allowance: Allowance, call_s: float
) -> tuple[list[Trial], dict[str, Undo]]:
    """Try the changes one after the other, each on top of those kept so far; what was kept is left applied.

    `call_s` is what a call of the dearest change's step takes: a trial that its calls make too dear is left out.
    """
    trials: list[Trial] = []
    kept: dict[str, Undo] = {}
    for change in changes:
        refusal = allowance.refuses(CALLS * call_s)
        trial, undo = (Trial(change.name, note=refusal), None) if refusal else _tried(change, least, device)
        trials.append(trial)
        if undo is not None:
            kept[change.name] = undo
    return trials, kept


def _tried(change: Change, least: float, device: torch.device) -> tuple[Trial, Undo | None]:
    """Without, with, without, with; given up after the first pair if that was no faster."""
    without: list[float] = []
    with_it: list[float] = []
    for last in (False, True):
        without += timed(change.step, device)
        undo: Undo | None = None
        try:
            undo = change.apply()
            with_it += timed(change.step, device)
        except Exception as error:  # whatever a backend cannot do is no reason to stop training
            if undo is not None:
                undo()
            return Trial(change.name, note=f"failed ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"), None
        before_s, after_s = statistics.median(without), statistics.median(with_it)
        if last and before_s >= least * after_s:
            return Trial(change.name, before_s, after_s, kept=True), undo
        undo()
        if before_s <= after_s:
            break
    return Trial(change.name, before_s, after_s), None


def compared(before: Callable[[], object], after: Callable[[], object], device: torch.device) -> tuple[float, float, bool]:
    """Seconds of a call of either, in turns, and whether `after` was the faster one in all turns but one at most."""
    turns = [(timed(before, device, 1)[0], timed(after, device, 1)[0])]
    turns += [(_clocked(before, device), _clocked(after, device)) for _ in range(TURNS - 1)]
    before_s, after_s = (statistics.median(side) for side in zip(*turns, strict=True))
    return before_s, after_s, sum(b > a for b, a in turns) >= TURNS - 1


def timed(step: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> list[float]:
    """Seconds of `repeats` calls, after one that warms up."""
    return [_clocked(step, device) for _ in range(repeats + 1)][1:]


def _clocked(step: Callable[[], object], device: torch.device) -> float:
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
