"""Pictures mixed in pairs, and their labels with them: MixUp and CutMix."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from lightning_cnn.functional.keyed_random import KeyedRandom


def partners(noise: KeyedRandom, index: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """The row each row is mixed with: a ring through all rows in an order that the set of samples decides, so nobody meets himself."""
    with noise:
        order = torch.rand(len(index)).argsort(stable=True)
    result = torch.empty_like(order)
    result[order] = order.roll(-1)
    return result


def mix_weights(noise: KeyedRandom, n: int, alpha: float, p: float) -> Float[Tensor, " b"]:
    """The share each picture keeps: Beta(alpha, alpha) with probability `p`, else one."""
    with noise:
        share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample((n,))
        mixed = torch.rand(n) < p
    return torch.where(mixed, share, torch.ones(()))


def mixup(image: Float[Tensor, "b c h w"], partner: Int64[Tensor, " b"], share: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """`share * x + (1 - share) * x[partner]`. Source: Zhang et al. 2018, "mixup", arXiv:1710.09412."""
    return torch.lerp(image[partner], image, share.to(image).view(-1, 1, 1, 1))


def cutmix(
    image: Float[Tensor, "b c h w"], partner: Int64[Tensor, " b"], share: Float[Tensor, " b"], centre: Float[Tensor, "b 2"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
    """A rectangle of about `1 - share` of the area is taken from the partner; also the share of pixels really kept.

    `centre` (x, y) in [0, 1]; the rectangle is cut at the edge. Source: Yun et al. 2019, "CutMix", arXiv:1905.04899.
    """
    size = image.new_tensor([image.shape[3], image.shape[2]])
    half = (size * (1 - share.to(image))[:, None].sqrt() / 2).round()
    middle = (centre.to(image) * size).floor()
    low, high = (middle - half).clamp(min=0), torch.minimum(middle + half, size)
    x, y = (torch.arange(n, device=image.device, dtype=image.dtype) for n in (image.shape[3], image.shape[2]))
    across = (x >= low[:, :1]) & (x < high[:, :1])
    down = (y >= low[:, 1:]) & (y < high[:, 1:])
    inside = (down[:, :, None] & across[:, None, :])[:, None]
    return torch.where(inside, image[partner], image), 1 - inside.float().mean((1, 2, 3))


def mix_labels(
    label: Shaped[Tensor, "b ..."], partner: Int64[Tensor, " b"], share: Float[Tensor, " b"], classes: int
) -> Float[Tensor, "b k"]:
    """Probabilities (b k): `share` for the picture's own class and the rest for its partner's; classes may be soft already."""
    soft = F.one_hot(label.long(), classes).float() if label.ndim == 1 else label.float()
    return torch.lerp(soft[partner], soft, share.to(soft)[:, None])
