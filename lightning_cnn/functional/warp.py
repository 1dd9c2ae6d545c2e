"""One resampling for a whole chain of geometric noise: the affine steps are one matrix, the lens is a few more columns of it.

Coordinates are pixels from the centre of the picture, x to the right and y down. A map says for a pixel of the *output* where in the
*input* its colour is found, so a chain of maps is composed in reverse and the picture is read once.

Source: Brown 1966, "Decentering distortion of lenses", and Conrady 1919, for the lens.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " b"]


def affine_map(
    *,
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    mirror: Float[Tensor, "b 2"],
    angle: Vector,
    scale: Float[Tensor, "b 2"],
    shear: Float[Tensor, "b 2"],
    shift: Float[Tensor, "b 2"],
    window: Float[Tensor, "b 4"],
) -> Float[Tensor, "b 2 3"]:
    """Cut out `window`, mirror, scale, shear, rotate, shift: where each output pixel is found in the input.

    Args:
        size_in, size_out: height and width.
        mirror: -1 to mirror x or y, else 1.
        angle: clockwise on the screen, in radians.
        scale: of x and y; above one things grow.
        shear: x moves by shear_x * y, y by shear_y * x.
        shift: in output pixels.
        window: centre (x, y) and size (w, h) of the part that fills the output, in pixels of the input from its centre.
    """
    cos, sin = angle.cos(), angle.sin()
    rotate = torch.stack([cos, sin, -sin, cos], -1).view(-1, 2, 2)
    unshear = torch.stack([torch.ones_like(angle), -shear[:, 0], -shear[:, 1], torch.ones_like(angle)], -1).view(-1, 2, 2)
    unshear = unshear / (1 - shear.prod(-1)).view(-1, 1, 1)
    zoom = window[:, 2:] / window.new_tensor([size_out[1], size_out[0]])
    linear = (zoom * mirror / scale)[:, :, None] * (unshear @ rotate)
    offset = window[:, :2] - (linear @ shift[:, :, None]).squeeze(-1)
    return torch.cat([linear, offset[:, :, None]], -1)


def sampling_grid(
    affine: Float[Tensor, "b 2 3"], size_in: tuple[int, int], size_out: tuple[int, int], lens: Float[Tensor, "b 4"] | None = None
) -> Float[Tensor, "b h w 2"]:
    """The grid for `F.grid_sample(..., align_corners=False)`: the lens, then the affine map, as one matrix product.

    `lens` is (k1, k2, p1, p2) with the half diagonal of the output as the unit of length. The distorted position is linear in the
    coefficients over ten fixed polynomials of the position, so a lens costs seven columns more.
    """
    to_unit = affine.new_tensor([2 / size_in[1], 2 / size_in[0]]).view(1, 2, 1)
    coefficients = position_terms(affine, size_out, lens) * to_unit
    return (_polynomials(size_out, lens is not None, affine) @ coefficients.transpose(1, 2)).view(-1, *size_out, 2)


def position_terms(
    affine: Float[Tensor, "b 2 3"], size_out: tuple[int, int], lens: Float[Tensor, "b 4"] | None = None
) -> Float[Tensor, "b 2 n"]:
    """The position in the input over 1, x, y and, with a lens, x r2, y r2, x r4, y r4, x2, xy, y2 of the position in the output."""
    if lens is None:
        return affine[:, :, [2, 0, 1]]
    bent = affine[:, :, :2] @ _lens_coefficients(lens, _half_diagonal(size_out))
    return torch.cat([affine[:, :, 2:] + bent[:, :, :1], bent[:, :, 1:]], -1)


def resample(
    image: Float[Tensor, "b c h w"], grid: Float[Tensor, "b h2 w2 2"], *, fill: str = "zeros", mode: str = "bilinear"
) -> Float[Tensor, "b c h2 w2"]:
    """Read `image` at `grid`; outside it is zero, its `border`, or its `reflection`."""
    return F.grid_sample(image, grid, mode=mode, padding_mode=fill, align_corners=False)


def distort(points: Float[Tensor, "b n 2"], lens: Float[Tensor, "b 4"]) -> Float[Tensor, "b n 2"]:
    """Where a lens images points, in units of the half diagonal:

        x (1 + k1 r^2 + k2 r^4) + 2 p1 x y + p2 (r^2 + 2 x^2),    and the same for y with p1 and p2 exchanged.

    >>> distort(torch.tensor([[[0.6, 0.8]]]), torch.tensor([[0.1, 0.0, 0.0, 0.0]]))
    tensor([[[0.6600, 0.8800]]])
    """
    k1, k2, p1, p2 = (lens[:, i, None] for i in range(4))
    x, y = points.unbind(-1)
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + k2 * r2)
    return torch.stack([x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y], -1)


def undistort(points: Float[Tensor, "b n 2"], lens: Float[Tensor, "b 4"], rounds: int = 30) -> Float[Tensor, "b n 2"]:
    """The inverse of `distort` by fixed-point iteration; each round shrinks the error by about |3 k1 r^2 + 5 k2 r^4| + 6 |p|."""
    guess = points
    for _ in range(rounds):
        guess = guess + points - distort(guess, lens)
    return guess


def map_points(
    points: Float[Tensor, "b n 2"],
    affine: Float[Tensor, "b 2 3"],
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    lens: Float[Tensor, "b 4"] | None = None,
) -> Float[Tensor, "b n 2"]:
    """Where points of the input, in pixel indices (x, y), land in the output: the inverse of the map of `sampling_grid`."""
    centred = points - points.new_tensor([(size_in[1] - 1) / 2, (size_in[0] - 1) / 2])
    found = torch.linalg.solve(affine[:, :, :2], (centred - affine[:, None, :, 2]).transpose(1, 2)).transpose(1, 2)
    if lens is not None:
        unit = _half_diagonal(size_out)
        found = undistort(found / unit, lens) * unit
    return found + points.new_tensor([(size_out[1] - 1) / 2, (size_out[0] - 1) / 2])


def _half_diagonal(size: tuple[int, int]) -> float:
    return math.hypot(*size) / 2


def _polynomials(size: tuple[int, int], with_lens: bool, like: Tensor) -> Tensor:
    y, x = (torch.arange(n, device=like.device, dtype=like.dtype) - (n - 1) / 2 for n in size)
    x, y = x.expand(size).flatten(), y[:, None].expand(size).flatten()
    terms = [torch.ones_like(x), x, y]
    if with_lens:
        r2 = x * x + y * y
        terms += [x * r2, y * r2, x * r2 * r2, y * r2 * r2, x * x, x * y, y * y]
    return torch.stack(terms, -1)


def _lens_coefficients(lens: Tensor, unit: float) -> Tensor:
    """(b 2 10): a lens in pixels over the polynomials 1, x, y, x r2, y r2, x r4, y r4, x2, xy, y2."""
    k1, k2, p1, p2 = (lens / lens.new_tensor([unit**2, unit**4, unit, unit])).unbind(-1)
    o, one = torch.zeros_like(k1), torch.ones_like(k1)
    in_x = [o, one, o, k1, o, k2, o, 3 * p2, 2 * p1, p2]
    in_y = [o, o, one, o, k1, o, k2, p1, 2 * p2, 3 * p1]
    return torch.stack([torch.stack(in_x, -1), torch.stack(in_y, -1)], 1)
