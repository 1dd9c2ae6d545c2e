"""Views of the picture: crops are the slices one would cut by hand, scales keep the shape, draws are those of training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import ten_crop

from lightning_cnn.callbacks import Augmented, FiveCrop, HorizontalFlip, MultiScale, TenCrop, marginalized
from lightning_cnn.callbacks._members import _pictures
from lightning_cnn.errors import ConfigurationError, DataError

NOBODY = torch.empty(0, dtype=torch.int64)


def seen(image, *views, sample=NOBODY):
    return list(_pictures(views, image, sample))


def test_a_flip_is_the_picture_and_its_mirror_image():
    image = torch.arange(6.0).view(1, 1, 2, 3)
    plain, mirrored = seen(image, HorizontalFlip())
    assert torch.equal(plain, image)
    assert mirrored[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]


@settings(max_examples=20)
@given(st.integers(4, 11), st.integers(4, 11), st.integers(1, 4), st.integers(1, 4))
def test_crops_equal_slices_cut_by_hand_and_torchvision(height, width, h, w):
    image = torch.rand(2, 3, height, width)
    top, left = round((height - h) / 2), round((width - w) / 2)
    by_hand = [
        image[..., :h, :w],
        image[..., :h, -w:],
        image[..., -h:, :w],
        image[..., -h:, -w:],
        image[..., top : top + h, left : left + w],
    ]
    crops = seen(image, FiveCrop((h, w)))
    assert all(torch.equal(a, b) for a, b in zip(crops, by_hand, strict=True))
    theirs = ten_crop(image, [h, w])
    assert all(torch.equal(a, b) for a, b in zip(seen(image, TenCrop((h, w))), theirs, strict=True))


def test_crops_larger_than_the_picture_are_refused_with_both_sizes():
    with pytest.raises(DataError, match=r"TenCrop cuts 9x9 pixels from pictures of 8x10. Choose a smaller size, or put MultiScale"):
        seen(torch.rand(1, 3, 8, 10), TenCrop(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_scales_keep_the_shape_of_the_picture_and_cropped_scales_are_resnets_protocol(dtype):
    image = (torch.rand(2, 3, 8, 12) * 255).to(dtype)
    assert [tuple(one.shape[-2:]) for one in seen(image, MultiScale(4, 8, 16))] == [(4, 6), (8, 12), (16, 24)]
    assert seen(image, MultiScale(8))[0] is image
    both = seen(image, MultiScale(8, 10), TenCrop(8))
    assert len(both) == 20
    assert {tuple(one.shape[-2:]) for one in both} == {(8, 8)}
    assert {one.dtype for one in both} == {dtype}


def test_draws_of_the_training_noise_depend_on_the_sample_alone():
    image, sample = torch.rand(6, 3, 8, 8), torch.arange(6) + 100
    view = Augmented(3, augment=["flip", "affine"])
    whole = seen(image, view, sample=sample)
    part = seen(image[4:], view, sample=sample[4:])
    assert all(torch.equal(a[4:], b) for a, b in zip(whole, part, strict=True))
    assert not torch.equal(whole[0], whole[1])


def test_the_mean_over_many_draws_is_unbiased():
    """A flip with probability 1/2 has the mean of both pictures: within five standard errors of 256 draws, |a - b| / (2 sqrt n)."""
    image = torch.rand(4, 1, 4, 4)
    draws = torch.stack(seen(image, Augmented(256, augment="flip"), sample=torch.arange(4)))
    mean, spread = (image + image.flip(-1)) / 2, (image - image.flip(-1)).abs() / 2
    assert ((draws.mean(0) - mean).abs() <= 5 * spread / 16 + 1e-6).all()


def test_channels_last_pictures_stay_so_where_the_network_sees_them():
    layouts = []

    class Network(torch.nn.Module):
        def forward(self, x):
            layouts.append(x.is_contiguous(memory_format=torch.channels_last))
            return x.mean((2, 3))

    with marginalized(Network().eval(), [MultiScale(8, 12), HorizontalFlip()]) as members:
        members.place.target(torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    assert layouts == [True] * 4


def test_augmented_without_any_augmentation_is_refused():
    with pytest.raises(ConfigurationError, match="there is no BatchAugmentation"), marginalized(torch.nn.Identity(), [Augmented(3)]):
        pass
