"""Round to nearest, or stochastically: up with the probability of the distance already covered, so that the mean is kept.

A step of 1e-5 on a weight of 1.0 vanishes when bfloat16 rounds it to the nearest; rounded stochastically, one weight in 781 moves by
2**-7 and the average weight moves by 1e-5. The noise is a function of `(seed, stream, step, element)`: no generator, the same on every
rank and after a resume.

The bits are those of one formula, written for torch here and compiled in `kernels.rounding` (numba, CPU) and `kernels.rounding_triton`
(GPU). Under `torch.compile` the formula itself is traced on a GPU, and the CPU kernel is called as a custom operator.

A finite number outside the format's range saturates at its largest finite value. NaN stays NaN; infinity stays infinity, except that
e4m3 has none (it becomes NaN, which is visible) and fixed point saturates. The sign of zero is kept. No gradient flows.

Source: Gupta et al. 2015, "Deep learning with limited numerical precision", section 3.1, arXiv:1502.02551.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional import counter
from lightning_cnn.kernels import rounding as kernel

INFINITY, QUIET, LARGEST_BF16 = 0x7F800000, 0x00400000, 0x7F7FFFFF
WHOLE = 2.0**23  # from here on every float32 is an integer
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Format:
    """A set of numbers: their spacing is 2**(exponent - mantissa), kept between 2**finest and 2**coarsest, within [low, high]."""

    name: str
    dtype: torch.dtype
    mantissa: int
    finest: int
    coarsest: int
    low: float
    high: float
    saturates_infinity: bool = False

    @property
    def bits(self) -> int | None:
        """Bits a number, or None for a grid without a range."""
        if self.finest < self.coarsest:
            return self.dtype.itemsize * 8
        return None if math.isinf(self.high) else round(math.log2(self.high - self.low + 2.0**self.finest)) - self.finest


def _float(name: str, dtype: torch.dtype) -> Format:
    info = torch.finfo(dtype)
    mantissa = -round(math.log2(info.eps))
    return Format(name, dtype, mantissa, round(math.log2(info.tiny)) - mantissa, 127, info.min, info.max)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FLOATS = {name: _float(name, dtype) for name, dtype in DTYPES.items()}


def as_format(format: str | tuple[int, int] | Format) -> Format:
    """The `Format` of "bf16", "fp16", "e4m3", "e5m2" or of a fixed point `(integer_bits, fraction_bits)`, sign included.

    >>> as_format((6, 10)).high, as_format("e4m3").high
    (31.9990234375, 448.0)
    """
    if isinstance(format, Format):
        return format
    if isinstance(format, str) and format in FLOATS:
        return FLOATS[format]
    if not isinstance(format, str):
        integer, fraction = format
        if integer >= 1 and fraction >= 0 and integer + fraction <= 24:
            high = 2.0 ** (integer - 1)
            return Format(f"<{integer},{fraction}>", torch.float32, 0, -fraction, -fraction, -high, high - 2.0**-fraction, True)
        raise ConfigurationError(
            f"Fixed point <{integer},{fraction}> cannot be held in float32: integer_bits must be 1 or more (the sign is one of them), "
            "fraction_bits 0 or more, and both together at most 24."
        )
    raise ConfigurationError(f"No number format {format!r}. Choose one of {', '.join(FLOATS)} or a pair (integer_bits, fraction_bits).")


def round_nearest(x: Tensor, format: str | tuple[int, int] | Format | None = None, *, grid: float | None = None) -> Tensor:
    """The number of the format (or multiple of `grid`) nearest to x, ties to even; in the format's dtype (fixed point: float32).

    >>> round_nearest(torch.tensor([1.001, -100.0]), (6, 10)).tolist()
    [1.0009765625, -32.0]
    """
    target, x = _target(format, grid), x.detach().float()
    rounded = x if target.finest < target.coarsest else torch.round(x * 2.0**-target.finest) * 2.0**target.finest
    return _cast(_saturate(rounded, x, target), target)


def round_stochastic(
    x: Tensor,
    format: str | tuple[int, int] | Format | None = None,
    *,
    grid: float | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    stream: int | str = 0,
    index: int | Tensor = 0,
    out: Tensor | None = None,
) -> Tensor:
    """One of the two neighbours of x in the format (or on the `grid`), chosen so that the mean over steps is x.

    Exactly unbiased onto bf16; within 2**-24 of a spacing onto the others; float64 is first rounded to float32. `step` may be an int64
    tensor, so that `torch.compile` does not compile each step anew; `stream` tells parameters apart; `index` is the global position of
    x's first element, or of every one, so that a shard draws the noise of its place in the whole. `out` takes the result.

    >>> mean = sum(round_stochastic(torch.tensor([0.3]), grid=1.0, step=step) for step in range(1000)) / 1000
    >>> abs(mean.item() - 0.3) < 0.06
    True
    """
    target, x = _target(format, grid), x.detach().float()
    parts = (seed, "rounding", stream)
    key = counter.key_at(*parts, step=step) if isinstance(step, Tensor) else counter.key(*parts, step)
    rounded = torch.empty(x.shape, dtype=target.dtype, device=x.device) if out is None else out
    if isinstance(index, int) and x.is_cuda and HAS_TRITON and not torch.compiler.is_compiling():
        return _on_gpu(x, target, key, index, rounded)
    if isinstance(index, int) and x.device.type == "cpu":
        return _on_cpu(x, target, key, index, rounded)
    return rounded.copy_(formula(x, target, key, index))


def formula(x: Tensor, target: Format, key: int | Tensor, index: int | Tensor = 0) -> Tensor:
    """The rounding in torch operations: what the kernels compute, and what other devices and `torch.compile` on a GPU run."""
    if isinstance(index, int):
        index = index + torch.arange(x.numel(), device=x.device).view(x.shape)
    return _formula_bf16(x, key, index) if target.name == "bf16" else _cast(_formula_spacing(x, target, key, index), target)


def _formula_bf16(x: Tensor, key: int | Tensor, index: Tensor) -> Tensor:
    # bfloat16 is the upper half of float32: noise of 16 bits on the lower half carries with the probability wanted. Two neighbours
    # share one word of noise.
    noise = (counter.bits(key, index >> 1) >> ((index & 1) * 16).int()) & 0xFFFF
    word = x.view(torch.int32)
    size = word & 0x7FFFFFFF
    moved = (size + noise).clamp(max=LARGEST_BF16)
    kept = torch.where(size > INFINITY, size | QUIET, size)
    result = torch.where(size < INFINITY, moved, kept) | (word & -0x80000000)
    return (result >> 16).to(torch.int16).view(torch.bfloat16)


def _formula_spacing(x: Tensor, target: Format, key: int | Tensor, index: Tensor) -> Tensor:
    noise = ((counter.bits(key, index) >> 9) & 0x7FFFFF).float() * 2.0**-23 + 2.0**-24
    exponent = ((x.view(torch.int32) >> 23) & 0xFF) - target.mantissa
    spacing = exponent.clamp(target.finest + 127, target.coarsest + 127)
    steps = x.abs() * ((254 - spacing) << 23).view(torch.float32)
    whole = steps.floor()
    moved = (whole + (noise < steps - whole).float()) * (spacing << 23).view(torch.float32)
    return _saturate(torch.where(steps < WHOLE, torch.copysign(moved, x), x), x, target)


def _saturate(rounded: Tensor, x: Tensor, target: Format) -> Tensor:
    clamped = rounded.clamp(target.low, target.high)
    return clamped if target.saturates_infinity else torch.where(x.isinf(), x, clamped)


def _cast(rounded: Tensor, target: Format) -> Tensor:
    if target.name == "e4m3":  # it has no infinity; torch's cast hides one behind 448
        rounded = rounded.masked_fill(rounded.isinf(), torch.nan)
    return rounded.to(target.dtype)


def _target(format: str | tuple[int, int] | Format | None, grid: float | None) -> Format:
    if (format is None) == (grid is None):
        raise ConfigurationError(f"Give a format or a grid, one of the two; got format={format!r} and grid={grid!r}.")
    if grid is None:
        return as_format(format)  # pyright: ignore[reportArgumentType]
    if grid <= 0 or math.frexp(grid)[0] != 0.5 or not 2.0**-64 <= grid <= 2.0**64:
        raise ConfigurationError(f"grid must be a power of two between 2**-64 and 2**64, so that rounding is exact; got {grid!r}.")
    exponent = math.frexp(grid)[1] - 1
    return Format(f"grid 2**{exponent}", torch.float32, 0, exponent, exponent, -math.inf, math.inf)


def _on_cpu(x: Tensor, target: Format, key: int | Tensor, index: int, out: Tensor) -> Tensor:
    work = out if out.dtype == _work_dtype(target) and out.is_contiguous() else torch.empty(x.shape, dtype=_work_dtype(target))
    run = _operator if torch.compiler.is_compiling() else _numba
    run(x.contiguous(), key if isinstance(key, Tensor) else torch.tensor(key), index, target.name == "bf16", *_range(target), work)
    return out if work is out else out.copy_(_cast(work, target))


def _on_gpu(x: Tensor, target: Format, key: int | Tensor, index: int, out: Tensor) -> Tensor:
    from lightning_cnn.kernels import rounding_triton

    work = out if out.dtype == _work_dtype(target) and out.is_contiguous() else x.new_empty(x.shape, dtype=_work_dtype(target))
    rounding_triton.launch(x.contiguous(), key, index, target.name == "bf16", *_range(target), work)
    return out if work is out else out.copy_(_cast(work, target))


def _work_dtype(target: Format) -> torch.dtype:
    return torch.bfloat16 if target.name == "bf16" else torch.float32


def _range(target: Format) -> tuple[int, int, int, float, float, bool]:
    return target.mantissa, target.finest, target.coarsest, target.low, target.high, target.saturates_infinity


def _numba(
    x: Tensor,
    key: Tensor,
    index: int,
    bf16: bool,
    mantissa: int,
    finest: int,
    coarsest: int,
    low: float,
    high: float,
    saturates_infinity: bool,
    out: Tensor,
) -> None:
    if bf16:
        kernel.to_bf16(x.numpy().reshape(-1), int(key), index, out.view(torch.int16).numpy().reshape(-1), torch.get_num_threads())
    else:
        limits = (mantissa, finest, coarsest, low, high, saturates_infinity)
        kernel.to_spacing(x.numpy().reshape(-1), int(key), index, limits, out.numpy().reshape(-1), torch.get_num_threads())


# what torch.compile calls on a CPU, where it would vectorise the formula badly
_operator = torch.library.custom_op("lightning_cnn::round_stochastic", _numba, mutates_args=("out",), device_types="cpu")
