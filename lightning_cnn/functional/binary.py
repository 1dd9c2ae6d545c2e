"""Numbers of few bits with gradients that pass straight through: sign, ternary, and k bits with a learned step.

Every function returns exact values of its format in the dtype of `x` (no `x + (q - x).detach()`, which is off by one ulp), and its
backward is the estimator the paper trains with. `binarize` maps 0.0, -0.0 and NaN to +1, so one bit, "is it below zero", says it all.

Source: Courbariaux et al. 2016, arXiv:1602.02830 (sign, clipped straight-through); Liu et al. 2018, Bi-Real Net, arXiv:1808.00278
(piecewise polynomial "approx" slope); Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279 (scale a filter); Li & Liu 2016, ternary
weight networks, arXiv:1605.04711; Esser et al. 2020, learned step size, arXiv:1902.08153.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_cnn.errors import ConfigurationError


def binarize(x: Float[Tensor, "*shape"], slope: str = "clip") -> Float[Tensor, "*shape"]:
    """-1 where `x` is below zero, +1 elsewhere; the gradient passes where |x| <= 1, by 1 ("clip") or 2 - 2|x| ("approx").

    >>> binarize(torch.tensor([-0.3, -0.0, 0.0, 2.0])).tolist()
    [-1.0, 1.0, 1.0, 1.0]
    """
    return _Sign.apply(x, _checked(slope))


def ternarize(x: Float[Tensor, "*shape"], threshold: float | Tensor = 0.5, slope: str = "clip") -> Float[Tensor, "*shape"]:
    """The sign of `x` where |x| exceeds `threshold`, else 0; gradients as in `binarize`.

    >>> ternarize(torch.tensor([-0.8, -0.3, 0.2, 0.9])).tolist()
    [-1.0, 0.0, 0.0, 1.0]
    """
    return _Ternary.apply(x, threshold, _checked(slope))


def lsq(x: Float[Tensor, "*shape"], step: Float[Tensor, ""], bits: int, signed: bool = True) -> Float[Tensor, "*shape"]:
    """Round `x` to a multiple of a learned `step` that `bits` bits can count, with LSQ's gradient for the step.

    >>> lsq(torch.tensor([-9.0, 0.2, 0.3, 9.0]), torch.tensor(0.5), bits=3).tolist()
    [-2.0, 0.0, 0.5, 1.5]
    """
    low, high = lsq_range(bits, signed)
    return _LSQ.apply(x, step, low, high)


def lsq_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """The smallest and largest count of steps.

    >>> lsq_range(3), lsq_range(3, signed=False)
    ((-4, 3), (0, 7))
    """
    if bits < 2:
        raise ConfigurationError(f"A learned step needs at least 2 bits, got {bits}; for 1 bit use binarize.")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def filter_scale(weight: Float[Tensor, "k *rest"]) -> Float[Tensor, " k"]:
    """XNOR-Net's scale, the mean |w| of each filter: the least-squares fit of scale * sign(w) to w."""
    return weight.abs().flatten(1).mean(1)


def ternary_threshold(weight: Float[Tensor, "k *rest"]) -> Float[Tensor, " k"]:
    """0.7 mean |w| of each filter: near the least-squares threshold for normal and uniform weights (Li & Liu 2016, section 2.2)."""
    return 0.7 * filter_scale(weight)


def ternary_scale(weight: Float[Tensor, "k *rest"]) -> Float[Tensor, " k"]:
    """The mean |w| of the weights that `ternary_threshold` keeps, a filter."""
    size = weight.abs().flatten(1)
    kept = size > ternary_threshold(weight)[:, None]
    return (size * kept).sum(1) / kept.sum(1).clamp_min(1)


def initial_step(mean_size: float | Tensor, high: int) -> float | Tensor:
    """LSQ's first step, 2 mean|x| / sqrt(largest count)."""
    return 2 * mean_size / high**0.5


def _checked(slope: str) -> bool:
    if slope not in ("clip", "approx"):
        raise ConfigurationError(f"The slope of a straight-through estimator is 'clip' or 'approx', got {slope!r}.")
    return slope == "approx"


def _through(gradient: Tensor, x: Tensor, approx: bool) -> Tensor:
    return gradient * (2 - 2 * x.abs()).clamp_min(0) if approx else torch.where(x.abs() <= 1, gradient, 0)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, approx: bool) -> Tensor:
        return 1 - 2 * (x < 0).to(x.dtype)  # quicker than `where` on two numbers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.approx = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _through(gradient, ctx.saved_tensors[0], ctx.approx), None


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, threshold: float | Tensor, approx: bool) -> Tensor:
        return (x > threshold).to(x.dtype) - (x < -threshold).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.approx = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _through(gradient, ctx.saved_tensors[0], ctx.approx), None, None


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        return (x / step).clamp(low, high).round() * step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, step, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x, step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, step = ctx.saved_tensors
        count = x / step
        nearest = count.clamp(ctx.low, ctx.high)
        inside = nearest == count
        slope = torch.where(inside, nearest.round() - count, nearest)
        return torch.where(inside, gradient, 0), (gradient * slope).sum() / (x.numel() * ctx.high) ** 0.5, None, None
