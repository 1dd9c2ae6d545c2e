"""Averages of weights."""

import pytest
import torch

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.weights import average, ema_decay, greedy_soup, l2_sp_gradient_


def test_the_first_average_is_the_weights_and_the_decay_grows_to_its_limit():
    decays = [ema_decay(n, 0.99) for n in range(2000)]
    assert decays[0] == 0 and decays[-1] == 0.99
    assert decays == sorted(decays)


def test_a_mean_is_exact_to_the_last_bit_and_counters_are_kept():
    a, b = {"w": torch.tensor([0.1, 1e8]), "n": torch.tensor(3)}, {"w": torch.tensor([0.2, 1.0]), "n": torch.tensor(9)}
    mean = average([a, b])
    torch.testing.assert_close(mean["w"], torch.tensor([(0.1 + 0.2) / 2, (1e8 + 1) / 2]), rtol=1e-7, atol=0)
    assert mean["n"] == 9 and mean["w"].dtype == torch.float32
    assert torch.equal(average([a, a, a])["w"], a["w"])


def test_members_of_another_architecture_are_named():
    with pytest.raises(ConfigurationError, match="member 1 is another architecture than member 0: w differ"):
        average([{"w": torch.ones(2)}, {"w": torch.ones(3)}])
    with pytest.raises(ConfigurationError, match="no members"):
        average([])


def test_a_greedy_soup_keeps_only_what_helps():
    states = [{"w": torch.tensor([value])} for value in (5.0, 0.5, -0.5, 0.4)]
    soup, chosen = greedy_soup(states, lambda state: -abs(float(state["w"])))
    assert chosen == [3, 2]  # 0.4 alone, then with -0.5 the mean is -0.05; 0.5 would bring it to 0.13
    torch.testing.assert_close(soup["w"], torch.tensor([-0.05]))


def test_l2_sp_is_the_gradient_of_its_penalty():
    weight, anchor = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (0.5 * 0.3 * ((weight - anchor) ** 2).sum()).backward()
    expected, weight.grad = weight.grad, torch.zeros(3, 4)
    l2_sp_gradient_([weight], [anchor], 0.3)
    torch.testing.assert_close(weight.grad, expected)


def test_a_weight_without_a_gradient_is_left_frozen():
    weight = torch.randn(3)
    l2_sp_gradient_([weight], [torch.zeros(3)], 0.3)
    assert weight.grad is None
