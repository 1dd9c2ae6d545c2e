"""Numbers of few bits: exact values, and gradients that pass straight through."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.binary import binarize, filter_scale, lsq, lsq_range, ternarize, ternary_scale, ternary_threshold

SPECIAL = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), -1e-45, 1e-45])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_only_numbers_below_zero_are_minus_one(dtype):
    assert binarize(SPECIAL[:5].to(dtype)).tolist() == [1, 1, 1, 1, -1]
    assert binarize(SPECIAL).tolist() == [1, 1, 1, 1, -1, -1, 1]
    assert binarize(SPECIAL.to(dtype)).dtype == dtype


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_binarize_is_idempotent_and_one_sign_wide(values):
    signs = binarize(torch.tensor(values))
    assert set(signs.tolist()) <= {-1.0, 1.0}
    assert torch.equal(binarize(signs), signs)


def test_the_gradient_passes_where_the_papers_let_it():
    x = torch.tensor([-1.5, -1.0, -0.25, 0.0, 0.5, 1.0, 1.5])
    slopes = {}
    for slope in ("clip", "approx"):
        leaf = x.clone().requires_grad_()
        binarize(leaf, slope).sum().backward()
        slopes[slope] = leaf.grad.tolist()
    assert slopes == {"clip": [0, 1, 1, 1, 1, 1, 0], "approx": [0, 0, 1.5, 2, 1, 0, 0]}


def test_ternary_takes_a_threshold_a_filter():
    weight = torch.tensor([[1.0, -1.0, 0.1, 0.0], [0.1, -0.1, 0.01, 0.0]], requires_grad=True)
    values = ternarize(weight, ternary_threshold(weight.detach())[:, None])
    assert values.tolist() == [[1, -1, 0, 0]] * 2
    assert ternary_scale(weight.detach()).tolist() == pytest.approx([1.0, 0.1])
    values.sum().backward()
    assert weight.grad.tolist() == [[1.0] * 4] * 2


def test_the_scale_is_the_least_squares_fit():
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    scale, signs = filter_scale(weight), binarize(weight)
    for nudge in (-1e-3, 1e-3):
        fit, worse = ((weight - (scale + n).view(-1, 1, 1, 1) * signs).square().sum() for n in (0.0, nudge))
        assert fit < worse


@given(bits=st.integers(2, 8), signed=st.booleans(), step=st.floats(0.01, 3))
@settings(max_examples=30, deadline=None)
def test_lsq_counts_whole_steps_within_its_bits(bits, signed, step):
    low, high = lsq_range(bits, signed)
    counts = lsq(torch.randn(200) * 5, torch.tensor(step), bits, signed) / torch.tensor(step)
    assert high - low == 2**bits - 1
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    assert low <= counts.min().round() and counts.max().round() <= high


def test_the_step_learns_to_fit():
    """LSQ's gradient brings a step that is 4 times too large or small near the one that a search finds best."""
    x = torch.randn(2000)
    error = {s: (lsq(x, torch.tensor(s), 3) - x).square().mean().item() for s in torch.linspace(0.1, 2, 191).tolist()}
    best = min(error.values())
    for start in (0.15, 2.4):
        step = torch.tensor(start, requires_grad=True)
        for _ in range(300):
            ((lsq(x, step, 3) - x).square().sum()).backward()
            with torch.no_grad():
                step -= 0.003 * step.grad
                step.grad = None
        assert (lsq(x, step.detach(), 3) - x).square().mean() < 1.1 * best


def test_lsq_gradient_is_that_of_the_paper():
    x, step = torch.tensor([-9.0, 0.3, 0.8, 9.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    lsq(x, step, 3).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert step.grad.item() == pytest.approx((-4 + (1 - 0.6) + (2 - 1.6) + 3) / (4 * 3) ** 0.5)


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigurationError, match="'clip' or 'approx', got 'sharp'"):
        binarize(torch.zeros(1), "sharp")
    with pytest.raises(ConfigurationError, match="at least 2 bits, got 1"):
        lsq_range(1)
