"""AlexNet's colour noise as a Kornia augmentation."""

from collections.abc import Sequence
from typing import Any

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional import colour
from lightning_cnn.nn._warped import Params


class RandomPCALighting(IntensityAugmentationBase2D):
    """Add to every pixel of a picture one colour, drawn along the principal components of natural colours.

    Args:
        std: Standard deviation of the coefficients; AlexNet takes 0.1.
        values, vectors: The components' standard deviations, and unit vectors as columns; ImageNet's when not given, and those of your
            pictures from `functional.colour.colour_components(images)`.

    Source: Krizhevsky et al. 2012, section 4.1. It departs in clamping the result to [0, 1].
    """

    draws_first = True

    def __init__(
        self,
        *,
        std: float = 0.1,
        values: Sequence[float] | Tensor = colour.IMAGENET_VALUES,
        vectors: Sequence[Sequence[float]] | Tensor = colour.IMAGENET_VECTORS,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.std = std
        self.values, self.vectors = (torch.as_tensor(given, dtype=torch.float32) for given in (values, vectors))
        if self.values.shape != (3,) or self.vectors.shape != (3, 3):
            shapes = tuple(self.values.shape), tuple(self.vectors.shape)
            raise ConfigurationError(f"RandomPCALighting needs 3 values and 3 x 3 vectors; got the shapes {shapes[0]} and {shapes[1]}.")

    def generate_parameters(self, batch_shape: Any) -> Params:
        return {"alpha": torch.randn(batch_shape[0], 3) * self.std}

    def apply_transform(self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None) -> Tensor:
        light = colour.lighting(params["alpha"].to(input), self.values.to(input), self.vectors.to(input))
        return (input + light[:, :, None, None]).clamp(0, 1)
