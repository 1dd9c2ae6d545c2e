"""What `winograd2` and `winograd4` share: the numba kernel for float32 on the CPU, the torch reference for everything else."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cnn.conv._call import Call, nbytes, with_bias
from lightning_cnn.conv._transformed import transformed
from lightning_cnn.functional.conv import winograd
from lightning_cnn.functional.conv.geometry import gradient_as_forward

LANES, COLUMNS, ROWS = 8, 16, 6
SMALL, LARGE = 24, 96  # tiles a block while the filters stay in cache, and where they must be read from memory
GRADIENT = 128  # tiles a block of the filters' gradient: it is read and written once a block


def refuses(call: Call, m: int) -> str:
    if call.kernel != (3, 3):
        return f"needs 3x3 kernels, this one is {call.kernel[0]}x{call.kernel[1]}"
    if call.geometry.stride != (1, 1) or call.geometry.dilation != (1, 1):
        return "needs stride 1 and dilation 1"
    if call.geometry.groups != 1:
        return "needs one group"
    if call.dtype not in (torch.float32, torch.float64):
        return f"its transforms lose half precision ({call.dtype}); keep it for float32"
    return ""


def workspace(call: Call, m: int) -> int:
    call = call.as_forward() if call.role == "input" else call
    b, _, high, wide = call.y
    k, c = call.weight[:2]
    tiles = b * -(-high // m) * -(-wide // m)
    frequencies, copies = (m + 2) ** 2, nbytes(call.x, call.y, dtype=call.dtype) * (not call.channels_last)
    if not _in_numba(call):
        return nbytes((2 * frequencies, tiles, c + k), (frequencies, c, k), dtype=call.dtype)
    if call.role == "weight":
        return copies + nbytes((frequencies, min(tiles, GRADIENT), c + k), dtype=call.dtype)
    block, splits = _blocking(tiles, c, k, call.threads)
    return copies + nbytes((call.threads, frequencies, block, c + k // splits), (frequencies, c, k), dtype=call.dtype)


def compute(call: Call, a: Tensor, b: Tensor, bias: Tensor | None, m: int) -> Tensor:
    if call.role == "weight":
        return _weight_gradient(call, a, b, m) if _in_numba(call) else winograd.weight_gradient(a, b, call.kernel, call.geometry, m)
    if call.role == "input":
        g, mirrored, geometry = gradient_as_forward(a, b, call.geometry)
        return _forward(call, g, mirrored, geometry.padding, None, m, transform_packed(mirrored, m) if _in_numba(call) else None)
    if _in_numba(call):
        U = transformed(b, ("winograd", m), lambda: transform_packed(b, m), call.keep)
        return _forward(call, a, b, call.geometry.padding, bias, m, U)
    U = transformed(b, ("winograd reference", m), lambda: winograd.transform(b, m), call.keep)
    return with_bias(winograd.forward(a, b, call.geometry, m, U), bias)


def transform_packed(weight: Tensor, m: int) -> Tensor:
    """U as the kernel reads it: (frequencies, panels of 16 filters, channels rounded up to 8, 16)."""
    k, c = weight.shape[:2]
    filled = F.pad(winograd.transform(weight.detach(), m).flatten(0, 1), (0, -k % COLUMNS, 0, -c % LANES))
    return filled.unflatten(2, (-1, COLUMNS)).transpose(1, 2).contiguous()


def _forward(call: Call, x: Tensor, weight: Tensor, padding, bias: Tensor | None, m: int, U: Tensor | None) -> Tensor:
    if U is None:
        return winograd.forward(x, weight, call.geometry._replace(padding=padding), m)
    from lightning_cnn.kernels import threads
    from lightning_cnn.kernels.winograd import winograd as kernel

    pixels = _filled(x.permute(0, 2, 3, 1), LANES).contiguous()
    k, (top, left) = weight.shape[0], padding
    y = torch.empty(x.shape[0], x.shape[2] + 2 * top - 2, x.shape[3] + 2 * left - 2, k)
    offset = torch.zeros(U.shape[1] * COLUMNS) if bias is None else _filled(bias.detach(), COLUMNS)
    workers = threads.use(call.threads)
    block, splits = _blocking(y.shape[0] * -(-y.shape[1] // m) * -(-y.shape[2] // m), x.shape[1], k, workers)
    kernel(pixels.numpy(), U.numpy(), offset.numpy(), y.numpy(), m, top, left, workers, block, splits)
    return y.permute(0, 3, 1, 2)


def _weight_gradient(call: Call, x: Tensor, g: Tensor, m: int) -> Tensor:
    from lightning_cnn.kernels import threads
    from lightning_cnn.kernels.winograd import winograd_weight as kernel

    tiles = g.shape[0] * -(-g.shape[2] // m) * -(-g.shape[3] // m)
    gw = torch.empty(call.weight, memory_format=torch.channels_last if call.channels_last else torch.contiguous_format)
    pixels, gradient = (_filled(of.permute(0, 2, 3, 1), to).contiguous() for of, to in ((x, COLUMNS), (g, LANES)))
    workers = threads.use(call.threads)
    kernel(pixels.numpy(), gradient.numpy(), gw.numpy(), m, *call.geometry.padding, workers, min(tiles, GRADIENT))
    return gw


def _filled(x: Tensor, multiple: int) -> Tensor:
    """Zeros behind the last axis up to a multiple; nothing is copied where there is none."""
    return F.pad(x, (0, -x.shape[-1] % multiple)) if x.shape[-1] % multiple else x


def _in_numba(call: Call) -> bool:
    return call.device == "cpu" and call.dtype == torch.float32


def _blocking(tiles: int, c: int, k: int, workers: int) -> tuple[int, int]:
    """Tiles a block, and parts of the filters: few tiles are shared out by filters, which also reads each filter only once."""
    block = SMALL if c * k <= 256 * 256 else LARGE
    block = min(block, -(-tiles // ROWS) * ROWS)
    return block, workers if tiles < workers * block and k >= workers * COLUMNS else 1
