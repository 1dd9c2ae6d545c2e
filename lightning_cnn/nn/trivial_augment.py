"""TrivialAugment: one operation a picture, at a random strength."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kornia.augmentation import IntensityAugmentationBase2D
from kornia.enhance import equalize
from torch import Tensor

from lightning_cnn.functional import colour, warp
from lightning_cnn.nn._warped import Params

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOURS = ("brightness", "contrast", "saturation")
POINTWISE = ("sharpness", "posterize", "solarize", "autocontrast", "equalize")
OPERATIONS = ("identity", *GEOMETRIC, *COLOURS, *POINTWISE)


class TrivialAugment(IntensityAugmentationBase2D):
    """One of 14 operations for each picture, all equally likely, at a strength drawn uniformly: no knobs.

    The wide search space of the paper: shear to 0.99, translation to 32 px, rotation to 135 degrees, factors from 0.01 to 1.99,
    posterize to 2 bits. The geometric and colour operations of a batch are done together, in one resampling and one matrix.

    Source: Mueller & Hutter 2021, "TrivialAugment", arXiv:2103.10158, table 1. It departs in interpolating bilinearly.
    """

    draws_first = True

    def __init__(self, *, p: float = 1.0) -> None:
        super().__init__(p=p)

    def generate_parameters(self, batch_shape: Any) -> Params:
        u = torch.rand(batch_shape[0], 3)
        # 31 strengths, as in the paper; the sign for the operations that have two directions.
        return {
            "operation": (u[:, 0] * len(OPERATIONS)).long(),
            "strength": (u[:, 1] * 31).floor() / 30,
            "sign": 1 - 2 * (u[:, 2] < 0.5).float(),
        }

    def apply_transform(self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None) -> Tensor:
        chosen = {name: params["operation"] == place for place, name in enumerate(OPERATIONS)}
        signed = params["strength"] * params["sign"]
        output = input.clone()
        _replace(output, _any(chosen, GEOMETRIC), lambda x, rows: _moved(x, {n: (signed * chosen[n])[rows] for n in GEOMETRIC}))
        factors = {name: 1 + 0.99 * signed * chosen[name] for name in COLOURS}
        _replace(output, _any(chosen, COLOURS), lambda x, rows: _coloured(x, {n: f[rows] for n, f in factors.items()}))
        for name, operation in _POINTWISE.items():
            values = signed if name == "sharpness" else params["strength"]
            _replace(output, chosen[name], lambda x, rows, f=operation, v=values: f(x, v[rows].to(x).view(-1, 1, 1, 1)))
        return output


def _any(chosen: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return torch.stack([chosen[name] for name in names]).any(0)


def _replace(images: Tensor, which: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    rows = which.nonzero().squeeze(1)
    if len(rows):
        images[rows.to(images.device)] = operation(images[rows.to(images.device)], rows).to(images.dtype)


def _moved(x: Tensor, by: dict[str, Tensor]) -> Tensor:
    size, b = (x.shape[2], x.shape[3]), len(x)
    affine = warp.affine_map(
        size_in=size,
        size_out=size,
        mirror=torch.ones(b, 2),
        angle=by["rotate"] * math.radians(135),
        scale=torch.ones(b, 2),
        shear=torch.stack([by["shear_x"], by["shear_y"]], -1) * 0.99,
        shift=torch.stack([by["translate_x"], by["translate_y"]], -1) * 32,
        window=torch.tensor([0.0, 0.0, size[1], size[0]]).expand(b, 4),
    )
    return warp.resample(x, warp.sampling_grid(affine.to(x), size, size))


def _coloured(x: Tensor, factors: dict[str, Tensor]) -> Tensor:
    if x.shape[1] == 1:
        factors = {**factors, "saturation": torch.ones_like(factors["saturation"])}
    gain, pivot = (part.to(x) for part in colour.colour_gain(**factors, hue=torch.zeros_like(factors["contrast"])))
    mapped = colour.colour_map(gain, pivot, torch.zeros_like(pivot), x.mean((2, 3)).expand(-1, 3))
    return colour.apply_colour(x.expand(-1, 3, -1, -1), mapped).clamp(0, 1)[:, : x.shape[1]]


def _sharpened(x: Tensor, strength: Tensor) -> Tensor:
    kernel = x.new_tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]).div(13).expand(x.shape[1], 1, 3, 3)
    smooth = F.pad(F.conv2d(x, kernel, groups=x.shape[1]), (1, 1, 1, 1))
    inside = F.pad(torch.ones_like(x[:, :, 1:-1, 1:-1]), (1, 1, 1, 1)).bool()
    return torch.where(inside, x + 0.99 * strength * (x - smooth), x).clamp(0, 1)


def _posterized(x: Tensor, strength: Tensor) -> Tensor:
    step = 2.0 ** (strength * 6).round()  # from 8 bits down to 2
    return ((x * 255).round() / step).floor() * step / 255


def _solarized(x: Tensor, strength: Tensor) -> Tensor:
    return torch.where(x >= 1 - strength, 1 - x, x)


def _stretched(x: Tensor, strength: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-12), x)


_POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sharpness": _sharpened,
    "posterize": _posterized,
    "solarize": _solarized,
    "autocontrast": _stretched,
    "equalize": lambda x, strength: equalize(x.float()),
}
