"""Small pictures first: the size of a training picture as a function of progress."""

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
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
