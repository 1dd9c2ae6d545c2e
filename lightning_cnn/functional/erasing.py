"""Rectangles of a picture replaced by something that says nothing."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

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
    down, across = (torch.arange(n, device=image.device) for n in image.shape[2:])
    top, left, bottom, right = (boxes[:, side, None] for side in range(4))
    rows, columns = (down >= top) & (down < bottom), (across >= left) & (across < right)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], fill, image)
