"""Multiply the spectra of whole pictures.

Source: Mathieu, Henaff & LeCun 2013, arXiv:1312.5851.
"""

import torch
from torch import Tensor

from lightning_cnn.conv._call import Call, nbytes, with_bias
from lightning_cnn.conv._spectra import contract
from lightning_cnn.conv._transformed import transformed
from lightning_cnn.functional.conv import fft


def refuses(call: Call) -> str:
    return ""


def workspace(call: Call) -> int:
    high, wide = fft.transform_size(call.size, call.geometry)
    planes = call.x[0] * call.x[1] + call.weight[0] * call.weight[1] + call.x[0] * call.weight[0]
    double = torch.float64 if call.dtype == torch.float64 else torch.float32
    return nbytes((planes, high, wide // 2 + 1, 2), (planes, high, wide), dtype=double)


def compute(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if call.role == "weight":
        return fft.weight_gradient(a, b, call.kernel, call.geometry, contract)
    kind = ("fft", fft.transform_size(call.size, call.geometry), call.geometry.dilation)
    W = transformed(b, kind, lambda: fft.transform(b, call.size, call.geometry), call.keep)
    if call.role == "input":
        return fft.input_gradient(a, b, call.size, call.geometry, W, contract)
    return with_bias(fft.forward(a, b, call.geometry, W, contract), bias)
