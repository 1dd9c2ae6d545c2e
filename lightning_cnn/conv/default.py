"""The convolution torch ships: always a candidate, and what everything falls back to.

Source: `torch.nn.functional.conv2d`.
"""

import torch
from torch import Tensor

from lightning_cnn.conv._call import Call
from lightning_cnn.functional.conv import default


def refuses(call: Call) -> str:
    return ""


def workspace(call: Call) -> int:
    return 0


def compute(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if call.role == "forward":
        stride, padding, dilation, groups = call.geometry
        return torch.nn.functional.conv2d(a, b, bias, stride, padding, dilation, groups)
    if call.role == "input":
        return default.input_gradient(a, b, call.size, call.geometry)
    return default.weight_gradient(a, b, call.kernel, call.geometry)
