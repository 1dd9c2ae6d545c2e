"""`lightning_cnn.functional.counter.bits` for Triton kernels, bit for bit."""

import triton
import triton.language as tl


@triton.jit
def _mix32(value):
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def bits(key, index):
    """32 random bits an index (uint32) from a 63-bit `key` (int64) and `index` (int64)."""
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    key_low, key_high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    return _mix32(_mix32(low + key_low) ^ (high * 0x9E3779B9 + key_high))


@triton.jit
def uniform(key, index):
    """Float32 in [0, 1), a multiple of 2**-24, for each index."""
    return (bits(key, index) >> 8).to(tl.float32) * 5.9604644775390625e-08
