"""What was measured alone must also pay in its place: between other layers, with what they leave in the caches."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_cnn.conv._call import ROLES, Call
from lightning_cnn.conv._signed_rank import slower
from lightning_cnn.conv._swap import replace_role, swapped, tuners
from lightning_cnn.conv._tuner import SWITCH_ABOVE, Decision, Tuner, now, typical

log = logging.getLogger(__name__)


def confirm(model: nn.Module, step: Callable[[], object], *, rounds: int = 8, clock: Callable[[], float] | None = None) -> float:
    """Run `step` with the choices of 'auto' and without, take back what makes it slower, and return the speed-up that is left.

    `step` is whatever shall be fast, as `lambda: model(images)`, under `torch.inference_mode()` where that is how it will run. Where
    the whole is not clearly faster, each choice is tried by itself in as many `rounds`, and then what is left, in twice as many; what
    is slower by `_signed_rank.slower` is taken back (of 5 rounds, all must be lost). A round takes four steps.
    """
    clock = clock or now(next(model.parameters()).device.type, torch.get_num_threads())
    step()
    whole = _whole(model, step, clock, 2 * rounds)
    if whole.speedup > SWITCH_ABOVE or not choices(model):
        return whole.speedup
    for call, tuner in sorted(choices(model).items(), key=lambda item: _promised_s(*item)):
        chosen = tuner.decisions[call]
        given_up = _stock(chosen, "in its place in the network it makes the whole slower")
        race = Trial(rounds)
        while not race.done:
            for stock, decision in enumerate((chosen, given_up)):
                tuner.decide({call: decision})
                race.add(_timed(step, clock), stock=bool(stock))
        tuner.decide({call: given_up if race.slower else chosen})
    whole = _whole(model, step, clock, 2 * rounds)
    if whole.slower:
        take_back(model, whole.speedup)
    return whole.speedup if choices(model) else 1.0


def _whole(model: nn.Module, step: Callable[[], object], clock: Callable[[], float], rounds: int) -> "Trial":
    race = Trial(rounds if choices(model) else 0)
    while not race.done:
        for stock in (False, True):
            pause(model, stock)
            race.add(_timed(step, clock), stock=stock)
    pause(model, False)
    return race


@dataclass
class Trial:
    """Seconds of as many steps with the choices as without."""

    rounds: int
    times: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def add(self, seconds: float, *, stock: bool) -> None:
        self.times[stock].append(seconds)

    @property
    def done(self) -> bool:
        return min(map(len, self.times)) >= self.rounds

    @property
    def speedup(self) -> float:
        ours, stock = map(typical, self.times) if self.rounds else (1.0, 1.0)
        return stock / ours

    @property
    def slower(self) -> bool:
        return slower(*self.times)


def choices(model: nn.Module) -> dict[Call, Tuner]:
    """The calls of the model for which 'auto' has chosen another way than the default."""
    met = {call for layer in swapped(model) for call in layer._calls}
    met |= {replace_role(call, role) for call in met for role in ROLES}
    return {
        call: tuner
        for tuner in tuners(model)
        for call, decision in tuner.decisions.items()
        if call in met and decision.algorithm != "default"
    }


def pause(model: nn.Module, paused: bool) -> None:
    """Let the 'auto' layers compute by the default for a while, or no longer."""
    for tuner in tuners(model):
        tuner.paused = paused


def take_back(model: nn.Module, speedup: float) -> None:
    """Give up all choices of the model: with them the whole ran at `speedup`."""
    given_up = choices(model)
    for call, tuner in given_up.items():
        tuner.decide({call: _stock(tuner.decisions[call], f"the whole network ran at {speedup:.2f}x with its choices")})
    log.info("Reverted %d choices: the whole network ran at %.2fx with them.", len(given_up), speedup)


def _stock(decision: Decision, why: str) -> Decision:
    reason = f"reverted: {decision.algorithm} runs at {decision.speedup:.2f}x alone, but {why}"
    return Decision("default", decision.default_seconds, decision.default_seconds, None, 0, reason)


def _promised_s(call: Call, tuner: Tuner) -> float:
    return tuner.decisions[call].default_seconds - tuner.decisions[call].seconds


def _timed(step: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the second of two runs: the first looks the choices up."""
    step()
    start = clock()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - start
