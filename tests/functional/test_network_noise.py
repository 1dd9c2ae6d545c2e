"""Dropout, stochastic depth and DropConnect keep the mean and repeat themselves for a sample; DropConnect masks each sample alone."""

import pytest
import torch
import torch.nn.functional as F

from lightning_cnn.functional import network_noise as noise
from lightning_cnn.functional.counter import key

KEY = torch.tensor(key(0))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("drop", [noise.dropout, noise.stochastic_depth])
def test_the_mean_stays_and_the_rate_is_p(drop, p):
    rows = torch.arange(4000)
    y = drop(torch.ones(4000, 3, 2, 2), p, KEY, rows)
    zeros = (y == 0).float()
    assert zeros.mean().item() == pytest.approx(p, abs=4.5 * (p * (1 - p) / 4000) ** 0.5)
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - p)] if p < 1 else [])
    assert torch.equal(y.amax((2, 3)), y.amin((2, 3))), "whole channels"


def masks(p: float, rows: torch.Tensor, seed: torch.Tensor = KEY, shape=(6, 5)) -> torch.Tensor:
    """The mask (b o i) of each sample, read off the layer: weight one, one input at a time."""
    weight, b = torch.ones(shape), len(rows)
    columns = [
        noise.dropconnect(noise.linear, F.one_hot(torch.tensor(i), shape[1]).float().expand(b, -1), weight, None, p, seed, rows, 1)
        for i in range(shape[1])
    ]
    return torch.stack(columns, -1) * (1 - p)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.7])
def test_each_sample_has_a_bernoulli_mask_of_its_own(p):
    """Ones and zeros alone, at rate p, independent within a sample; two samples' masks correlate as the docstring says."""
    drawn = torch.stack([masks(p, torch.arange(2), torch.tensor(key(k)), shape=(60, 8)) for k in range(40)])
    torch.testing.assert_close(drawn, drawn.round(), rtol=0, atol=1e-6)
    dropped = 1 - drawn.double().round()
    n = dropped.numel() / 2
    assert dropped.mean().item() == pytest.approx(p, abs=4.5 * (p * (1 - p) / n) ** 0.5)
    one, other = dropped[:, 0].flatten(1), dropped[:, 1].flatten(1)
    variance = p * (1 - p)
    neighbours = ((one[:, 1:] - p) * (one[:, :-1] - p)).mean().item() / variance
    assert neighbours == pytest.approx(0, abs=4.5 / n**0.5)
    q = min(p, 1 - p)
    correlation = ((one - p) * (other - p)).mean().item() / variance
    # Above one half, dropping and keeping swap; a correlation of products of unit variance has a standard error below 4 / sqrt(n).
    assert correlation == pytest.approx((0.5 - q) / (1 - q), abs=4 * 4 / n**0.5)


def test_the_layer_equals_a_masked_weight_for_each_sample():
    """float64 against one weight a sample; the tolerance is eps times the length of the sum."""
    rows, weight, x = torch.tensor([7, 1, 4]), torch.randn(6, 5).double(), torch.randn(3, 5).double()
    y = noise.dropconnect(noise.linear, x, weight, None, 0.3, KEY, rows, 1)
    expected = torch.einsum("boi,bi->bo", masks(0.3, rows).double() * weight / 0.7, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)  # masks() is float32


def test_convolutions_with_groups_share_a_samples_mask_over_all_positions():
    rows, weight = torch.arange(4), torch.randn(6, 2, 3, 3)

    def convolve(x, w, b):
        return F.conv2d(x, w, b, padding=1, groups=2)

    x = torch.randn(4, 4, 8, 8).double()
    y = noise.dropconnect(convolve, x, weight.double(), None, 0.4, KEY, rows, 1)
    shifted = noise.dropconnect(convolve, x.roll(2, -1), weight.double(), None, 0.4, KEY, rows, 1)
    torch.testing.assert_close(shifted[..., 3:-1], y.roll(2, -1)[..., 3:-1])


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_dropconnect_is_unbiased(p):
    weight, x = torch.randn(3, 8), torch.randn(1, 8)
    rows, keys = torch.arange(1), [torch.tensor(key(k)) for k in range(500)]
    y = torch.stack([noise.dropconnect(noise.linear, x, weight, None, p, k, rows, 1)[0] for k in keys])
    error = (weight**2 @ (x[0] ** 2) * p / (1 - p) / len(y)).sqrt()
    assert ((y.mean(0) - weight @ x[0]).abs() < 4.5 * error).all()


@pytest.mark.parametrize("drop", [noise.dropout, noise.stochastic_depth])
def test_a_sample_keeps_its_noise_in_any_batch(drop):
    x, rows = torch.randn(9, 3, 2, 2), torch.randperm(9)
    whole = drop(x, 0.5, KEY, rows)
    assert torch.equal(torch.cat([drop(x[:4], 0.5, KEY, rows[:4]), drop(x[4:], 0.5, KEY, rows[4:])]), whole)
    assert not torch.equal(drop(x, 0.5, KEY + 1, rows), whole)


def test_gradients_reach_weight_and_input():
    def f(x, w):
        return noise.dropconnect(noise.linear, x, w, None, 0.3, KEY, torch.arange(2), 1)

    assert torch.autograd.gradcheck(
        f, (torch.randn(2, 4, dtype=torch.double, requires_grad=True), torch.randn(3, 4, dtype=torch.double, requires_grad=True))
    )
