"""Rectangles of a picture replaced by something that says nothing."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from lightning_cnn.functional import counter
from lightning_cnn.functional.keyed_random import KeyedRandom


def erased_boxes(
    noise: KeyedRandom, n: int, size: tuple[int, int], area: Sequence[float], aspect: Sequence[float], p: float
) -> Int64[Tensor, "b 4"]:
    """A rectangle (top, left, bottom, right) a picture of `size` (height, width), empty with probability 1 - `p`.

    Its part of the picture is uniform in `area`, the logarithm of its height to width uniform in `aspect`; what is longer than the
    picture is cut to it, and the place is uniform among those where it fits.
    """
    with noise:
        draw = torch.rand(n, 5)
    part = area[0] + (area[1] - area[0]) * draw[:, 0]
    stretch = (aspect[0] * (aspect[1] / aspect[0]) ** draw[:, 1]).sqrt()
    whole = torch.tensor(size)
    side = (part * whole.prod()).sqrt()
    extent = torch.minimum(torch.stack([side * stretch, side / stretch], 1).round().clamp(min=1).long(), whole)
    corner = (draw[:, 2:4] * (whole - extent + 1)).floor().long()
    return torch.cat([corner, corner + extent], 1) * (draw[:, 4:] < p)


def erase(image: Shaped[Tensor, "b c h w"], boxes: Int64[Tensor, "b 4"], fill: Shaped[Tensor, "..."]) -> Shaped[Tensor, "b c h w"]:
    """`image` with the inside of each rectangle replaced by `fill`, which broadcasts. Source: Zhong et al. 2017, arXiv:1708.04896."""
    return torch.where(_inside(boxes, (image.shape[2], image.shape[3]))[:, None], fill, image)


def noise_inside(key: int, index: Int64[Tensor, " b"], boxes: Int64[Tensor, "b 4"], shape: Sequence[int]) -> Float[Tensor, "b c h w"]:
    """Uniform numbers inside the rectangles, a function of (key, sample, pixel, channel); zero outside, where none are drawn."""
    inside = _inside(boxes, shape[2:])[:, None].expand(shape).flatten(1)
    row, element = inside.nonzero(as_tuple=True)
    result = torch.zeros(inside.shape, device=boxes.device)
    result[row, element] = counter.uniform(key, (index[row] << 32) + element)
    return result.view(shape)


def _inside(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """(b h w): which pixels a rectangle holds."""
    down, across = (torch.arange(n, device=boxes.device) for n in size)
    top, left, bottom, right = (boxes[:, side, None] for side in range(4))
    rows, columns = (down >= top) & (down < bottom), (across >= left) & (across < right)
    return rows[:, :, None] & columns[:, None, :]
