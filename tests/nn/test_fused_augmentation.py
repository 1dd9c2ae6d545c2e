"""Fused noise: the compiled pass equals the torch one, it equals Kornia's own steps, and everything in the picture follows it."""

import pytest
import torch
from kornia import augmentation as K
from kornia.geometry import transform as geometry

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.colour import apply_colour, colour_gain, colour_map
from lightning_cnn.functional.keyed_random import KeyedRandom
from lightning_cnn.nn import FusedAugmentation, RandomLensDistortion, RandomPCALighting

GEOMETRY = {"flip": 0.5, "rotate_deg": 15, "translate": 0.1, "scale": (0.9, 1.1), "shear_deg": 10, "stretch": 0.1}
COLOUR = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05, "lighting": 0.1}
KNOBS = {
    "geometry": GEOMETRY,
    "lens": {**GEOMETRY, "lens": 0.1, "lens_tangential": 0.02},
    "colour": COLOUR,
    "all, border": {**GEOMETRY, **COLOUR, "lens": 0.1, "fill": "border"},
    "crop to a size": {"crop": (0.3, 1.0), "size": (10, 14)},
}


def pictures(n=6, channels=3, height=12, width=16, dtype=torch.float32):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_the_compiled_pass_equals_torchs_in_double(knobs, channels):
    """float32 against float64: positions of up to 16 pixels times eps, times a slope of one a pixel, a few roundings deep."""
    fused, image = FusedAugmentation(**knobs), pictures(channels=channels)
    params = fused.forward_parameters(image.shape)
    precise = {name: value.double() if value.is_floating_point() else value for name, value in params.items()}
    expected = fused(image.double(), params=precise)
    got = fused(image, params=params)
    assert (got - expected).abs().quantile(0.99).item() < 16 * 16 * torch.finfo(torch.float32).eps
    assert (
        got - expected
    ).abs().max().item() < 1e-3  # a position that rounds across the edge changes a tap's weight, not its continuity


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_a_sample_is_the_same_in_any_batch(knobs):
    fused, image, index = FusedAugmentation(**knobs), pictures(), torch.arange(6)
    with KeyedRandom(1, index):
        whole = fused(image)
    with KeyedRandom(1, index[2:3]):
        alone = fused(image[2:3])
    torch.testing.assert_close(alone[0], whole[2], rtol=0, atol=1e-5)


def test_it_equals_kornias_flip_affine_and_jitter_one_after_the_other():
    """On a plane, where interpolation is exact, away from the edge; colours stay inside [0, 1], so that no step clips."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    image = (0.35 + 0.1 * torch.stack([x, y, (x + y) / 2]))[None].double()
    fused = FusedAugmentation(flip=1.0, rotate_deg=10, translate=0.05, scale=(0.95, 1.05))
    params = fused.forward_parameters(image.shape)
    matrix = fused.compute_transformation(image, params, fused.flags)
    flip = K.RandomHorizontalFlip(p=1.0)
    after_flip = flip(image)
    warped = geometry.warp_affine(after_flip, (matrix @ torch.linalg.inv(flip.transform_matrix))[:, :2], (32, 32), align_corners=False)
    middle = (..., slice(10, 22), slice(10, 22))
    torch.testing.assert_close(fused(image, params=params)[middle], warped[middle], rtol=0, atol=1e-6)
    jitter = K.ColorJitter(0.1, 0.1, 0.1, 0.0, order=(0, 1, 2))
    kornias = jitter(image.float())
    factors = {name: jitter._params[f"{name}_factor"].double() for name in ("brightness", "contrast", "saturation")}
    parts = colour_gain(**factors, hue=torch.zeros(1).double())
    ours = apply_colour(image, colour_map(*parts, torch.zeros(1, 3).double(), image.mean((2, 3))))
    torch.testing.assert_close(ours.float(), kornias, rtol=0, atol=1e-5)


def test_cifars_pad_and_crop_shifts_by_whole_pixels():
    fused, image = FusedAugmentation(flip=0.5, pad_crop_px=4), pictures(64, height=32, width=32)
    result = fused(image)
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    shifts = set()
    for picture, source in zip(result, padded, strict=True):
        found = [
            (dy, dx, side)
            for dy in range(9)
            for dx in range(9)
            for side in (1, -1)
            if torch.allclose(picture, (source if side > 0 else source.flip(-1))[:, dy : dy + 32, dx : dx + 32], atol=1e-4)
        ]
        assert len(found) == 1
        shifts.add(found[0][:2])
    assert len(shifts) > 30, "all 81 shifts are equally likely: 64 draws hit about 44 of them"


def test_noise_of_size_zero_is_the_identity():
    image = pictures()
    assert torch.equal(FusedAugmentation()(image), image)
    torch.testing.assert_close(FusedAugmentation(flip=1e-9)(image), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("augmentation", [FusedAugmentation(rotate_deg=20, translate=0.1, lens=0.1), RandomLensDistortion(radial=0.15)])
def test_mask_boxes_and_points_follow_inside_a_kornia_container(augmentation):
    """A bright square on black: after the warp the mask is where the square is, and box and points still hold it."""
    image = torch.zeros(4, 3, 48, 48)
    image[..., 18:30, 14:26] = 1
    corners = torch.tensor([[[14.0, 18.0], [25.0, 18.0], [25.0, 29.0], [14.0, 29.0]]]).repeat(4, 1, 1)
    boxes = torch.tensor([[[14.0, 18.0, 25.0, 29.0]]]).repeat(4, 1, 1)
    container = K.AugmentationSequential(augmentation, data_keys=["input", "mask", "bbox_xyxy", "keypoints"])
    new, mask, box, points = container(image, image[:, :1].clone(), boxes, corners)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert (new[:, :1] - mask).abs().mean().item() < 0.02
    for picture, (left, top, right, bottom), moved in zip(new, box[:, 0], points, strict=True):
        rows, columns = (picture[0] > 0.5).nonzero().unbind(-1)
        assert abs(columns.min() - left) <= 1.5 and abs(columns.max() - right) <= 1.5
        assert abs(rows.min() - top) <= 1.5 and abs(rows.max() - bottom) <= 1.5
        assert abs(moved[:, 0].min() - left) <= 1e-3 and abs(moved[:, 1].max() - bottom) <= 1e-3


def test_lighting_adds_one_colour_a_picture_with_the_variance_of_the_components():
    image = torch.full((4000, 3, 1, 1), 0.5)
    lighting = RandomPCALighting(std=0.1)
    added = (lighting(image) - image)[..., 0, 0].double()
    expected = (lighting.vectors.double() @ torch.diag(lighting.values.double() ** 2) @ lighting.vectors.double().T) * 0.1**2
    torch.testing.assert_close(torch.cov(added.T), expected, rtol=0, atol=4.5 * expected.max().item() * (2 / 4000) ** 0.5)
    assert (RandomPCALighting(std=50.0)(image) >= 0).all()


def test_the_mean_over_many_flips_and_shifts_is_symmetric():
    """Unbiased: the mean of many augmentations equals the mean of its own mirror image, within four standard errors."""
    n = 4000
    image = pictures(1).expand(n, -1, -1, -1)
    result = FusedAugmentation(flip=0.5, rotate_deg=15, translate=0.1)(image).double()
    mirrored = FusedAugmentation(flip=0.5, rotate_deg=15, translate=0.1)(image.flip(-1)).double()
    error = ((result.var(0) + mirrored.var(0)) / n).sqrt()
    assert ((result.mean(0) - mirrored.mean(0)).abs() <= 5 * error + 1e-6).all()


def test_all_wrong_knobs_are_named_at_once():
    with pytest.raises(ConfigurationError, match="5 problems") as caught:
        FusedAugmentation(flip=2.0, crop=(1.0, 0.5), hue=-0.1, shear_deg=50, fill="mirror")
    assert "crop is a range 0 < low <= high; got (1.0, 0.5)." in str(caught.value)
    with pytest.raises(ConfigurationError, match="RandomPCALighting needs 3 values"):
        RandomPCALighting(values=[1.0, 2.0])


@pytest.mark.parametrize("channels", [2, 7])
def test_any_number_of_channels_in_either_layout_is_moved_alike(channels):
    fused, image = FusedAugmentation(**GEOMETRY, lens=0.1), pictures(channels=channels)
    params = fused.forward_parameters(image.shape)
    one_by_one = torch.cat([fused(image[:, i : i + 1], params=params) for i in range(channels)], 1)
    result = fused(image.contiguous(memory_format=torch.channels_last), params=params)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, one_by_one)
    assert torch.equal(fused(image, params=params), one_by_one)


def test_colours_of_neither_grey_nor_rgb_pictures_are_refused():
    with pytest.raises(ConfigurationError, match="grey or RGB pictures; got 2 channels"):
        FusedAugmentation(brightness=0.1)(pictures(channels=2))


def test_a_sample_drawn_as_not_a_number_reads_inside_the_picture():
    fused, image = FusedAugmentation(rotate_deg=10), pictures(2)
    params = fused.forward_parameters(image.shape)
    params["u"][0] = float("nan")
    assert torch.isfinite(fused(image, params=params)).all()
