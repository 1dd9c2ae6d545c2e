"""What this device can do at best, as measured: a large matrix product, a large copy, and the smallest operation there is.

Source: Williams et al. 2009, "Roofline".
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

SECONDS = 0.05  # for each of the three


@dataclass(frozen=True)
class Roofline:
    flops_per_s: float
    bytes_per_s: float
    operation_s: float  # of an operation on one element, forward or backward

    def attainable_s(self, flops: int, moved_bytes: int) -> float:
        """The least time for `flops` operations on `moved_bytes` read and written once.

        >>> Roofline(flops_per_s=100.0, bytes_per_s=10.0, operation_s=0.0).attainable_s(200, 10)
        2.0
        """
        return max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)

    def bound(self, flops: int, moved_bytes: int) -> str:
        """What sets that time: 'compute' right of the roof's ridge, 'memory' left of it."""
        return "compute" if flops / self.flops_per_s > moved_bytes / self.bytes_per_s else "memory"


def roofline(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Roofline:
    """Measured once for each device, type and number of threads; takes about a fifth of a second."""
    return _measured(torch.device(device), dtype, torch.get_num_threads())


def bf16_units(device: torch.device) -> bool:
    """Whether bfloat16 products have hardware here; without, they are emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_has("avx512_bf16", "amx_tile")


def fp16_units(device: torch.device) -> bool:
    """Whether float16 products have hardware here: all GPUs that torch supports do, few CPUs."""
    return device.type == "cuda" or (device.type == "cpu" and _cpu_has("amx_fp16"))


def _cpu_has(*units: str) -> bool:
    return any(getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)() for unit in units)


@cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Roofline:
    size = 4096 if device.type == "cuda" else 512
    noise = torch.Generator(device).manual_seed(0)  # nobody's random state moves
    a = torch.rand(size, size, device=device, generator=noise).to(dtype)
    block = torch.empty(2**28 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    to = torch.empty_like(block)
    one = torch.ones(1, device=device, requires_grad=True)
    with torch.inference_mode():
        flops = 2 * size**3 / _fastest(lambda: a @ a, device)
        moved = 2 * block.numel() / _fastest(lambda: to.copy_(block), device)
    with torch.enable_grad():
        return Roofline(flops, moved, _fastest(lambda: _chain(one), device) / 64)


def _chain(x: torch.Tensor) -> None:
    y = x
    for _ in range(32):
        y = y * 1.0
    torch.autograd.grad(y, x)


def _fastest(function: Callable[[], object], device: torch.device) -> float:
    """The fastest call of those that fit into `SECONDS`, three at least."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)
