"""`DALIFolder`: torchvision's pixels, upright pictures, named damage. Its order, noise and resume are in `test_contract`."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_cnn.data import DALIFolder
from lightning_cnn.errors import ConfigurationError, DataError

SIZES = [(40, 50), (60, 30), (33, 33), (48, 64)]


def smooth(index, height, width):
    """A picture that JPEG stores well, so that decoders agree within a few levels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(y * 3 + index * 20) % 256, (x * 2) % 256, (x + y) % 256], 2).astype(np.uint8) // 2 + 40


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for index, (height, width) in enumerate(SIZES):
            place = tmp_path / split / f"c{index % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(smooth(index, height, width)).save(place / f"{index}.png")
    return tmp_path


def module(root, **options):
    return DALIFolder(**{"root": str(root), "size_px": 16, "batch_size": 3, "threads": 1, **options})


def test_evaluation_is_the_central_square_scaled_as_torch_does(root):
    data = module(root, central=1.0)
    got = {int(i): image for b in data.val_dataloader() for i, image in zip(b.index, b.image, strict=True)}
    for position, index in enumerate((0, 2, 1, 3)):
        height, width = SIZES[index]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        cut = torch.from_numpy(smooth(index, height, width)[top : top + side, left : left + side]).permute(2, 0, 1)[None].float() / 255
        expected = torch.nn.functional.interpolate(cut, (16, 16), mode="bilinear", antialias=True)[0]
        assert (got[position] - expected).abs().max() < 3 / 255
    assert data.classes == ["c0", "c1"]


def test_a_turned_picture_is_delivered_upright(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.zeros((32, 64, 3), np.uint8)
    turned[:, :32] = 255  # the left half is white: upright, turned to the right, it is the upper half
    Image.fromarray(turned).save(root / "val" / "c0" / "0.jpg", exif=exif, quality=95)
    image = next(iter(module(root, central=1.0).val_dataloader())).image[0]
    assert image[:, :7].mean() > 0.9
    assert image[:, 9:].mean() < 0.1


def test_a_picture_that_cannot_be_decoded_is_named(root):
    Image.fromarray(smooth(0, 200, 200)).save(root / "train" / "c1" / "9.jpg")
    whole = (root / "train" / "c1" / "9.jpg").read_bytes()
    (root / "train" / "c1" / "9.jpg").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"c1/9\.jpg cannot be decoded"):
        list(module(root).train_dataloader())


def test_what_cannot_work_is_refused_at_setup(root):
    with pytest.raises(ConfigurationError, match=r"(?s)3 problems:.*crop.*size_px.*dtype"):
        module(root, crop="x", size_px=0, dtype="x").setup()
    with pytest.raises(DataError, match=r"There is no folder nowhere/train. Expected nowhere/train/<class>/<picture>"):
        module("nowhere").setup()
