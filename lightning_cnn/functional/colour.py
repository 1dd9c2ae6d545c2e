"""One matrix for a whole chain of colour noise: brightness, contrast, saturation, hue and lighting are each affine in (r, g, b).

Source: Krizhevsky et al. 2012, section 4.1, for the lighting noise along the principal components of the colours.
"""

import torch
from jaxtyping import Float
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in torchvision and Kornia
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
# Principal components of ImageNet's colours in [0, 1], as published with AlexNet: standard deviations, and unit vectors as columns.
IMAGENET_VALUES = (0.2175, 0.0188, 0.0045)
IMAGENET_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

Vector = Float[Tensor, " b"]


def colour_gain(
    *, brightness: Vector, contrast: Vector, saturation: Vector, hue: Vector
) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 3"]]:
    """Brightness, contrast, saturation and hue as `gain @ colour + pivot * mean grey of the picture`.

    Factors of one and an angle of zero change nothing. Hue is a rotation in YIQ by `hue` radians, which keeps luma and is linear,
    unlike the HSV rotation of Kornia and torchvision.
    """
    grey, yiq = brightness.new_tensor(GREY), brightness.new_tensor(YIQ)
    eye = torch.eye(3, device=grey.device, dtype=grey.dtype)
    s = saturation.view(-1, 1, 1)
    tint = torch.linalg.inv(yiq) @ _rotation(hue) @ yiq @ (s * eye + (1 - s) * grey.expand(3, 3))
    return tint * (brightness * contrast).view(-1, 1, 1), tint.sum(-1) * ((1 - contrast) * brightness)[:, None]


def colour_map(
    gain: Float[Tensor, "b 3 3"], pivot: Float[Tensor, "b 3"], light: Float[Tensor, "b 3"], means: Float[Tensor, "b 3"]
) -> Float[Tensor, "b 3 4"]:
    """The colour steps of `colour_gain` on pictures of mean colour `means`, and then `light` added: matrix and offset."""
    offset = pivot * (means @ means.new_tensor(GREY))[:, None] + light
    return torch.cat([gain, offset[:, :, None]], -1)


def apply_colour(image: Float[Tensor, "b c h w"], colour: Float[Tensor, "b k d"]) -> Float[Tensor, "b k h w"]:
    """`matrix @ colour + offset` at every pixel, for a map (b k c+1)."""
    flat = torch.baddbmm(colour[:, :, -1:], colour[:, :, :-1], image.flatten(2))
    return flat.view(image.shape[0], -1, *image.shape[2:])


def lighting(alpha: Float[Tensor, "b 3"], values: Float[Tensor, " 3"], vectors: Float[Tensor, "3 3"]) -> Float[Tensor, "b 3"]:
    """The colour to add for coefficients `alpha` of the principal components: sum_i alpha_i values_i vectors_i."""
    return (alpha * values) @ vectors.T


def colour_components(images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, " 3"], Float[Tensor, "3 3"]]:
    """Standard deviations and unit vectors (columns) of the principal components of the pixels' colours, largest first."""
    pixels = images.movedim(1, -1).reshape(-1, 3).double()
    values, vectors = torch.linalg.eigh(torch.cov(pixels.T))
    return values.clamp(min=0).sqrt().flip(0).to(images.dtype), vectors.flip(1).to(images.dtype)


def _rotation(angle: Tensor) -> Tensor:
    cos, sin, o, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([one, o, o, o, cos, -sin, o, sin, cos], -1).view(-1, 3, 3)
