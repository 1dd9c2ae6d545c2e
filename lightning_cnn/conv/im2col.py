"""Write out the pixels under each position of the filter, then multiply matrices.

Source: Chellapilla et al. 2006; CS231n 2016, lecture 11.
"""

from torch import Tensor

from lightning_cnn.conv._call import Call, nbytes, with_bias
from lightning_cnn.functional.conv import im2col


def refuses(call: Call) -> str:
    return ""


def workspace(call: Call) -> int:
    # Every pixel once a tap; the weight's gradient also holds one gradient a picture until they are summed.
    columns = (call.x[0], call.x[1], *call.kernel, *call.y[2:])
    per_picture = (call.x[0], *call.weight) if call.role == "weight" else (0,)
    return nbytes(columns, per_picture, dtype=call.dtype)


def compute(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if call.role == "forward":
        return with_bias(im2col.forward(a, b, call.geometry), bias)
    if call.role == "input":
        return im2col.input_gradient(a, b, call.size, call.geometry)
    return im2col.weight_gradient(a, b, call.kernel, call.geometry)
