"""Brown-Conrady lens distortion as a Kornia augmentation."""

from typing import Any

import torch
from torch import Tensor

from lightning_cnn.errors import raise_all
from lightning_cnn.nn._warped import Params, Warped


class RandomLensDistortion(Warped):
    """Bend pictures as a lens does: radially by k1 r^2 + k2 r^4 and tangentially by p1, p2, each drawn up to the given size.

    The unit of length is the picture's half diagonal. Masks, boxes (by their corners) and keypoints follow inside Kornia's containers.
    Source: Brown 1966, "Decentering distortion of lenses".
    """

    def __init__(self, *, radial: float = 0.1, tangential: float = 0.0, fill: str = "zeros", p: float = 1.0) -> None:
        raise_all(
            [f"radial + tangential is between 0 and 0.2, where the lens is invertible; got {radial} + {tangential}."]
            if min(radial, tangential) < 0 or radial + tangential > 0.2
            else []
        )
        super().__init__(p=p, fill=fill)
        self.radial, self.tangential = radial, tangential

    def generate_parameters(self, batch_shape: Any) -> Params:
        return {"u": torch.rand(batch_shape[0], 4)}

    def affine_of(self, params: Params) -> Tensor:
        return torch.eye(2, 3).expand(len(params["u"]), 2, 3)

    def lens_of(self, params: Params) -> Tensor:
        return (params["u"] * 2 - 1) * params["u"].new_tensor([self.radial, self.radial, self.tangential, self.tangential])

    def __repr__(self) -> str:
        return f"RandomLensDistortion(radial={self.radial}, tangential={self.tangential}, p={self.p})"
