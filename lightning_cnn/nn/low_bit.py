"""Convolutions and linear layers that compute with few bits while their float weights go on learning.

`lower` swaps the class of a layer, so parameters, keys, optimizers and hooks stay what they were. The scale multiplies the output, not
the weights: sums of +-1 are then exact in float32, and bit-packed inference can reproduce them bit for bit.
"""

import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cnn.functional.binary import (
    binarize,
    filter_scale,
    initial_step,
    lsq,
    lsq_range,
    ternarize,
    ternary_scale,
    ternary_threshold,
)

log = logging.getLogger(__name__)

STEPS = ("weight_step", "input_step")
# LSQ starts from 2 E|x| / sqrt(high); E|x| of a normalised activation is sqrt(2 / pi). A constant, because a step measured on the
# first batch would differ between ranks.
NORMAL_MEAN_SIZE = 0.7979


@dataclass(frozen=True)
class BitWidths:
    """What a layer computes with: bits of its weights and inputs (1 sign, 2 ternary, 3-8 learned step, None float)."""

    weights: int | None = 1
    activations: int | None = 1
    scale: bool = True
    slope: str = "clip"
    signed: bool = True

    def __str__(self) -> str:
        return "".join(f"{letter}{bits or 32}" for letter, bits in (("W", self.weights), ("A", self.activations)))


class _LowBit(nn.Module):
    """What the low-bit convolution and linear layer share."""

    weight: Tensor
    bias: Any
    bits: BitWidths
    input_seen: bool = False

    def quantized_input(self, x: Tensor) -> Tensor:
        """`x` in the format of the layer's inputs."""
        bits = self.bits
        if bits.activations is None:
            return x
        if bits.activations <= 2:
            self._look_at(x)
            return binarize(x, bits.slope) if bits.activations == 1 else ternarize(x, slope=bits.slope)
        return lsq(x, self.input_step, bits.activations, bits.signed)  # pyright: ignore[reportArgumentType]

    def quantized_weight(self) -> tuple[Tensor, Tensor | None]:
        """The weights in their format, and the scale of each filter's output (None for 1)."""
        bits, weight = self.bits, self.weight
        if bits.weights is None:
            return weight, None
        if bits.weights == 1:
            return binarize(weight, bits.slope), filter_scale(weight.detach()) if bits.scale else None
        if bits.weights == 2:
            threshold = ternary_threshold(weight.detach()).view(-1, *[1] * (weight.dim() - 1))
            return ternarize(weight, threshold, bits.slope), ternary_scale(weight.detach()) if bits.scale else None
        return lsq(weight, self.weight_step, bits.weights), None  # pyright: ignore[reportArgumentType]

    def scaled(self, y: Tensor, scale: Tensor | None, channel_last: bool) -> Tensor:
        """`y * scale + bias`, a channel."""
        shape = (-1,) if channel_last else (-1, 1, 1)
        y = y if scale is None else y * scale.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)

    def _look_at(self, x: Tensor) -> None:
        # One look at the first training batch: signs of what a ReLU lets through carry nothing, and the network would learn nothing.
        if self.training and not self.input_seen and not torch.compiler.is_compiling():
            self.input_seen = True
            if x.numel() and bool((x >= 0).all()):
                warnings.warn(
                    f"A {type(self).__name__} with {self.bits} sees no negative input: its signs are all +1 and carry nothing. "
                    "Normalise before it and take away the activation function that clips (F.relu, sigmoid).",
                    stacklevel=3,
                )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.bits}"


class LowBitConv2d(_LowBit, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A Conv2d that computes with `bits`."""

    def forward(self, input: Tensor) -> Tensor:
        weight, scale = self.quantized_weight()
        return self.scaled(self._conv_forward(self.quantized_input(input), weight, None), scale, channel_last=False)


class LowBitLinear(_LowBit, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A Linear that computes with `bits`."""

    def forward(self, input: Tensor) -> Tensor:
        weight, scale = self.quantized_weight()
        return self.scaled(nn.functional.linear(self.quantized_input(input), weight), scale, channel_last=True)


LOWERED: dict[type[nn.Module], type[_LowBit]] = {nn.Conv2d: LowBitConv2d, nn.Linear: LowBitLinear}


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers that `lower` can treat or has treated, by name, in order of registration."""
    kinds = (*LOWERED, *LOWERED.values())
    return {name: module for name, module in model.named_modules() if type(module) in kinds}


def lower(layer: nn.Module, bits: BitWidths) -> None:
    """Make `layer` compute with `bits`, in place; doing it twice changes nothing."""
    if type(layer) in LOWERED:
        layer.__class__ = LOWERED[type(layer)]
        _add_steps(layer, bits)
    layer.bits = bits  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def drop_relus(modules: Iterable[nn.Module]) -> int:
    """Turn every nn.ReLU into an identity, in place; returns how many there were."""
    found = [module for module in modules if type(module) is nn.ReLU]
    for module in found:
        module.__class__ = nn.Identity  # pyright: ignore[reportAttributeAccessIssue]
    return len(found)


def _add_steps(layer: Any, bits: BitWidths) -> None:
    weight = layer.weight
    for name, width, signed in zip(STEPS, (bits.weights, bits.activations), (True, bits.signed), strict=True):
        if width is not None and width > 2:
            size = weight.detach().abs().mean() if name == "weight_step" else NORMAL_MEAN_SIZE
            step = initial_step(size, lsq_range(width, signed)[1])
            layer.register_parameter(name, nn.Parameter(torch.as_tensor(step, dtype=weight.dtype, device=weight.device).clone()))
    if any(hasattr(layer, name) for name in STEPS):
        layer.register_state_dict_post_hook(_hide_steps)
        layer.register_load_state_dict_pre_hook(_keep_steps)


def _hide_steps(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in STEPS:
        state.pop(prefix + name, None)


def _keep_steps(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in STEPS:
        if hasattr(layer, name):
            state.setdefault(prefix + name, getattr(layer, name).detach())
