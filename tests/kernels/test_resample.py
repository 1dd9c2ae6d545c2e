"""The loading kernels against torch and torchvision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from lightning_cnn.kernels import resample

ONE, ZERO = np.ones(3, np.float32), np.zeros(3, np.float32)
EPS = 2.0**-23


def pictures(draw, count, height, width):
    return np.random.default_rng(draw).integers(0, 256, (count, height, width, 3), np.uint8)


def unchecked(count):
    """Lengths, checksums and wishes of samples nobody wants compared with their checksums."""
    return np.zeros(count, np.int64), np.zeros(count, np.uint64), np.zeros(count, np.bool_)


def run(kernel, stored, box, flip, size, dtype=torch.float32, scale=ONE, bias=ZERO):
    """Apply a kernel to a stack of pictures of one size."""
    count, height, width, _ = stored.shape
    out = torch.zeros(count, size, size, 3, dtype=dtype).numpy()
    offset, heights, widths = np.arange(count) * height * width * 3, np.full(count, height), np.full(count, width)
    sizes = (heights, widths) if kernel is resample.crop_padded else (widths,)
    arguments = (np.asarray(box, np.int64), np.asarray(flip, np.bool_), scale, bias, out, np.arange(count))
    assert kernel(stored.reshape(-1), offset, *sizes, *arguments, unchecked(count)) == -1
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def torch_resized(picture, box, size, dtype=torch.float32):
    top, left, height, width = box
    part = torch.from_numpy(picture[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None].to(dtype)
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


def bound(box, size):
    """An output pixel is a mean of values up to 255 under weights of slope 1 / max(scale, 1) at positions up to n.

    A position is rounded a few times (4 n eps), on both axes and both sides of the comparison; the sums over the taps add 4 eps each.
    """
    taps = 2 * max(max(box[2:]) / size, 1) + 2
    return 255 * EPS * (4 * 2 * 2 * max(box[2:]) + 8 * taps)


@settings(max_examples=50, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.sampled_from([1, 5, 8, 16, 32]),
    flip=st.booleans(),
    draw=st.integers(0, 99),
)
def test_crop_resize_is_torchs_antialiased_bilinear(height, width, size, flip, draw):
    """From enlarging to shrinking 70-fold, unrolled and not, streamed (sizes divisible by 8) and not."""
    stored = pictures(draw, 2, 72, 71)
    top, left = draw % (73 - height), draw % (72 - width)
    box = (top, left, height, width)
    ours = run(resample.crop_resize, stored, [box, box], [flip, False], size)
    for b, turned in enumerate((flip, False)):
        expected = torch_resized(stored[b], box, size)
        error = (ours[b] - (expected.flip(-1) if turned else expected)).abs().max()
        assert error <= bound(box, size)


def test_an_unscaled_crop_is_exact():
    stored = pictures(0, 3, 9, 12)
    ours = run(resample.crop_resize, stored, [(1, 2, 8, 8)] * 3, [False] * 3, 8)
    assert torch.equal(ours, torch.from_numpy(stored[:, 1:9, 2:10].copy()).permute(0, 3, 1, 2).float())


def test_whole_numbers_are_torchs_rounded_ones_up_to_ties():
    stored = pictures(1, 4, 64, 64)
    box = (3, 5, 40, 50)
    ours = run(resample.crop_resize, stored, [box] * 4, [False] * 4, 16, torch.uint8, bias=ZERO + 0.5)
    expected = torch.stack([torch_resized(picture, box, 16, torch.float64) for picture in stored])
    assert (ours - expected).abs().max() <= 0.5 + bound(box, 16)


def test_normalisation_is_folded_in():
    stored = pictures(2, 2, 20, 20)
    scale, bias = np.array([0.5, 2, 1], np.float32), np.array([1, -3, 0], np.float32)
    plain = run(resample.crop_resize, stored, [(0, 0, 20, 20)] * 2, [True] * 2, 8)
    ours = run(resample.crop_resize, stored, [(0, 0, 20, 20)] * 2, [True] * 2, 8, scale=scale, bias=bias)
    assert torch.allclose(
        ours, plain * torch.tensor(scale)[:, None, None] + torch.tensor(bias)[:, None, None], rtol=4 * EPS, atol=512 * EPS
    )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", [(-4, -4), (4, 4), (0, 0), (-2, 3), (-40, 0)])
def test_a_padded_crop_is_torchvisions(place, flip):
    stored = pictures(3, 2, 10, 10)
    top, left = place
    ours = run(resample.crop_padded, stored, [(top, left, 10, 10)] * 2, [flip] * 2, 10)
    padded = F.pad(torch.from_numpy(stored).permute(0, 3, 1, 2).float(), (50, 50, 50, 50))
    expected = padded[:, :, 50 + top : 60 + top, 50 + left : 60 + left]
    assert torch.equal(ours, expected.flip(-1) if flip else expected)


def boxes(count, height, width, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), key=1):
    box, index = np.zeros((count, 4), np.int64), np.arange(count)
    sizes = np.full(count, height), np.full(count, width)
    resample.random_resized_boxes(key, index, *sizes, np.array(area), np.log(np.array(ratio)), box)
    return box


def test_boxes_are_distributed_as_torchvisions():
    """Means of 4000 boxes of each; the bound is five standard errors of their difference."""
    image = torch.zeros(3, 60, 80)
    torch.manual_seed(0)
    theirs = np.array([v2.RandomResizedCrop(8).make_params([image]) for _ in range(4000)], dtype=object)
    theirs = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in theirs], float)
    ours = boxes(4000, 60, 80)
    error = np.abs(ours.mean(0) - theirs.mean(0)) / np.sqrt((ours.var(0) + theirs.var(0)) / 4000)
    spread = np.abs(ours.std(0) / theirs.std(0) - 1)
    assert error.max() < 5
    assert spread.max() < 0.06


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_a_box_lies_inside_its_picture(height, width):
    box = boxes(50, height, width)
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2:] >= 1).all()
    assert (box[:, 0] + box[:, 2] <= height).all()
    assert (box[:, 1] + box[:, 3] <= width).all()


def test_a_box_depends_on_its_sample_alone():
    assert np.array_equal(boxes(50, 60, 80)[:20], boxes(20, 60, 80))
    assert not np.array_equal(boxes(50, 60, 80), boxes(50, 60, 80, key=2))


def test_flips_have_their_probability():
    flip, index = np.zeros(10_000, np.bool_), np.arange(10_000)
    resample.random_flips(3, index, 0.25, flip)
    assert flip.mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 10_000) ** 0.5)


def test_places_cover_the_padding():
    box, index = np.zeros((4000, 4), np.int64), np.arange(4000)
    resample.random_places(5, index, np.full(4000, 32), np.full(4000, 32), 32, 4, box)
    for axis in (0, 1):
        assert set(box[:, axis]) == set(range(-4, 5))


def test_gather_copies_whole_pictures():
    stored = pictures(4, 5, 3, 4)
    out = np.zeros((3, 36), np.uint8)
    resample.gather(stored.reshape(-1), np.array([4, 0, 2]) * 36, out, np.array([2, 1, 0]), unchecked(3))
    assert np.array_equal(out.reshape(3, 3, 4, 3), stored[[2, 0, 4]])
