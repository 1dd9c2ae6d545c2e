"""The error bounds of docs/numerics.md that no other test holds, and that every test the page names is there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from lightning_cnn.conv import report, swap
from lightning_cnn.precision._states import Packed

ROOT = Path(__file__).parents[2]
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs/numerics.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 15
    assert [pair for pair in named if not re.search(rf"^def {pair[1]}\(", (ROOT / pair[0]).read_text(), re.MULTILINE)] == []


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["default", "im2col", "layout", "depthwise", "fft", "fft_tiled"])
def test_half_precision_convolutions_stay_within_their_bound(name, dtype):
    """Products and sums are float32's, and the result is rounded once; torch's depthwise convolution sums in the 16 bits themselves."""
    generator = torch.Generator().manual_seed(1)
    groups = 16 if name == "depthwise" else 1
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False, groups=groups).to(dtype)
    layer.weight.data.normal_(generator=generator)
    x = torch.randn(2, 16, 11, 13, generator=generator).to(dtype)
    w, wide = layer.weight.detach().double(), x.double()
    exact, size = conv2d(wide, w, padding=1, groups=groups), conv2d(wide.abs(), w.abs(), padding=1, groups=groups)
    swap(layer, name)
    with torch.no_grad():
        error = (layer(x).double() - exact).abs()
    sums = (w[0].numel() + 2) * size * (HALF[dtype] if name == "depthwise" else 16 * 2.0**-23)
    assert (error <= HALF[dtype] * exact.abs() + sums).all()
    assert report(layer).rows[0].algorithm == name


@pytest.mark.parametrize("square", [False, True], ids=["signed", "squares"])
def test_a_state_in_eight_bits_is_off_by_less_than_a_spacing_and_keeps_its_mean(square):
    """Blocks of 256 numbers over 2**40; the mean of 400 roundings of what is above the smallest spacing, |z| < 6 (2e-9 an element)."""
    value = torch.randn(1024) * torch.exp2(torch.randint(-40, 1, (1024,)).float())
    value = value.square() if square else value
    relative, smallest = (2.0**-2, 2.0**-29) if square else (2.0**-3, 2.0**-15)
    largest = value.view(-1, 256).abs().amax(1).repeat_interleave(256)
    spacing = torch.maximum(relative * value.abs(), smallest * largest)
    total = torch.zeros(1024, dtype=torch.float64)
    for step in range(400):
        rounded = Packed.empty(value).pack(value, seed=1, step=step, stream="m").unpack(value)
        assert ((rounded - value).abs() <= spacing).all()
        assert not square or bool((rounded > 0).all())
        total += rounded
    above = value.abs() >= smallest * largest
    assert ((total / 400 - value).abs()[above] <= 6 * spacing[above] / 2 / 20).all()


@pytest.mark.parametrize("square", [False, True], ids=["signed", "squares"])
def test_eight_bits_return_to_eight_bits_exactly(square):
    value = torch.randn(1000)
    value = value.square() if square else value
    once = Packed.empty(value).pack(value, seed=1, step=0, stream="m").unpack(value)
    again = Packed.empty(value).pack(once, seed=2, step=9, stream="n").unpack(value)
    assert torch.equal(once, again)
