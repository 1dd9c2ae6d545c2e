"""Multiply the spectra of whole pictures.

Source: Mathieu, Henaff & LeCun 2013, arXiv:1312.5851.
"""

from torch import Tensor

from lightning_cnn.conv import _spectra
from lightning_cnn.conv._call import Call, with_bias
from lightning_cnn.conv._spectra import contract
from lightning_cnn.conv._transformed import transformed
from lightning_cnn.functional.conv import fft


def refuses(call: Call) -> str:
    return ""


def workspace(call: Call) -> int:
    return _spectra.workspace(call, call.x[0] * (call.x[1] + call.weight[0]), fft.transform_size(call.size, call.kernel, call.geometry))


def compute(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if call.role == "weight":
        return fft.weight_gradient(a, b, call.kernel, call.geometry, contract)
    kind = ("fft", fft.transform_size(call.size, call.kernel, call.geometry), call.geometry.dilation)
    W = transformed(b, kind, lambda: fft.transform(b, call.size, call.geometry), call.keep)
    if call.role == "input":
        return fft.input_gradient(a, b, call.size, call.geometry, W, contract)
    return with_bias(fft.forward(a, b, call.geometry, W, contract), bias)
