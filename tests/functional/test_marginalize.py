"""The log of the mean probability is a valid logit, and uncertainty splits into what the picture and what the network leave open."""

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cnn.functional.marginalize import entropy, expected_entropy, log_mean_prob, mutual_information


def members(k, b=4, c=5, scale=3.0, seed=0):
    return (scale * torch.randn(k, b, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(-1)


def test_two_coins_that_disagree_share_one_bit():
    """One member is sure of heads, one of tails: log 2 of uncertainty, all of it disagreement."""
    log_prob = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log()
    assert log_mean_prob(log_prob).exp().tolist() == [[0.5, 0.5]]
    assert expected_entropy(log_prob).item() == 0
    assert mutual_information(log_prob).item() == pytest.approx(log(2))


@settings(max_examples=30)
@given(st.integers(1, 6), st.floats(0, 30), st.integers(0, 1000))
def test_it_is_the_log_of_the_mean_and_uncertainties_add_up(k, scale, seed):
    log_prob = members(k, scale=scale, seed=seed)
    mean = log_mean_prob(log_prob)
    torch.testing.assert_close(mean.exp(), log_prob.exp().mean(0))
    torch.testing.assert_close(mean.log_softmax(-1), mean, msg="it is normalised already")
    total, own, shared = entropy(mean), expected_entropy(log_prob), mutual_information(log_prob)
    torch.testing.assert_close(total, own + shared, rtol=1e-6, atol=1e-12)
    assert (shared >= 0).all()
    assert (shared <= log(k) + 1e-12).all()


def test_equal_members_do_not_disagree():
    log_prob = members(1).expand(7, -1, -1)
    assert mutual_information(log_prob).max() < 1e-12
    torch.testing.assert_close(log_mean_prob(log_prob), log_prob[0])


def test_the_gradient_of_the_mean_is_that_of_the_definition():
    logits = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: log_mean_prob(x.log_softmax(-1)), logits)
