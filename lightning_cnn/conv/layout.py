"""Convolve in the other memory layout and come back.

Source: measured; see the card.
"""

from torch import Tensor

from lightning_cnn.conv._call import Call, nbytes, with_bias
from lightning_cnn.functional.conv import layout


def refuses(call: Call) -> str:
    return "" if max(call.x[1], call.weight[0]) > 1 else "a picture with one channel has one layout"


def workspace(call: Call) -> int:
    return nbytes(call.x, call.weight, call.y, dtype=call.dtype)


def compute(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if call.role == "forward":
        return with_bias(layout.forward(a, b, call.geometry), bias)
    if call.role == "input":
        return layout.input_gradient(a, b, call.size, call.geometry)
    return layout.weight_gradient(a, b, call.kernel, call.geometry)
