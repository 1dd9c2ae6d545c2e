"""Convolve 3x3, stride 1, with 2.25x (F(2x2, 3x3)) or 4x (F(4x4, 3x3)) fewer multiplications.

Interpolation: a short convolution is a product of polynomials, which is known from its values at enough points. So transform each tile
of the picture and each filter to values at those points, multiply, and transform back: y = A^T [(G w G^T) . (B^T x B)] A. Exact in real
arithmetic; in floating point the error grows with the tile, because the points (0, 1, -1, 2, -2, ...) have ever larger powers.

Source: Winograd 1980; Lavin & Gray 2015, arXiv:1509.09308, section 4; Barabasz et al. 2018, arXiv:1803.10986 (the points' error).
"""

from fractions import Fraction
from functools import cache
from math import ceil, prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_cnn.functional.conv.geometry import PLAIN, Geometry, Pair, gradient_as_forward, output_size

Matrix = tuple[tuple[Fraction, ...], ...]
POINTS = tuple(Fraction(*point) for point in ((0, 1), (1, 1), (-1, 1), (2, 1), (-2, 1), (1, 2), (-1, 2)))


@cache
def cook_toom(m: int, r: int) -> tuple[Matrix, Matrix, Matrix]:
    """A^T (m x n), G (n x r) and B^T (n x n) of F(m, r), n = m + r - 1, in exact fractions.

    >>> A, G, B = cook_toom(2, 3)
    >>> [[int(value) for value in row] for row in B]
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]]
    """
    points = POINTS[: m + r - 2]
    scale = [prod((a - b for b in points if b != a), start=Fraction(1)) for a in points]
    # The last point is infinity: the value there is the highest coefficient.
    infinity = tuple(Fraction(j == r - 1) for j in range(r))
    A = tuple((*(a**i for a in points), Fraction(i == m - 1)) for i in range(m))
    G = (*(tuple(a**j / s for j in range(r)) for a, s in zip(points, scale, strict=True)), infinity)
    B = (*(_polynomial([b for b in points if b != a], m + r - 1) for a in points), _polynomial(points, m + r - 1))
    if B[0][0] < 0:
        B, G = (_negated_first(M) for M in (B, G))
    return A, G, B


def multiplications(m: int, r: int) -> Fraction:
    """The multiplications of a direct convolution for each one of F(m x m, r x r).

    >>> multiplications(2, 3), multiplications(4, 3)
    (Fraction(9, 4), Fraction(4, 1))
    """
    return Fraction(m * m * r * r, (m + r - 1) ** 2)


def forward(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "k c r r"],
    geometry: Geometry = PLAIN,
    m: int = 4,
    transformed: Float[Tensor, "a a c k"] | None = None,
) -> Float[Tensor, "b k ho wo"]:
    """y = x * w for stride and dilation one and square filters, in output tiles of m x m."""
    r = weight.shape[2]
    A = _tensor(cook_toom(m, r)[0], x)
    high, wide = output_size((x.shape[2], x.shape[3]), (r, r), geometry)
    U = transform(weight, m) if transformed is None else transformed
    V = _pictures(x, (high, wide), geometry.padding, m, r)
    y = torch.einsum("ip,pqnk,jq->nkij", A, V.flatten(2, 4) @ U, A).unflatten(0, V.shape[2:5])
    return y.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)[:, :, :high, :wide]


def input_gradient(
    g: Float[Tensor, "b k ho wo"], weight: Float[Tensor, "k c r r"], size: Pair, geometry: Geometry = PLAIN, m: int = 4
) -> Float[Tensor, "b c h w"]:
    """The forward convolution of g with the mirrored filters."""
    return forward(*gradient_as_forward(g, weight, geometry), m=m)


def weight_gradient(
    x: Float[Tensor, "b c h w"], g: Float[Tensor, "b k ho wo"], size: Pair, geometry: Geometry = PLAIN, m: int = 4
) -> Float[Tensor, "k c r r"]:
    """The forward pass backwards: gw = G^T [sum over tiles of (B^T x B) . (A g A^T)] G."""
    r = size[0]
    A, G, _ = (_tensor(M, x) for M in cook_toom(m, r))
    V = _pictures(x, (g.shape[2], g.shape[3]), geometry.padding, m, r)
    tiles = F.pad(g, (0, -g.shape[3] % m, 0, -g.shape[2] % m)).unfold(2, m, m).unfold(3, m, m)
    D = torch.einsum("ip,bkuvij,jq->pqbuvk", A, tiles, A)
    return torch.einsum("pi,pqkc,qj->kcij", G, D.flatten(2, 4).mT @ V.flatten(2, 4), G)


def transform(weight: Float[Tensor, "k c r r"], m: int = 4) -> Float[Tensor, "a a c k"]:
    """U = G w G^T: the filters at the points."""
    G = _tensor(cook_toom(m, weight.shape[2])[1], weight)
    return torch.einsum("pi,kcij,qj->pqck", G, weight, G)


def _pictures(x: Tensor, size: Pair, padding: Pair, m: int, r: int) -> Float[Tensor, "a a b down across c"]:
    """V = B^T x B: the picture under each output tile at the points."""
    B, (top, left) = _tensor(cook_toom(m, r)[2], x), padding
    bottom, right = (ceil(size[i] / m) * m + r - 1 - x.shape[2 + i] - padding[i] for i in (0, 1))
    tiles = F.pad(x, (left, right, top, bottom)).unfold(2, m + r - 1, m).unfold(3, m + r - 1, m)
    return torch.einsum("pi,bcuvij,qj->pqbuvc", B, tiles, B)


def _tensor(matrix: Matrix, like: Tensor) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in matrix], dtype=like.dtype, device=like.device)


def _polynomial(roots, length: int) -> tuple[Fraction, ...]:
    """The coefficients of prod (t - root), lowest first, filled with zeros to `length`."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [root * value for value in coefficients] + [Fraction(0)]
        coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return tuple(coefficients + [Fraction(0)] * (length - len(coefficients)))


def _negated_first(matrix: Matrix) -> Matrix:
    return tuple(-value for value in matrix[0]), *matrix[1:]
