"""Printed letters, drawn from the fonts that matplotlib ships: a source to transfer from that needs no download."""

from functools import cache
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_cnn.data._loader import Resumable
from lightning_cnn.errors import ConfigurationError, raise_all

# Capitals, and the small letters that are no smaller copy of a capital: normalised to one box, c and C are the same picture.
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrty"
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10",
    "cmtt10", "cmmi10",
)  # fmt: skip
VALIDATION_FONTS = ("DejaVuSerif-Italic", "STIXGeneral", "cmss10")


class Letters(L.LightningDataModule):
    """38 letters in 21 fonts as uint8 pictures (b, 1, size_px, size_px), bright on dark, filling their box as scanned digits do.

    Three fonts are kept for validation and test.

    Raises:
        ConfigurationError: at `setup`, listing every argument that cannot be met.
    """

    classes = list(ALPHABET)  # noqa: RUF012

    def __init__(self, *, size_px: int = 8, batch_size: int = 64, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        self.size_px, self.batch_size, self.seed, self.num_workers = size_px, batch_size, seed, num_workers

    def setup(self, stage: str | None = None) -> None:
        problems = []
        if not 4 <= self.size_px <= 64:
            problems.append(f"size_px={self.size_px}: choose 4 to 64")
        if self.batch_size < 1:
            problems.append(f"batch_size={self.batch_size}: choose 1 or more")
        raise_all(problems, ConfigurationError)
        held_out = [font in VALIDATION_FONTS for font in FONTS]
        image, label, font = drawn(self.size_px)
        unseen = torch.tensor(held_out)[font]
        self.train = TensorDataset(image[~unseen], label[~unseen])
        self.validation = TensorDataset(image[unseen], label[unseen])

    def train_dataloader(self) -> Resumable:
        return Resumable(self.train, batch_size=self.batch_size, shuffle=True, seed=self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> Resumable:
        return Resumable(self.validation, batch_size=256, shuffle=False)

    test_dataloader = predict_dataloader = val_dataloader


@cache
def drawn(size_px: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every letter in every font: uint8 pictures (n, 1, size_px, size_px), labels (n) and fonts (n)."""
    pictures = [(_glyph(font, letter, size_px), label, k) for k, font in enumerate(FONTS) for label, letter in enumerate(ALPHABET)]
    image, label, font = zip(*pictures, strict=True)
    return torch.from_numpy(np.stack(image)).unsqueeze(1), torch.tensor(label), torch.tensor(font)


def _glyph(font: str, letter: str, size_px: int) -> np.ndarray:
    """One letter, cropped to its ink, scaled to a box of 8 by 8 parts of which it fills the height and at most 7 of the width."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (160, 160))
    ImageDraw.Draw(canvas).text((40, 30), letter, fill=255, font=_font(font))
    ink = canvas.crop(canvas.getbbox())
    scale = min(size_px / ink.height, size_px * 7 / 8 / ink.width)
    small = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BOX)
    box = Image.new("L", (size_px, size_px))
    box.paste(small, ((size_px - small.width) // 2, (size_px - small.height) // 2))
    return np.asarray(box, dtype=np.uint8)


@cache
def _font(name: str):
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), 72)
