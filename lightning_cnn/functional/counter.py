"""Counter-based random numbers: noise is a function of a key and an index, not the state of a generator.

`bits(key, index)` is the same number whoever asks, in whatever order, on whatever device; so results do not depend on workers, ranks
or batch size, and a resumed run needs no generator state. `lightning_cnn.kernels.counter` holds the same function for numpy, numba
and Triton; they agree bit for bit.

The mixer is two rounds of a 32-bit bijection with low bias, each keyed by one half of a 64-bit key.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (the idea); C. Wellons 2018, hash-prospector `lowbias32`
(the 32-bit mixer); Steele et al. 2014, SplitMix64 (the key schedule).
"""

from hashlib import blake2b

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
GOLDEN64, GOLDEN32 = 0x9E3779B97F4A7C15, 0x9E3779B9
MULTIPLY_1, MULTIPLY_2 = 0x7FEB352D, 0x846CA68B


def key(seed: int, *parts: int | str) -> int:
    """A 63-bit key for one stream of noise: `key(seed, "order", epoch)`.

    Words name the stream and integers say which step, epoch or sample; a different list of parts is an unrelated key. `key_at` does
    the same for a step held in a tensor.

    >>> key(0, "order", 1) == key(0, "order", 1), key(0, "order", 1) == key(0, "order", 2)
    (True, False)
    """
    return _state(seed, *parts) >> 1


def key_at(seed: int, *parts: int | str, step: Tensor) -> Tensor:
    """`key(seed, *parts, step)` for an int64 tensor of steps, traced by `torch.compile` once and not once a step."""
    state = _state(seed, *parts)
    mixed = _mix64_tensor((state - (1 << 64) if state >> 63 else state) ^ _mix64_tensor(step + (GOLDEN64 - (1 << 64))))
    return (mixed >> 1) & (M64 >> 1)


def bits(key: int | Tensor, index: Tensor) -> Tensor:
    """32 random bits an index, as int32 of the broadcast shape of `key` and `index`.

    `key` is an integer of `key()`, or an int64 tensor of such integers (under `torch.compile` a tensor, so that a new step is not a new
    program). `index` is int32 or int64; all 64 bits count.
    """
    if isinstance(key, int) and _is_plain(index):
        return _compiled_bits(key, index)
    low, high = _halves(index)
    key_low, key_high = (_signed(key & M32), _signed(key >> 32)) if isinstance(key, int) else _halves(key)
    mixed = _mix32(low + key_low)
    return _mix32(mixed ^ (high * _signed(GOLDEN32) + key_high))


def uniform(key: int | Tensor, index: Tensor) -> Tensor:
    """Float32 in [0, 1), a multiple of 2**-24, for each index."""
    return ((bits(key, index) >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def normal(key: int | Tensor, index: Tensor) -> Tensor:
    """Standard normal float32 for each index (Box-Muller on 24-bit uniforms: |value| <= 5.77)."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(key, index)))
    return radius * torch.cos(2.0 * torch.pi * uniform(_derived(key), index))


def permutation(key: int, n: int) -> Tensor:
    """A random order of `range(n)` as int64; ties of the 62-bit sort keys keep their index order, on every device."""
    index = torch.arange(n)
    high, low = bits(key, index).to(torch.int64), bits(_derived(key), index).to(torch.int64)
    return torch.argsort(((high & 0x7FFFFFFF) << 31) | (low & 0x7FFFFFFF), stable=True)


def _is_plain(index: Tensor) -> bool:
    """Whether numbers on the CPU are wanted now, and not a graph, a batch of vmap or what some mode makes of the operations."""
    return (
        index.device.type == "cpu"
        and index.dtype == torch.int64
        and not torch.compiler.is_compiling()
        and type(index) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(index)  # pyright: ignore[reportAttributeAccessIssue]
        and not is_in_torch_dispatch_mode()
    )


def _compiled_bits(key: int, index: Tensor) -> Tensor:
    """One pass, where the torch operations are twenty."""
    from lightning_cnn.kernels.counter import fill_bits

    out = torch.empty(index.shape, dtype=torch.int32)
    fill_bits(key, index.detach().contiguous().view(-1).numpy(), out.view(-1).numpy())
    return out


def _derived(key: int | Tensor) -> int | Tensor:
    return key ^ 0x5851F42D4C957F2D


@torch.compiler.assume_constant_result
def _state(seed: int, *parts: int | str) -> int:
    state = _mix64(seed & M64)
    for part in parts:
        word = int.from_bytes(blake2b(part.encode(), digest_size=8).digest(), "little") if isinstance(part, str) else part & M64
        state = _mix64(state ^ _mix64((word + GOLDEN64) & M64))
    return state


def _mix64_tensor(value: Tensor) -> Tensor:
    # int64 multiplication wraps; the masks turn its arithmetic shifts into logical ones.
    value = (value ^ ((value >> 30) & (M64 >> 30))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    value = (value ^ ((value >> 27) & (M64 >> 27))) * (0x94D049BB133111EB - (1 << 64))
    return value ^ ((value >> 31) & (M64 >> 31))


def _mix64(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & M64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & M64
    return value ^ (value >> 31)


def _mix32(value: Tensor) -> Tensor:
    # int32 multiplication wraps; the masks turn its arithmetic shifts into logical ones.
    value = (value ^ ((value >> 16) & 0xFFFF)) * _signed(MULTIPLY_1)
    value = (value ^ ((value >> 15) & 0x1FFFF)) * _signed(MULTIPLY_2)
    return value ^ ((value >> 16) & 0xFFFF)


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    # Going through the sign-extended low half keeps the conversion in range, where it is defined on every device.
    if value.dtype == torch.int32:
        return value, value >> 31
    low = ((value & M32) ^ 0x80000000) - 0x80000000
    return low.to(torch.int32), (value >> 32).to(torch.int32)


def _signed(value: int) -> int:
    return value - (1 << 32) if value & 0x80000000 else value
