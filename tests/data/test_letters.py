"""Printed letters: legible, unseen fonts kept apart."""

import pytest
import torch

from lightning_cnn.data import Letters
from lightning_cnn.data.letters import ALPHABET, FONTS, VALIDATION_FONTS, drawn
from lightning_cnn.errors import ConfigurationError


def test_every_letter_is_drawn_in_every_font_and_fills_its_box():
    image, label, _ = drawn(8)
    assert image.shape == (len(FONTS) * len(ALPHABET), 1, 8, 8)
    assert torch.bincount(label).tolist() == [len(FONTS)] * len(ALPHABET)
    ink = image[:, 0] > 32
    assert (ink.any(2).sum(1) >= 4).all(), "a letter is lower than half its box"


def test_letters_differ_from_each_other_within_a_font():
    """A font without a glyph draws one box for every letter: then two letters would be one picture."""
    image, _, font = drawn(16)
    for k, name in enumerate(FONTS):
        assert image[font == k].flatten(1).unique(dim=0).shape[0] == len(ALPHABET), name


def test_validation_fonts_are_never_trained_on():
    data = Letters()
    data.setup()
    assert len(data.validation) == len(VALIDATION_FONTS) * len(ALPHABET)
    assert len(data.train) + len(data.validation) == len(FONTS) * len(ALPHABET)
    batch = next(iter(data.train_dataloader()))
    assert (batch.image.dtype, tuple(batch.image.shape[1:])) == (torch.uint8, (1, 8, 8))


def test_an_absurd_size_is_refused():
    with pytest.raises(ConfigurationError, match="size_px=2: choose 4 to 64"):
        Letters(size_px=2).setup()
