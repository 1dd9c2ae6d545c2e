"""From the draws of a sample to its map and its colours: `FusedAugmentation.affine_of`, `lens_of` and `colour_of`, compiled.

A hundred small tensors a batch would cost more than a batch of small pictures.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit


class Knobs(NamedTuple):
    """The sizes of the noise, angles in radians, ranges of ratios and stretching as logarithms."""

    flip: float
    flip_vertical: float
    crop: bool
    area_low: float
    area_high: float
    ratio_low: float
    ratio_high: float
    pad_crop_px: float
    scale_low: float
    scale_high: float
    stretch: float
    rotate: float
    shear: float
    translate: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    lens: float
    lens_tangential: float


YIQ = np.array(((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)))
FROM_YIQ = np.linalg.inv(YIQ)


@njit(cache=True, nogil=True, error_model="numpy")
def position(u, knobs, height, width, out_height, out_width, terms):
    """Fill `terms` (2 10): where in the input, in pixel indices, an output pixel is found, over the polynomials of `functional.warp`."""
    mirror_x, mirror_y = -1.0 if u[0] < knobs.flip else 1.0, -1.0 if u[1] < knobs.flip_vertical else 1.0
    x, y, w, h = _window(u, knobs, height, width)
    spread, stretch = _between(u[6], knobs.scale_low, knobs.scale_high), math.exp(_either(u[7]) * knobs.stretch / 2)
    zoom_x = w / out_width * mirror_x / (spread * stretch)
    zoom_y = h / out_height * mirror_y / (spread / stretch)
    cos, sin = math.cos(_either(u[8]) * knobs.rotate), math.sin(_either(u[8]) * knobs.rotate)
    shear_x, shear_y = math.tan(_either(u[9]) * knobs.shear), math.tan(_either(u[10]) * knobs.shear)
    shrink = 1 / (1 - shear_x * shear_y)
    xx, xy = zoom_x * shrink * (cos + shear_x * sin), zoom_x * shrink * (sin - shear_x * cos)
    yx, yy = zoom_y * shrink * (-shear_y * cos - sin), zoom_y * shrink * (cos - shear_y * sin)
    whole = 2 * knobs.pad_crop_px + 1
    shift_x = _either(u[11]) * knobs.translate * out_width + math.floor(u[4] * whole) - knobs.pad_crop_px
    shift_y = _either(u[12]) * knobs.translate * out_height + math.floor(u[5] * whole) - knobs.pad_crop_px
    terms[0, 0] = x - xx * shift_x - xy * shift_y + (width - 1) / 2
    terms[1, 0] = y - yx * shift_x - yy * shift_y + (height - 1) / 2
    unit = math.hypot(out_height, out_width) / 2
    k1, k2 = _either(u[17]) * knobs.lens / unit**2, _either(u[18]) * knobs.lens / unit**4
    p1, p2 = _either(u[19]) * knobs.lens_tangential / unit, _either(u[20]) * knobs.lens_tangential / unit
    for row, (a, b) in enumerate(((xx, xy), (yx, yy))):
        terms[row, 1], terms[row, 2] = a, b
        terms[row, 3], terms[row, 4], terms[row, 5], terms[row, 6] = a * k1, b * k1, a * k2, b * k2
        terms[row, 7], terms[row, 8], terms[row, 9] = a * 3 * p2 + b * p1, 2 * (a * p1 + b * p2), a * p2 + 3 * b * p1


@njit(cache=True, nogil=True, error_model="numpy")
def _window(u, knobs, height, width):
    """Centre and size of the part of the input that fills the output."""
    if not knobs.crop:
        return 0.0, 0.0, float(width), float(height)
    area = _between(u[2], knobs.area_low, knobs.area_high) * height * width
    ratio = math.exp(_between(u[3], knobs.ratio_low, knobs.ratio_high))
    w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    return (u[4] - 0.5) * (width - w), (u[5] - 0.5) * (height - h), w, h


@njit(cache=True, nogil=True, error_model="numpy")
def colour(u, knobs, gain, pivot):
    """Fill `gain` (3 3) and `pivot` (3): brightness, contrast, saturation and hue as `functional.colour` describes them."""
    brightness, contrast = 1 + _either(u[13]) * knobs.brightness, 1 + _either(u[14]) * knobs.contrast
    saturation, angle = 1 + _either(u[15]) * knobs.saturation, _either(u[16]) * knobs.hue
    cos, sin = math.cos(angle), math.sin(angle)
    for row in range(3):
        pivot[row] = 0
        # this row of FROM_YIQ @ rotation @ YIQ, then mixed with the grey of the picture by the saturation
        i, q = FROM_YIQ[row, 1] * cos + FROM_YIQ[row, 2] * sin, FROM_YIQ[row, 2] * cos - FROM_YIQ[row, 1] * sin
        turned = FROM_YIQ[row, 0] * YIQ[0] + i * YIQ[1] + q * YIQ[2]
        total = turned[0] + turned[1] + turned[2]
        for column in range(3):
            tint = saturation * turned[column] + (1 - saturation) * total * YIQ[0, column]
            gain[row, column] = tint * brightness * contrast
            pivot[row] += tint * (1 - contrast) * brightness


@njit(cache=True, nogil=True, inline="always")
def _either(u):
    return 2 * float(u) - 1


@njit(cache=True, nogil=True, inline="always")
def _between(u, low, high):
    return low + float(u) * (high - low)
