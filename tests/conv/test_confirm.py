"""The whole network decides in the end: with a clock that says what a step costs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_cnn.conv import confirm, report, swap
from lightning_cnn.conv._confirm import Trial, choices
from lightning_cnn.conv._swap import replace_role, tuners
from lightning_cnn.conv._tuner import Decision

CHOSEN = Decision("fft", 0.5, 1.0, 1e-7, 0, "as the test says")


class Steps:
    """A network of two layers for which fft was chosen; a step takes as many seconds as `costs` says for what the layers use."""

    def __init__(self, folder, **costs):
        self.model = swap(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 2)), "auto", cache=str(folder))
        self.now, self.costs, self.steps = 0.0, costs, 0
        (self.tuner,) = tuners(self.model)
        self.calls = []
        self.step()
        self.calls = [next(iter(layer._calls)) for layer in self.model]
        self.tuner.decide(dict.fromkeys(self.calls, CHOSEN))

    def step(self):
        with torch.no_grad():
            self.model(torch.ones(1, 2, 12, 12))
        self.steps += 1
        self.now += self.costs["_".join(self.tuner.choose(call) for call in self.calls)] if self.calls else 0.0

    def confirm(self):
        return confirm(self.model, self.step, rounds=5, clock=lambda: self.now)

    @property
    def algorithms(self):
        return [self.tuner.decisions[call].algorithm for call in self.calls]


def test_a_choice_that_pays_in_its_place_stays(tmp_path):
    steps = Steps(tmp_path, fft_fft=2.0, fft_default=2.5, default_fft=2.5, default_default=3.0)
    assert steps.confirm() == pytest.approx(3 / 2)
    assert steps.algorithms == ["fft", "fft"]
    assert [row.error for row in report(steps.model).rows] == [CHOSEN.error] * 2
    assert steps.steps == 2 + 10 * 2 * 2  # ten rounds with and without, two runs each


def test_a_choice_that_does_not_pay_in_its_place_is_taken_back_alone(tmp_path):
    steps = Steps(tmp_path, fft_fft=2.0, fft_default=1.5, default_fft=2.5, default_default=2.0)
    assert steps.confirm() == pytest.approx(2 / 1.5)
    assert steps.algorithms == ["fft", "default"]
    assert (
        "reverted: fft runs at 2.00x alone, but in its place in the network it makes the whole slower"
        in report(steps.model).rows[1].reason
    )


def test_choices_that_only_hurt_together_are_all_taken_back(tmp_path):
    steps = Steps(tmp_path, fft_fft=2.1, fft_default=2.2, default_fft=2.2, default_default=2.0)
    assert steps.confirm() == 1.0
    assert steps.algorithms == ["default", "default"]
    assert "the whole network ran at 0.95x" in report(steps.model).rows[0].reason


def test_a_gain_of_less_than_a_tenth_is_looked_at_choice_by_choice_the_least_promising_first(tmp_path):
    steps = Steps(tmp_path, fft_fft=2.8, fft_default=2.7, default_fft=3.2, default_default=3.0)
    tried, decide = [], steps.tuner.decide
    steps.tuner.decide = lambda decisions: tried.extend(decisions) or decide(decisions)
    decide({steps.calls[0]: Decision("fft", 0.1, 1.0, 1e-7, 0, "promises more")})
    assert steps.confirm() == pytest.approx(3 / 2.7)
    assert steps.algorithms == ["fft", "default"]
    assert list(dict.fromkeys(tried)) == steps.calls[::-1]


def test_choices_of_other_models_are_not_tried_and_those_of_gradients_are(tmp_path):
    steps = Steps(tmp_path, fft_fft=2.0)
    gradient, stranger = replace_role(steps.calls[0], "weight"), replace(steps.calls[0], x=(7, 2, 12, 12))
    steps.tuner.decide({gradient: CHOSEN, stranger: CHOSEN})
    assert set(choices(steps.model)) == {*steps.calls, gradient}


def test_both_ways_are_timed_equally_often():
    trial = Trial(2)
    for _ in range(5):
        trial.add(1.0, stock=True)
    assert not trial.done


def test_nothing_chosen_costs_one_step(tmp_path):
    steps = Steps(tmp_path, default_default=1.0)
    steps.tuner.decide(dict.fromkeys(steps.calls, Decision("default", 1.0, 1.0, None, 0, "")))
    assert steps.confirm() == 1.0
    assert steps.steps == 2
