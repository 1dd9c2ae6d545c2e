"""Measure every algorithm that accepts a call, and choose: the default unless another is clearly faster and accurate enough."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cnn.conv._call import NAMES, Call, load, run
from lightning_cnn.conv._signed_rank import slower
from lightning_cnn.conv._store import Store, default_folder

SWITCH_ABOVE = 1.10
OVERHEAD_S = 1e-4  # the way to an algorithm, among layers of a network that leave no Python in the cache: 70 to 130 microseconds
ROUNDS, HOPELESS = 9, 1.5
PATIENCE = 3  # times ROUNDS, for a machine that is busy with something else
STEADY, JITTER_S = 1.25, 2e-5  # the typical run against the fastest one, where nothing else disturbs
EVICTED_BYTES = 32 << 20
BUSY = "the machine was too busy to measure anything"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What 'auto' may spend: RMS error relative to float64, and memory beside input and output."""

    max_error: float = 1e-5
    max_workspace_mb: float = 256.0
    cache: str | None = "default"  # a folder; None remembers nothing between runs

    def plan(self) -> str:
        """The settings as the plan that the operator carries."""
        return f"auto {json.dumps(asdict(self), sort_keys=True)}"

    def folder(self) -> Path | None:
        return default_folder() if self.cache == "default" else Path(self.cache) if self.cache else None


@dataclass(frozen=True)
class Decision:
    """What was chosen for one call, and on what grounds."""

    algorithm: str
    seconds: float
    default_seconds: float
    error: float | None
    workspace: int
    reason: str

    @property
    def speedup(self) -> float:
        return self.default_seconds / self.seconds if self.seconds else 1.0


@cache
def tuner_for(plan: str) -> "Tuner":
    """The tuner of a plan 'auto {...}': one for each setting, shared by all layers and models of the process."""
    settings = Settings(**json.loads(plan.removeprefix("auto") or "{}"))
    return Tuner(settings, Store(settings.folder()))


@dataclass
class Tuner:
    """`choose` answers at once for what is known; the unknown is measured on the spot, or between steps of several processes."""

    generation: ClassVar[int] = 0  # moves whenever a decision of any tuner does
    settings: Settings
    store: Store
    clock: Callable[[], float] | None = None
    decisions: dict[Call, Decision] = field(default_factory=dict)
    pending: dict[Call, None] = field(default_factory=dict)
    paused: bool = False  # everything by the default for a while, to compare

    def choose(self, call: Call) -> str:
        if min(call.y) <= 0 or self.paused:
            return "default"
        if call not in self.decisions:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                self.pending[call] = None  # A rank that stopped to measure would let the others wait; `tune_pending` is called by all
                return "default"
            self.decide(self.measure([call]))
        return self.decisions[call].algorithm

    def tune_pending(self) -> int:
        """Measure on rank 0 what any rank has met since the last time, tell everybody, and return how many calls that were.

        Collective: every rank must call it.
        """
        calls = _union(self.pending)
        if calls:
            self.decide(_from_rank_0(lambda: self.measure(calls)))
        self.pending.clear()
        return len(calls)

    def recheck(self) -> list[Call]:
        """Measure the choices once more; those that are slower than the default now are reverted and returned. Collective."""
        chosen = [call for call, decision in self.decisions.items() if decision.algorithm != "default"]
        again = _from_rank_0(lambda: {call: self._revised(call, self.decisions[call]) for call in _union(dict.fromkeys(chosen))})
        reverted = [call for call, decision in again.items() if decision.algorithm == "default"]
        if reverted:
            self.decide({call: again[call] for call in reverted})
            log.info("Reverted %d choices that turned out slower than the default.", len(reverted))
        return reverted

    def measure(self, calls: Iterable[Call]) -> dict[Call, Decision]:
        """A decision for each call; those of an earlier run are only confirmed."""
        decisions = {}
        with torch.inference_mode(False), torch.no_grad():  # Tensors of inference mode have no version: nothing could be kept for them
            for call in calls:
                remembered = self.store.get(call)
                candidates, refused = self._candidates(call, NAMES if remembered is None else {"default", remembered})
                decisions[call] = self._decide(call, candidates, refused)
        self.store.put({call: decision.algorithm for call, decision in decisions.items() if decision.reason != BUSY})
        return decisions

    def decide(self, decisions: dict[Call, Decision]) -> None:
        """Let these decisions hold from now on."""
        self.decisions.update(decisions)
        Tuner.generation += 1

    def _candidates(self, call: Call, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
        refused = {}
        for name in sorted(names):
            reason = load(name).refuses(call)
            megabytes = 0 if reason else load(name).workspace(call) / 2**20
            if megabytes > self.settings.max_workspace_mb:
                reason = f"needs {megabytes:.0f} MB of workspace, {self.settings.max_workspace_mb:g} are allowed"
            if reason and name != "default":
                refused[name] = reason
        return [name for name in sorted(names) if name not in refused], refused

    def _decide(self, call: Call, candidates: list[str], refused: dict[str, str]) -> Decision:
        candidates, failed = self._that_run(call, candidates)
        times = self._race(call, candidates)
        seconds = {name: typical(values) + (name != "default") * OVERHEAD_S for name, values in times.items()}
        default, runner_up = seconds["default"], "; ".join(f"{name} failed: {why}" for name, why in failed.items())
        for name in sorted(seconds, key=lambda name: seconds[name]):
            ratio = default / seconds[name]
            if name == "default" or ratio <= SWITCH_ABOVE:
                break
            even = _steady(times["default"]) and _steady(times[name])
            if not even and min(times["default"]) <= SWITCH_ABOVE * seconds[name]:  # else even its best run is slower
                runner_up = f"{name} is {ratio:.2f}x faster in some runs and not in others"
                continue
            warm = {each: typical(values) for each, values in self._race(call, ["default", name], evict=False).items()}
            if warm["default"] < warm[name] + OVERHEAD_S:  # Whoever holds the filters in the cache must not lose by the choice either
                runner_up = f"{name} is {ratio:.2f}x faster on a cold cache but {warm['default'] / warm[name]:.2f}x on a warm one"
                continue
            error, stock = rms_error(call, name), rms_error(call, "default")
            if error <= max(self.settings.max_error, 2 * stock):
                workspace = load(name).workspace(call)
                return Decision(name, seconds[name], default, error, workspace, f"{ratio:.2f}x faster than the default")
            runner_up = f"{name} is {ratio:.2f}x faster but its error {error:.1e} exceeds {self.settings.max_error:.0e}"
        if not _steady(times["default"]):
            runner_up = BUSY
        others = {name: default / t for name, t in seconds.items() if name != "default"}
        if others and not runner_up:
            best = max(others, key=lambda name: others[name])
            runner_up = f"the next best, {best}, runs at {others[best]:.2f}x"
        reason = runner_up or (f"no other came within {HOPELESS}x" if len(candidates) > 1 else _sentence(refused))
        return Decision("default", default, default, None, 0, reason)

    def _revised(self, call: Call, decision: Decision) -> Decision:
        times = self._race(call, ["default", decision.algorithm])
        ours, stock = [seconds + OVERHEAD_S for seconds in times[decision.algorithm]], times["default"]
        if not slower(ours, stock):
            return decision
        reason = f"reverted: {decision.algorithm} was measured again at {typical(stock) / typical(ours):.2f}x"
        return Decision("default", typical(stock), typical(stock), None, 0, reason)

    def _that_run(self, call: Call, names: list[str]) -> tuple[list[str], dict[str, str]]:
        """The candidates that survive a first run, which also compiles them, and what the others raised."""
        if len(names) == 1:
            return names, {}
        operands, failed = example(call), {}
        for name in names:
            try:
                run(name, call, *operands)
            except Exception as error:
                if name == "default":
                    raise
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                log.warning("%s failed on %s of %s, %s: left out. %s", name, call.role, call.x, call.weight, failed[name])
        return [name for name in names if name not in failed], failed

    def _race(self, call: Call, names: list[str], evict: bool = True) -> dict[str, list[float]]:
        """Seconds of each, run in turns so that a slow moment of the machine hits all alike; the hopeless drop out early.

        Goes on for a while when the runs of one differ too much: a neighbour on the same cores makes every barrier wait for it.
        """
        operands = example(call)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(PATIENCE * ROUNDS if len(names) > 1 else 1):
            if turn >= ROUNDS and all(map(_steady, times.values())):
                break
            for name in times:
                times[name].append(self._timed(call, name, operands, evict))
            if turn == 1 and len(names) > 2:
                best = min(min(values) for values in times.values())
                times = {name: values for name, values in times.items() if name == "default" or min(values) <= HOPELESS * best}
                if len(times) == 1:
                    break
        return times

    def _timed(self, call: Call, name: str, operands: tuple[Tensor, Tensor, Tensor | None], evict: bool) -> float:
        if evict:
            _evict(call.device)
        clock = self.clock or now(call.device, call.threads)
        start = clock()
        run(name, call, *operands)
        if call.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def now(device: str, threads: int) -> Callable[[], float]:
    """The clock to measure with: one thread by its own processor time, which a busy neighbour does not change."""
    return time.thread_time if device == "cpu" and threads == 1 else time.perf_counter


def typical(seconds: Sequence[float]) -> float:
    """The lower quartile: what disturbs a run only ever makes it longer."""
    return sorted(seconds)[len(seconds) // 4]


def _steady(seconds: list[float]) -> bool:
    return typical(seconds) <= STEADY * min(seconds) + JITTER_S


def _sentence(refused: dict[str, str]) -> str:
    return "; ".join(f"{name} {why}" for name, why in refused.items()) or "so measured in an earlier run"


def example(call: Call) -> tuple[Tensor, Tensor, None]:
    """Operands of the call's shape and layout, filled with noise of its own: nobody's random state moves."""
    generator = torch.Generator().manual_seed(0)

    def noise(shape: tuple[int, ...]) -> Tensor:
        value = torch.randn(shape, generator=generator).to(call.device, call.dtype)
        return value.contiguous(memory_format=torch.channels_last) if call.channels_last else value

    shapes = {"forward": (call.x, call.weight), "input": (call.y, call.weight), "weight": (call.x, call.y)}[call.role]
    return noise(shapes[0]), noise(shapes[1]), None


@cache
def rms_error(call: Call, name: str) -> float:
    """Root mean square error against float64, relative to the result's, on at most two pictures."""
    small = replace(call, x=(min(call.x[0], 2), *call.x[1:]), keep=False)
    a, b, _ = example(small)
    exact = load("default").compute(replace(small, dtype=torch.float64), a.double(), b.double(), None)
    found = load(name).compute(small, a, b, None).double()
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(1e-300))


@cache
def _evicting(device: str) -> Tensor:
    return torch.zeros(EVICTED_BYTES // 4, device=device)


def _evict(device: str) -> None:
    """Push filters out of the cache, where the other layers of a network would have pushed them."""
    _evicting(device).add_(1)


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _union(calls: dict[Call, None]) -> list[Call]:
    if not _many():
        return list(calls)
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, list(calls))
    return list(dict.fromkeys(call for mine in everybody for call in mine))


def _from_rank_0(compute: Callable[[], dict[Call, Decision]]) -> dict[Call, Decision]:
    if not _many():
        return compute()
    box = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0] or {}
