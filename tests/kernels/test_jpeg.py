"""The cropping decoder: libjpeg's pixels to the bit, and neither a crash nor a wrong picture from damaged bytes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from lightning_cnn.kernels.jpeg import SLACK, decode_crops


def picture(index, height, width, noise=False):
    """Smooth, with edges; or white noise, which uses long codes."""
    draw = np.random.default_rng(index)
    if noise:
        return draw.integers(0, 256, (height, width, 3), np.uint8)
    y, x = np.arange(height)[:, None, None], np.arange(width)[:, None]
    wave = np.sin(x * draw.uniform(0.02, 0.5, 3) + y * draw.uniform(-0.5, 0.5, 3)) + (x > width * draw.random())
    return np.uint8(np.clip(128 + 70 * wave, 0, 255))


def encoded(image, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", **options)
    return stream.getvalue()


def libjpeg(data):
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB).permute(1, 2, 0).numpy()


def decoded(data, size, box=None, length=None):
    """The box of a JPEG, or None; the bytes around the output and the bytes around the file are watched."""
    box = (0, 0, *size) if box is None else box
    before, count = 5, 3 * box[2] * box[3]
    source = np.frombuffer(b"\xff\xd8\xff" + data + b"\x55" * 9, np.uint8)
    out = np.full(before + count + SLACK + 7, 77, np.uint8)
    one = [np.array([value]) for value in (3, len(data) if length is None else length, *size)]
    done = decode_crops(source, *one, np.array([box]), out, np.array([before]))
    assert (out[:before] == 77).all()
    assert (out[before + count + SLACK :] == 77).all()
    return out[before : before + count].reshape(*box[2:], 3) if done[0] else None


KINDS = {
    "halved": {"subsampling": 2}, "whole": {"subsampling": 0}, "coarse": {"quality": 5}, "fine": {"quality": 100},
    "own codes": {"optimize": True, "quality": 97}, "rows": {"restart_marker_rows": 1}, "stretches": {"restart_marker_blocks": 3},
    "two rows": {"restart_marker_rows": 2, "subsampling": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [False, True])
def test_every_box_has_the_pixels_of_libjpeg(kind, noise):
    draw = np.random.default_rng(1)
    for trial in range(12):
        height, width = draw.integers(5, 90, 2)
        data = encoded(picture(trial, height, width, noise), **KINDS[kind])
        whole = libjpeg(data)
        assert np.array_equal(decoded(data, (height, width)), whole)
        for _ in range(4):
            top, left = draw.integers(height), draw.integers(width)
            box = (top, left, draw.integers(1, height - top + 1), draw.integers(1, width - left + 1))
            assert np.array_equal(decoded(data, (height, width), box), whole[top : top + box[2], left : left + box[3]])


def test_grey_pictures_have_three_equal_channels():
    data = encoded(picture(0, 33, 41)[..., 0])
    assert np.array_equal(decoded(data, (33, 41), (7, 9, 20, 30)), libjpeg(data)[7:27, 9:39])


def test_several_pictures_share_a_call_and_their_tables():
    images = [encoded(picture(k, 40, 40), quality=90, optimize=k == 2) for k in range(4)]
    lengths = np.array([len(image) for image in images])
    place = np.arange(4) * (40 * 40 * 3 + SLACK)
    out = np.zeros(place[-1] + 40 * 40 * 3 + SLACK, np.uint8)
    source, size = np.frombuffer(b"".join(images), np.uint8), np.full(4, 40)
    done = decode_crops(source, np.cumsum(lengths) - lengths, lengths, size, size, np.tile((0, 0, 40, 40), (4, 1)), out, place)
    assert done.all()
    for k in range(4):
        assert np.array_equal(out[place[k] :][: 40 * 40 * 3].reshape(40, 40, 3), libjpeg(images[k]))


def cmyk():
    stream = io.BytesIO()
    Image.fromarray(picture(0, 24, 24)).convert("CMYK").save(stream, "JPEG")
    return stream.getvalue()


UNUSUAL = {
    "progressive": lambda: encoded(picture(0, 24, 24), progressive=True),
    "colour halved one way": lambda: encoded(picture(0, 24, 24), subsampling=1),
    "four inks": cmyk,
    "another size": lambda: encoded(picture(0, 24, 25)),
    "no picture": lambda: bytes(500),
    "nothing": lambda: b"",
    "without an end": lambda: encoded(picture(0, 24, 24))[:-2],
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_it_does_not_know_is_left_to_libjpeg(kind):
    assert decoded(UNUSUAL[kind](), (24, 24)) is None


def test_damaged_bytes_are_refused_or_give_some_picture():
    """Whatever the bytes say, nothing is written outside of the output; most damage before the pixels is seen."""
    draw, refused = np.random.default_rng(2), 0
    originals = [encoded(picture(k, 48, 40, noise=k % 2 == 0), **options) for k, options in enumerate(KINDS.values())]
    for trial in range(3000):
        data = bytearray(originals[trial % len(originals)])
        for _ in range(draw.integers(1, 4)):
            place = draw.integers(620) if trial % 2 else draw.integers(len(data))
            data[min(place, len(data) - 1)] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.integers(256)])
        cut = draw.integers(len(data) + 1) if trial % 5 == 0 else len(data)
        refused += decoded(bytes(data), (48, 40), (3, 5, 40, 30), cut) is None
    assert 300 < refused < 2900
