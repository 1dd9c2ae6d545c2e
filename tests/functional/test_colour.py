"""One colour matrix equals the chain of colour steps, and lighting follows the components of the colours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia import enhance

from lightning_cnn.functional import colour

factor = st.floats(0.8, 1.2)


def column(value):
    return torch.tensor([value], dtype=torch.float64)


def plain(**changes):
    return {
        name: column(changes.get(name, neutral))
        for name, neutral in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.0))
    }


@settings(max_examples=25, deadline=None)
@given(factor, factor, factor)
def test_it_equals_kornias_three_steps_where_none_of_them_clips(brightness, contrast, saturation):
    image = 0.35 + 0.2 * torch.rand(1, 3, 6, 6, dtype=torch.float64)  # 0.35 to 0.55 stays inside [0, 1] under factors of 0.8 to 1.2
    steps = enhance.adjust_brightness_accumulative(image, brightness)
    steps = enhance.adjust_contrast_with_mean_subtraction(steps, contrast)
    steps = enhance.adjust_saturation_with_gray_subtraction(steps, saturation)
    values = plain(brightness=brightness, contrast=contrast, saturation=saturation)
    mapped = colour.colour_map(*colour.colour_gain(**values), torch.zeros(1, 3, dtype=torch.float64), image.mean((2, 3)))
    torch.testing.assert_close(colour.apply_colour(image, mapped), steps, rtol=0, atol=1e-6)  # Kornia's grey weights are float32


@settings(max_examples=25, deadline=None)
@given(st.floats(-3, 3))
def test_hue_keeps_grey_and_luma_and_turns_back(angle):
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    light = torch.zeros(1, 3, dtype=torch.float64)

    def turned(x, by):
        return colour.apply_colour(x, colour.colour_map(*colour.colour_gain(**plain(hue=by)), light, x.mean((2, 3))))

    grey = image[:, :1].expand(1, 3, 4, 4)
    torch.testing.assert_close(turned(grey, angle), grey, rtol=0, atol=1e-3)  # the published YIQ matrix's rows sum to zero within 1e-4
    torch.testing.assert_close(turned(turned(image, angle), -angle), image, rtol=0, atol=1e-12)
    weights = torch.tensor(colour.GREY, dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close((turned(image, angle) * weights).sum(1), (image * weights).sum(1), rtol=0, atol=1e-12)


def test_light_is_added_and_neutral_factors_change_nothing():
    image, light = torch.rand(2, 3, 4, 4), torch.randn(2, 3)
    neutral = {"brightness": torch.ones(2), "contrast": torch.ones(2), "saturation": torch.ones(2), "hue": torch.zeros(2)}
    mapped = colour.colour_map(*colour.colour_gain(**neutral), light, image.mean((2, 3)))
    torch.testing.assert_close(colour.apply_colour(image, mapped), image + light[:, :, None, None], rtol=0, atol=1e-6)


def test_components_of_known_colours_are_found():
    """Colours along (1, 1, 1) with standard deviation 0.2 and along (1, -1, 0) with 0.05."""
    n = 40_000
    along = torch.randn(n, 2, dtype=torch.float64) * torch.tensor([0.2, 0.05])
    directions = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]], dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    images = (0.5 + along @ directions).T.reshape(1, 3, 200, 200)
    values, vectors = colour.colour_components(images)
    assert values[:2].tolist() == pytest.approx([0.2, 0.05], rel=4.5 / (2 * n) ** 0.5)
    assert abs(vectors[:, 0] @ directions[0]).item() == pytest.approx(1, abs=1e-3)
    assert torch.allclose(colour.lighting(torch.tensor([[2.0, 0, 0]]).double(), values, vectors).norm(), 2 * values[0])
