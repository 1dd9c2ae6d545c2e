"""What a geometric augmentation of ours is to Kornia: pictures, masks, boxes and keypoints follow one map, with or without a lens."""

from typing import Any

import torch
from kornia.augmentation import GeometricAugmentationBase2D
from kornia.geometry.boxes import Boxes
from kornia.geometry.keypoints import Keypoints
from torch import Tensor

from lightning_cnn.functional import warp

Params = dict[str, Tensor]


class Warped(GeometricAugmentationBase2D):
    """Subclasses draw plain numbers in `generate_parameters`, and say in `affine_of` and `lens_of` which map they mean.

    `functional.warp` describes both. Only the draws are made where the noise is keyed, because every operation costs more there.
    """

    draws_first = True  # nothing is drawn while the picture is made: only the parameters need the noise
    _compute_matrix_lazily = True

    def __init__(self, *, p: float, size: tuple[int, int] | None = None, fill: str = "zeros") -> None:
        super().__init__(p=p)
        self.flags = {"size": size, "fill": fill}

    def forward_parameters(self, batch_shape: Any) -> Params:
        if self.p < 1:
            return super().forward_parameters(batch_shape)
        # As Kornia's, without the operations that find out that every sample is to be augmented
        always = {"batch_prob": torch.ones(batch_shape[0]), "forward_input_shape": torch.tensor(tuple(batch_shape))}
        return {**self.generate_parameters(batch_shape), **always}

    def affine_of(self, params: Params) -> Tensor:
        """The affine maps (b 2 3) of `params`."""
        raise NotImplementedError

    def lens_of(self, params: Params) -> Tensor | None:
        """The lenses (b 4) of `params`, if this augmentation has any."""
        return None

    def compute_transformation(self, input: Tensor, params: Params, flags: dict[str, Any]) -> Tensor:
        """The affine part as a matrix from input to output pixel indices; points that pass a lens are mapped by `map_points`."""
        size_in, size_out = self._sizes(params)
        affine = self.affine_of(params).to(input.device, torch.float32)
        last = affine.new_tensor([0.0, 0.0, 1.0]).expand(len(affine), 1, 3)
        back = torch.linalg.inv(torch.cat([affine, last], 1))
        return (_translation(affine, size_out, 1) @ back @ _translation(affine, size_in, -1)).to(input.dtype)

    def apply_transform(self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None) -> Tensor:
        return warp.resample(input, self._grid(input, params), fill=flags["fill"])

    def apply_transform_mask(self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None) -> Tensor:
        return warp.resample(input, self._grid(input, params), mode="nearest")

    def apply_transform_keypoint(
        self, input: Keypoints, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Keypoints:
        moved = input.clone()
        moved._data = self._moved(input.data, params)
        return moved

    def apply_transform_box(self, input: Boxes, params: Params, flags: dict[str, Any], transform: Tensor | None = None) -> Boxes:
        moved = input.clone()
        moved._data = self._moved(input.data.flatten(1, 2), params).view_as(input.data)
        return moved

    def inverse_transform(
        self, input: Tensor, flags: dict[str, Any], transform: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} loses what leaves the frame and has no inverse for pictures.")

    def _grid(self, input: Tensor, params: Params) -> Tensor:
        return warp.sampling_grid(self.affine_of(params).to(input), *self._sizes(params), _to(self.lens_of(params), input))

    def _moved(self, points: Tensor, params: Params) -> Tensor:
        return warp.map_points(points, self.affine_of(params).to(points), *self._sizes(params), _to(self.lens_of(params), points))

    def _sizes(self, params: Params) -> tuple[tuple[int, int], tuple[int, int]]:
        height, width = params["forward_input_shape"].tolist()[-2:]
        return (height, width), self.flags["size"] or (height, width)


def _to(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.to(like)


def _translation(like: Tensor, size: tuple[int, int], sign: int) -> Tensor:
    matrix = torch.eye(3, dtype=like.dtype, device=like.device)
    matrix[0, 2], matrix[1, 2] = sign * (size[1] - 1) / 2, sign * (size[0] - 1) / 2
    return matrix
