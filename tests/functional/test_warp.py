"""One resampling equals the chain of resamplings: exactly on ramps, and within the bound of bilinear interpolation on waves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.geometry import transform as kornia

from lightning_cnn.functional import warp

SIZE = (24, 32)


def one(**changes):
    """Parameters of a map for one picture; the identity, changed."""
    plain = {
        "mirror": [1.0, 1.0], "angle": 0.0, "scale": [1.0, 1.0], "shear": [0.0, 0.0], "shift": [0.0, 0.0],
        "window": [0.0, 0.0, float(SIZE[1]), float(SIZE[0])],
    }  # fmt: skip
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in {**plain, **changes}.items()}


def mapped(image, lens=None, size_out=SIZE, fill="zeros", **changes):
    affine = warp.affine_map(size_in=tuple(image.shape[-2:]), size_out=size_out, **one(**changes))
    return warp.resample(image, warp.sampling_grid(affine, tuple(image.shape[-2:]), size_out, lens), fill=fill)


def wave(frequency: float) -> torch.Tensor:
    """sin(f x) cos(f y): its second derivatives are at most f^2."""
    y, x = (torch.arange(n, dtype=torch.float64) for n in SIZE)
    return (torch.sin(frequency * x) * torch.cos(frequency * y)[:, None])[None, None]


def ramp() -> torch.Tensor:
    y, x = (torch.arange(n, dtype=torch.float64) for n in SIZE)
    return (0.3 * x + 0.7 * y[:, None] + 1)[None, None]


STEPS = [
    {"mirror": [-1.0, 1.0]},
    {"scale": [1.15, 0.9]},
    {"shear": [0.1, -0.05]},
    {"angle": 0.25},
    {"shift": [1.5, -2.25]},
]
TOGETHER = {name: value for step in STEPS for name, value in step.items()}
MIDDLE = (..., slice(9, 15), slice(12, 20))  # far enough from the edge that no step reads outside


def in_turn(image):
    for step in STEPS:
        image = mapped(image, **step)
    return image


def test_a_linear_picture_is_mapped_without_any_error_by_one_step_or_five():
    """Bilinear interpolation is exact on a plane, so that fused and unfused agree to rounding."""
    torch.testing.assert_close(mapped(ramp(), **TOGETHER)[MIDDLE], in_turn(ramp())[MIDDLE], rtol=0, atol=1e-11)


@pytest.mark.parametrize("frequency", [0.05, 0.1, 0.2])
def test_on_a_wave_the_difference_is_within_the_error_of_interpolation(frequency):
    """One bilinear step errs by at most (|f_xx| + |f_yy|) / 8 = f^2 / 4; five add as much each, and maps stretch f by at most 1.3."""
    bound = (1 + len(STEPS)) * (1.3 * frequency) ** 2 / 4
    difference = (mapped(wave(frequency), **TOGETHER) - in_turn(wave(frequency)))[MIDDLE].abs().max().item()
    assert difference <= bound
    exact_error = difference / bound
    assert exact_error > 0.01, "a bound a hundred times too wide would prove nothing"


@settings(max_examples=25, deadline=None)
@given(st.floats(-0.4, 0.4), st.floats(0.8, 1.25), st.floats(-0.2, 0.2), st.floats(-3, 3))
def test_it_is_kornias_affine_warp_of_the_same_matrix(angle, scale, shear, shift):
    image = torch.rand(1, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    affine = warp.affine_map(
        size_in=SIZE, size_out=SIZE, **one(angle=angle, scale=[scale, 1 / scale], shear=[shear, 0.0], shift=[shift, -shift])
    )
    there = torch.eye(3, dtype=torch.float64)
    there[:2, 2] = torch.tensor([(SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2])
    forward = there @ torch.linalg.inv(torch.cat([affine[0], torch.tensor([[0.0, 0.0, 1.0]])])) @ torch.linalg.inv(there)
    expected = kornia.warp_affine(image, forward[None, :2], SIZE, align_corners=False)
    got = warp.resample(image, warp.sampling_grid(affine, SIZE, SIZE))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_whole_pixels_and_windows_are_slices():
    image = torch.rand(1, 3, *SIZE, dtype=torch.float64)
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(mapped(image, mirror=[-1.0, 1.0]), image.flip(-1), **exact)
    torch.testing.assert_close(mapped(image, shift=[3.0, -2.0])[..., :-2, 3:], image[..., 2:, :-3], **exact)
    window = [4 - 16 + 4.0, 6 - 12 + 3.0, 8.0, 6.0]  # columns 4-11, rows 6-11
    torch.testing.assert_close(mapped(image, size_out=(6, 8), window=window), image[..., 6:12, 4:12], **exact)
    torch.testing.assert_close(mapped(image, angle=math.pi, scale=[-1.0, -1.0]), image, **exact)


lenses = st.tuples(st.floats(-0.1, 0.1), st.floats(-0.05, 0.05), st.floats(-0.02, 0.02), st.floats(-0.02, 0.02))


def test_a_lens_of_zero_is_the_identity():
    image = torch.rand(1, 3, *SIZE, dtype=torch.float64)
    torch.testing.assert_close(mapped(image, lens=torch.zeros(1, 4, dtype=torch.float64)), image, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(lenses)
def test_the_inverse_of_a_lens_restores_points_and_pictures(lens):
    coefficients = torch.tensor([lens], dtype=torch.float64)
    points = torch.rand(1, 50, 2, dtype=torch.float64) * 1.4 - 0.7
    there = warp.distort(points, coefficients)
    torch.testing.assert_close(warp.undistort(there, coefficients), points, rtol=0, atol=1e-9)


def test_a_picture_bent_and_bent_back_is_the_picture():
    """The inverse lens as a grid of positions; on a plane interpolation adds nothing, so what is left is the lens's own error."""
    lens, unit = torch.tensor([[0.08, 0.02, 0.01, -0.01]], dtype=torch.float64), math.hypot(*SIZE) / 2
    y, x = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in SIZE)
    centred = torch.stack([x.expand(SIZE), y[:, None].expand(SIZE)], -1).view(1, -1, 2)
    back = warp.undistort(centred / unit, lens) * unit / torch.tensor([SIZE[1] / 2, SIZE[0] / 2])
    bent = mapped(wave(0.1), lens=lens, fill="border")
    restored = warp.resample(bent, back.view(1, *SIZE, 2), fill="border")
    bound = 2 * (1.4 * 0.1) ** 2 / 4  # two interpolations of a wave the lens stretches by at most 1.4
    assert (restored - wave(0.1))[MIDDLE].abs().max().item() <= bound
    assert (bent - wave(0.1))[..., 2:6, 2:6].abs().max().item() > 5 * bound, "the lens did bend the corner"


@settings(max_examples=25, deadline=None)
@given(lenses, st.floats(-0.5, 0.5), st.floats(-4, 4))
def test_points_go_where_the_picture_goes(lens, angle, shift):
    """map_points is the inverse of the grid: sampling the coordinates themselves at the mapped point gives the point back."""
    affine = warp.affine_map(size_in=SIZE, size_out=SIZE, **one(angle=angle, shift=[shift, 1.0], scale=[1.1, 0.9]))
    coefficients = torch.tensor([lens], dtype=torch.float64)
    points = torch.tensor([[[10.0, 8.0], [20.0, 15.0], [16.0, 12.0]]], dtype=torch.float64)
    moved = warp.map_points(points, affine, SIZE, SIZE, coefficients)
    unit, centre = math.hypot(*SIZE) / 2, torch.tensor([(SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2])
    bent = warp.distort((moved - centre) / unit, coefficients) * unit
    found = (affine[:, :, :2] @ bent.transpose(1, 2)).transpose(1, 2) + affine[:, None, :, 2] + centre
    torch.testing.assert_close(found, points, rtol=0, atol=1e-6)
