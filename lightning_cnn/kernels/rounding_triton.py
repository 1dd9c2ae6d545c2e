"""`lightning_cnn.functional.rounding` for a GPU, in Triton: the formula's bits in one pass over memory."""
# pyright: reportArgumentType=false
# (a launch takes Python numbers where the kernel says constexpr)

import torch
import triton
import triton.language as tl

from lightning_cnn.kernels.counter_triton import bits

BLOCK = 1024


def launch(
    x: torch.Tensor,
    key: int | torch.Tensor,
    index: int,
    bf16: bool,
    mantissa: int,
    finest: int,
    coarsest: int,
    low: float,
    high: float,
    saturates_infinity: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """Round contiguous float32 `x` into `out` (bfloat16, or float32 on the grid); x's first element is number `index`."""
    wide_key = key.to(x.device) if isinstance(key, torch.Tensor) else torch.tensor(key, device=x.device)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    if bf16:
        _to_bf16[grid](x.view(torch.int32), wide_key, index, out.view(torch.int16), x.numel(), BLOCK)
    else:
        limits = (mantissa, finest + 127, coarsest + 127, low, high, saturates_infinity)
        _to_spacing[grid](x, x.view(torch.int32), wide_key, index, out, x.numel(), *limits, BLOCK)
    return out


@triton.jit
def _to_bf16(words, key, index, out, n, block: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offset < n
    word = tl.load(words + offset, mask=inside, other=0).to(tl.uint32, bitcast=True)
    element = offset + index
    noise = (bits(tl.load(key), element >> 1) >> ((element & 1) * 16).to(tl.uint32)) & 0xFFFF
    size = word & 0x7FFFFFFF
    moved = tl.minimum(size + noise, 0x7F7FFFFF)
    kept = tl.where(size > 0x7F800000, size | 0x00400000, size)
    result = (tl.where(size < 0x7F800000, moved, kept) | (word & 0x80000000)) >> 16
    tl.store(out + offset, result.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)


@triton.jit
def _to_spacing(
    x, words, key, index, out, n, mantissa, finest, coarsest, low, high, saturates_infinity: tl.constexpr, block: tl.constexpr
):
    offset = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offset < n
    value, word = tl.load(x + offset, mask=inside, other=0.0), tl.load(words + offset, mask=inside, other=0)
    noise = (bits(tl.load(key), offset + index) >> 9).to(tl.float32) * 1.1920928955078125e-07 + 5.9604644775390625e-08
    spacing = tl.minimum(tl.maximum((word >> 23) & 0xFF, finest + mantissa) - mantissa, coarsest)
    unit = (spacing << 23).to(tl.float32, bitcast=True)
    steps = tl.abs(value) * ((254 - spacing) << 23).to(tl.float32, bitcast=True)
    whole = tl.floor(steps)
    moved = (whole + (noise < steps - whole).to(tl.float32)) * unit
    moved = tl.where(value < 0, -moved, moved)
    moved = tl.where(value == 0, value, moved)
    moved = tl.where(steps < 8388608.0, moved, value)
    clamped = tl.where(moved < low, low, tl.where(moved > high, high, moved))
    if not saturates_infinity:
        clamped = tl.where(tl.abs(value) == float("inf"), value, clamped)
    tl.store(out + offset, clamped, mask=inside)
