"""1-bit layers with their weights packed 32 to 1.

A packed layer takes floats or words (64 signs an int64) and gives floats or words; it equals its `LowBit` original bit for bit. Its
sums are integers, so a batch norm and the sign after it are a threshold, found by evaluating that norm's own arithmetic on the sums.
CPU alone.

Source: Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279; Umuroglu et al. 2017, FINN, arXiv:1612.07119 (thresholds).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.functional.observed import observed
from lightning_cnn.kernels import xnor
from lightning_cnn.kernels.bits import FIRST, LAST, WORDS, Geometry, thresholds
from lightning_cnn.kernels.norm_pool import norm_pool as pool_by_address
from lightning_cnn.nn.low_bit import LowBitConv2d, LowBitLinear


def _xnor_conv2d(x: Tensor, panel: Tensor, finish: Tensor, filters: int, geometry: Sequence[int], to_words: bool) -> Tensor:
    # Little Python: between large layers its own memory is out of the cache, and a line costs ten times what it does in a loop.
    _check(finish, torch.int32 if to_words else torch.float32)
    if x.dtype == torch.int64:
        x, layout = x.contiguous(), WORDS
        n, h, w, _ = x.shape
    else:
        x = x if x.dtype == torch.float32 else x.float()
        n, _, h, w = x.shape
        layout = LAST if x.is_contiguous(memory_format=torch.channels_last) else FIRST
        x = x if layout == LAST else x.contiguous()
    _, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w = geometry
    rows = (h + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    columns = (w + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    if to_words:
        out = torch.empty((n, rows, columns, -(-filters // 64)), dtype=torch.int64)
    else:
        out = torch.empty((n, rows, columns, filters), dtype=torch.float32)
    addresses = panel.data_ptr(), finish.data_ptr(), out.data_ptr()
    xnor.convolve(x.data_ptr(), layout, (n, h, w), *addresses, filters, to_words, geometry, torch.get_num_threads())
    return out if to_words else out.permute(0, 3, 1, 2)


def unobserved(x: Tensor) -> bool:
    """Whether `x` is plain memory, and neither a transform nor anybody else must be shown an operator.

    Raises UnsupportedLayerError where a gradient is being recorded: it would be lost at the first word of bits.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedLayerError("A packed network is for inference and passes no gradient on: give it inputs that require none.")
    return type(x) is Tensor and not observed() and peek_interpreter_stack() is None


def _check(coefficients: Tensor, dtype: torch.dtype) -> None:
    if coefficients.dtype != dtype:
        raise UnsupportedLayerError(
            f"A packed layer computes in float32, got its coefficients in {coefficients.dtype}: leave the packed model's dtype as it is."
        )


# As an operator of the library itself: `torch.library.custom_op` takes 6 us a call more.
_LIBRARY = torch.library.Library("lightning_cnn", "FRAGMENT")
_LIBRARY.define("xnor_conv2d(Tensor x, Tensor panel, Tensor finish, int filters, int[] geometry, bool to_words) -> Tensor")
_LIBRARY.impl("xnor_conv2d", _xnor_conv2d, "CPU")
xnor_conv2d = torch.ops.lightning_cnn.xnor_conv2d.default
"""Convolve signs: `x` floats (n, c, h, w) or words (n, h, w, c / 64); the result likewise, floats channels_last."""


@torch.library.register_fake("lightning_cnn::xnor_conv2d", lib=_LIBRARY)
def _(x: Tensor, panel: Tensor, finish: Tensor, filters: int, geometry: list[int], to_words: bool) -> Tensor:
    size = x.shape[:3] if x.dtype == torch.int64 else (x.shape[0], *x.shape[2:])
    shape = (size[0], *Geometry(*geometry).output_size(*size[1:]), -(-filters // 64) if to_words else filters)
    out = x.new_empty(shape, dtype=torch.int64 if to_words else torch.float32)
    return out if to_words else out.permute(0, 3, 1, 2)


def _norm_pool2d(x: Tensor, affine: Tensor, window: list[int]) -> Tensor:
    _check(affine, torch.float32)
    x = x.float().contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    out = torch.empty((n, c, *_pooled(h, w, window)), memory_format=torch.channels_last)
    pool_by_address(x.data_ptr(), (n, h, w, c), affine.data_ptr(), out.data_ptr(), window, torch.get_num_threads())
    return out


def _pooled(height: int, width: int, window: list[int]) -> tuple[int, int]:
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w = window
    return (height + 2 * padding_h - kernel_h) // stride_h + 1, (width + 2 * padding_w - kernel_w) // stride_w + 1


_LIBRARY.define("norm_pool2d(Tensor x, Tensor affine, int[] window) -> Tensor")
_LIBRARY.impl("norm_pool2d", _norm_pool2d, "CPU")
norm_pool2d = torch.ops.lightning_cnn.norm_pool2d.default
"""Max pool of `x * gain + offset`, `affine` (2, c), over a window (kernel, stride, padding, each by height and width)."""


@torch.library.register_fake("lightning_cnn::norm_pool2d", lib=_LIBRARY)
def _(x: Tensor, affine: Tensor, window: list[int]) -> Tensor:
    n, c, h, w = x.shape
    return torch.empty((n, c, *_pooled(h, w, window)), device=x.device, memory_format=torch.channels_last)


class _Packed(nn.Module):
    """Weights as bits, and what turns an integer sum into the layer's output."""

    weight_bits: Tensor
    affine: Tensor
    threshold: Tensor
    flip: Tensor
    panel: Tensor
    finish: Tensor

    def __init__(self, layer: LowBitConv2d | LowBitLinear, geometry: Geometry, norm: nn.Module | None, to_words: bool) -> None:
        super().__init__()
        self.geometry, self.filters, self.to_words, self.folded = geometry, len(layer.weight), to_words, norm is not None
        negative = (layer.weight.detach().flatten(1) < 0).cpu().numpy()
        affine = _affine(layer, norm)
        threshold, flip = _threshold(affine, math.prod(geometry[:3]))
        empty = torch.empty(0)
        self.register_buffer("weight_bits", torch.from_numpy(np.packbits(negative, axis=1, bitorder="little")))
        self.register_buffer("affine", empty if to_words else affine, persistent=not to_words)
        self.register_buffer("threshold", threshold if to_words else empty.int(), persistent=to_words)
        self.register_buffer("flip", flip if to_words else empty.bool(), persistent=to_words)
        self.register_buffer("panel", empty, persistent=False)
        self.register_buffer("finish", empty, persistent=False)
        self.register_load_state_dict_post_hook(_lay_out)
        _lay_out(self)

    def multiply(self, x: Tensor) -> Tensor:
        """`xnor_conv2d` with this layer's buffers."""
        buffers: dict[str, Any] = self._buffers  # an attribute of a module is a function call
        run = _xnor_conv2d if unobserved(x) else xnor_conv2d  # an operator takes 10 us a call more than its function
        return run(x, buffers["panel"], buffers["finish"], self.filters, self.geometry, self.to_words)

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.geometry[:3]))
        return f"{shape} -> {self.filters}, {'words' if self.to_words else 'floats'}{', norm folded' if self.folded else ''}"


class PackedConv2d(_Packed):
    """A `LowBitConv2d` with 1-bit weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)


class PackedLinear(_Packed):
    """A `LowBitLinear` with 1-bit weights and inputs: a convolution along the batch."""

    def forward(self, x: Tensor) -> Tensor:
        if self.folded and x.dim() != 2:
            raise UnsupportedLayerError(
                f"A batch norm folded into PackedLinear needs inputs of 2 axes, got {tuple(x.shape)}: pack without it."
            )
        rows = x.reshape(1, 1, -1, x.shape[-1])
        y = self.multiply(rows if x.dtype == torch.int64 else rows.permute(0, 3, 1, 2))
        return (y if self.to_words else y.permute(0, 2, 3, 1)).reshape(*x.shape[:-1], -1)


class NormMaxPool2d(nn.Module):
    """A batch norm and the max pool behind it in one pass, equal to the two bit for bit; the output is channels_last."""

    affine: Tensor

    def __init__(self, norm: nn.BatchNorm2d, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.register_buffer("affine", torch.stack(_gain_and_offset(norm)).contiguous())
        stride = pool.kernel_size if pool.stride is None else pool.stride
        self.window = [*_pair(pool.kernel_size), *_pair(stride), *_pair(pool.padding)]

    def forward(self, x: Tensor) -> Tensor:
        return norm_pool2d(x, self.affine, self.window)

    def extra_repr(self) -> str:
        return f"{len(self.affine[0])}, kernel, stride, padding {self.window[::2]}, norm folded"


def geometry_of(layer: nn.Module) -> Geometry | None:
    """The shape of a layer that can be packed, or None."""
    bits = getattr(layer, "bits", None)
    if bits is None or (bits.weights, bits.activations) != (1, 1):
        return None
    geometry = Geometry(layer.in_features, 1, 1) if isinstance(layer, LowBitLinear) else _convolution(layer)
    return (
        geometry if geometry and 4 * -(-geometry.channels // 4) * geometry.kernel_h * geometry.kernel_w <= xnor.MAX_PRODUCTS else None
    )


def _convolution(layer: Any) -> Geometry | None:
    padding = layer.padding
    if padding == "valid":
        padding = (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    if layer.groups != 1 or layer.padding_mode != "zeros" or padding is None:
        return None
    return Geometry(layer.in_channels, *layer.kernel_size, *layer.stride, *padding, *layer.dilation)


def _affine(layer: LowBitConv2d | LowBitLinear, norm: Any) -> Tensor:
    """Scale and bias of the layer, gain and offset of the norm, (4, filters), rounded as PyTorch's own batch norm rounds them."""
    filters = len(layer.weight)
    scale = layer.quantized_weight()[1]
    one, zero = torch.ones(filters), torch.zeros(filters)
    rows = [one if scale is None else scale, zero if layer.bias is None else layer.bias, one, zero]
    if norm is not None:
        rows[2:] = _gain_and_offset(norm)
    return torch.stack([row.detach().float().cpu() for row in rows]).contiguous()


def _gain_and_offset(norm: Any) -> tuple[Tensor, Tensor]:
    """Gain and offset of a batch norm at inference, rounded as PyTorch rounds them."""
    # numpy divides and takes roots to the last bit; the norm of zeros is its offset, however PyTorch rounds that.
    variance: Tensor = norm.running_var
    inverse = torch.from_numpy(1 / np.sqrt(variance.cpu().numpy() + np.float32(norm.eps)))
    shape = (1, len(inverse)) if isinstance(norm, nn.BatchNorm1d) else (1, len(inverse), 1, 1)
    with torch.no_grad():
        offset = norm(torch.zeros(shape, device=variance.device)).flatten()
    return (inverse if norm.weight is None else inverse * norm.weight.detach().cpu()), offset.cpu()


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else value


def _threshold(affine: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """`sign(affine(dot)) < 0` is `(dot < threshold) != flip` for every dot from -products to products.

    Each rounding is monotone, so the sign changes at most once; bisection finds where, in the very arithmetic of the float model.
    """

    def below_zero(dot: Tensor) -> Tensor:
        scaled = (dot.float() * affine[0] + affine[1]).double()  # a product of float32 is exact in float64, as inside an FMA
        return (scaled * affine[2].double() + affine[3].double()).float() < 0

    low = torch.full((affine.shape[1],), -products)
    start, high = below_zero(low), low + 2 * products + 1
    while (low + 1 < high).any():
        middle = (low + high) // 2
        same = below_zero(middle) == start
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return high.int(), ~start


def _lay_out(module: nn.Module, _: Any = None) -> None:
    """Lay weights and thresholds out for the kernel of this processor; after loading, too."""
    layer: Any = module
    channels, *taps = layer.geometry[:3]
    bits = np.unpackbits(layer.weight_bits.numpy(), axis=1, count=channels * math.prod(taps), bitorder="little")
    panel = xnor.panels(bits.reshape(layer.filters, channels, *taps).astype(bool), layer.geometry.dilation_w)
    # A torch allocation is 64-byte aligned, a numpy array is not, and a vector load across two cache lines costs two.
    layer.panel = torch.from_numpy(panel if panel.dtype == np.uint8 else panel.view(np.int64)).clone(
        memory_format=torch.contiguous_format
    )
    layer.finish = torch.from_numpy(thresholds(layer.threshold.numpy(), layer.flip.numpy())) if layer.to_words else layer.affine
