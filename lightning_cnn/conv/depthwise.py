"""One filter a channel, eight channels a vector register.

Source: Zhang et al. 2018, arXiv:1809.10170 (direct convolution without workspace).
"""

import torch
from torch import Tensor

from lightning_cnn.conv._call import Call, nbytes, with_bias
from lightning_cnn.functional.conv import depthwise
from lightning_cnn.functional.conv.geometry import Geometry, gradient_as_forward, span

LANES = 8


def refuses(call: Call) -> str:
    if not call.depthwise:
        return "needs one filter a channel (groups = channels)"
    return "needs stride 1 for the input's gradient" if call.role == "input" and call.geometry.stride != (1, 1) else ""


def workspace(call: Call) -> int:
    if not _in_numba(call):
        taps = call.kernel[0] * call.kernel[1]
        return taps * nbytes(call.y, dtype=call.dtype)
    # A thread holds eight channels of one padded picture and of one gradient.
    high, wide = (call.size[i] + span(call.kernel, call.geometry.dilation)[i] + LANES for i in (0, 1))
    return 2 * call.threads * nbytes((high, wide, LANES), dtype=call.dtype)


def compute(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if not _in_numba(call):
        return _reference(call, a, b, bias)
    if call.role == "forward":
        return _forward(call, a, b, bias, call.geometry)
    if call.role == "input":
        g, mirrored, geometry = gradient_as_forward(a, b, call.geometry)
        return _forward(call, g, mirrored, None, geometry)
    return _weight_gradient(call, a, b)


def _reference(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if call.role == "forward":
        return with_bias(depthwise.forward(a, b, call.geometry), bias)
    if call.role == "input":
        return depthwise.input_gradient(a, b, call.size, call.geometry)
    return depthwise.weight_gradient(a, b, call.kernel, call.geometry)


def _forward(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    from lightning_cnn.kernels import threads
    from lightning_cnn.kernels.depthwise import depthwise as kernel

    shape = call.y if call.role == "forward" else call.x
    y = torch.empty(shape, memory_format=torch.channels_last if call.channels_last else torch.contiguous_format)
    offset = torch.zeros(weight.shape[0]) if bias is None else bias.detach().contiguous()
    arrays = (x.numpy(), weight.detach().contiguous().numpy(), offset.numpy(), y.numpy())
    kernel(*arrays, *geometry.padding, *geometry.stride, *geometry.dilation, threads.use(call.threads))
    return y


def _weight_gradient(call: Call, x: Tensor, g: Tensor) -> Tensor:
    from lightning_cnn.kernels import threads
    from lightning_cnn.kernels.depthwise import depthwise_weight as kernel

    stride, padding, dilation, _ = call.geometry
    gw = torch.empty(call.weight)
    kernel(x.numpy(), g.numpy(), gw.numpy(), *padding, *stride, *dilation, threads.use(call.threads))
    return gw


def _in_numba(call: Call) -> bool:
    return call.device == "cpu" and call.dtype == torch.float32
