"""Small pictures first: the size of a training picture as a function of progress."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


def size_at(progress: float, size: tuple[int, int], start: float, full_from: float, multiple_px: int) -> tuple[int, int]:
    """Edge lengths at `progress` in [0, 1]: `start` of `size` at first, growing linearly, whole from `full_from` on.

    Rounded to a multiple of `multiple_px`, never above `size`.

    >>> [size_at(progress, (224, 224), 0.5, 0.5, 32) for progress in (0.0, 0.25, 0.5)]
    [(128, 128), (160, 160), (224, 224)]
    """
    if progress >= full_from:
        return size
    scale = start + (1 - start) * progress / full_from
    height, width = (min(edge, max(1, round(edge * scale / multiple_px)) * multiple_px) for edge in size)
    return height, width


def resize(image: Shaped[Tensor, "b c h w"], size: tuple[int, int]) -> Shaped[Tensor, "b c H W"]:
    """Bilinear with antialiasing; type and memory format are kept, and an image of that size is returned as it is."""
    if tuple(image.shape[2:]) == size:
        return image
    result = F.interpolate(image.float(), size=size, mode="bilinear", antialias=True)
    result = result if image.is_floating_point() else result.round().clamp(0, 255)
    layout = torch.channels_last if image.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return result.to(image.dtype).contiguous(memory_format=layout)


def resize_mask(mask: Shaped[Tensor, "b ..."], size: tuple[int, int]) -> Shaped[Tensor, "b ..."]:
    """The nearest pixel's label; (b h w) or (b c h w) of any type."""
    maps = mask if mask.ndim == 4 else mask[:, None]
    rows, columns = (
        ((torch.arange(new, device=mask.device) + 0.5) * old / new).long() for new, old in zip(size, maps.shape[2:], strict=True)
    )
    result = maps[:, :, rows[:, None], columns]
    return result if mask.ndim == 4 else result[:, 0]


def resize_points(points: Float[Tensor, "b ... 2"], before: tuple[int, int], after: tuple[int, int]) -> Float[Tensor, "b ... 2"]:
    """Where pixel indices (x, y) land; a pixel's index is its centre, so the picture ends half a pixel further out."""
    scale = points.new_tensor([after[1] / before[1], after[0] / before[0]])
    return (points + 0.5) * scale - 0.5


def resize_annotation(value: Tensor, kind: str, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """A mask, boxes (b n 4; corners, or `bbox_xywh`), boxes as four corners (b n 4 2) or keypoints (b n 2) of resized pictures."""
    if kind == "mask":
        return resize_mask(value, after)
    points = value if value.is_floating_point() else value.float()
    if kind == "bbox_xywh":
        corner = resize_points(points[..., :2], before, after)
        result = torch.cat([corner, points[..., 2:] * points.new_tensor([after[1] / before[1], after[0] / before[0]])], -1)
    elif kind == "bbox_xyxy":
        result = resize_points(points.unflatten(-1, (2, 2)), before, after).flatten(-2)
    else:
        result = resize_points(points, before, after)
    return result if value.is_floating_point() else result.round().to(value.dtype)
