"""Multiply the spectra of small overlapping tiles.

Source: Highlander & Rodriguez 2016, arXiv:1601.06815.
"""

from torch import Tensor

from lightning_cnn.conv import _spectra
from lightning_cnn.conv._call import Call, with_bias
from lightning_cnn.conv._spectra import contract
from lightning_cnn.conv._transformed import transformed
from lightning_cnn.functional.conv import fft_tiled
from lightning_cnn.functional.conv.geometry import gradient_as_forward, span, tile_size


def refuses(call: Call) -> str:
    return "" if call.geometry.stride == (1, 1) else "needs stride 1"


def workspace(call: Call) -> int:
    if call.role == "input":
        return workspace(call.as_forward())
    reach, tile = span(call.kernel, call.geometry.dilation), _tile(call)
    tiles = -(-call.y[2] // (tile - reach[0] + 1)) * -(-call.y[3] // (tile - reach[1] + 1))
    return _spectra.workspace(call, call.x[0] * (call.x[1] + call.weight[0]) * tiles, (tile, tile))


def compute(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if call.role == "weight":
        return fft_tiled.weight_gradient(a, b, call.kernel, call.geometry, _tile(call), contract)
    if call.role == "input":
        forward = call.as_forward()
        g, mirrored, geometry = gradient_as_forward(a, b, call.geometry)
        return fft_tiled.forward(g, mirrored, geometry, fft_tiled.transform(mirrored, _tile(forward), geometry), contract)
    tile = _tile(call)
    W = transformed(b, ("fft_tiled", tile, call.geometry.dilation), lambda: fft_tiled.transform(b, tile, call.geometry), call.keep)
    return with_bias(fft_tiled.forward(a, b, call.geometry, W, contract), bias)


def _tile(call: Call) -> int:
    planes = (call.x[0], call.weight[1], call.weight[0])
    return tile_size((call.y[2], call.y[3]), span(call.kernel, call.geometry.dilation), planes, call.keep and call.role == "forward")
