"""How often noise takes a choice back, and how often a slower one is found."""

from itertools import product

import pytest
import torch

from lightning_cnn.conv._signed_rank import FALSE_ALARM, slower

TRIALS, PAIRS, NOISE = 1000, 16, 0.2


def share_reverted(speedup, pairs=PAIRS):
    """Of trials in which a step of the default takes a second, and both vary by 20 % (log-normal)."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(TRIALS, 2, pairs, generator=generator).mul(NOISE).exp()
    return sum(slower((ours / speedup).tolist(), stock.tolist()) for ours, stock in steps) / TRIALS


@pytest.mark.parametrize(("speedup", "least", "most"), [(1.0, 0.02, 0.065), (1.1, 0.0, 0.01), (0.8, 0.85, 1.0), (0.9, 0.3, 0.5)])
def test_what_is_slower_is_found_and_what_is_not_seldom_suffers(speedup, least, most):
    """Bounds are the card's figures and three standard errors of a share of a thousand."""
    assert least <= share_reverted(speedup) <= most


@pytest.mark.parametrize("pairs", [4, 5, 8, 11])
def test_exactly_so_many_patterns_of_wins_and_losses_raise_the_alarm_as_are_allowed(pairs):
    alarms = sum(slower([1 + (i + 1) * sign for i, sign in enumerate(signs)], [1] * pairs) for signs in product((-1, 1), repeat=pairs))
    assert alarms <= FALSE_ALARM * 2**pairs < alarms + 2 * pairs
    assert (alarms > 0) == (pairs > 4)


def test_equal_times_are_not_slower():
    assert not slower([1.0] * 9, [1.0] * 9)
    assert not slower([], [])
