"""Folders of pictures: both layouts, every file once, and errors that name the folder or file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_cnn.data import ImageFolders
from lightning_cnn.data.image_folders import read
from lightning_cnn.errors import ConfigurationError, DataError


def paint(folder: Path, count: int, value: int = 100, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(np.full((12, 16, 3), value + k, dtype=np.uint8)).save(folder / f"{k}{suffix}")


def ready(root: Path, **options) -> ImageFolders:
    data = ImageFolders(root=str(root), size_px=8, **options)
    data.setup()
    return data


def files(pictures) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path, _ in pictures.files}


def test_without_val_a_share_of_each_class_is_held_out_the_same_every_time(tmp_path):
    paint(tmp_path / "cat", 10)
    paint(tmp_path / "dog", 5)
    data, again = ready(tmp_path, val_fraction=0.2, seed=0), ready(tmp_path, val_fraction=0.2, seed=9)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.validation)) == (12, 3)
    assert files(data.train).isdisjoint(files(data.validation))
    assert files(data.validation) == files(again.validation)


def test_train_val_and_test_folders_are_taken_as_they_are(tmp_path):
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("a", "b"):
            paint(tmp_path / part / name, count)
    data = ready(tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [6, 4, 2]


def test_pictures_to_test_on_are_never_validated_on(tmp_path):
    for part, count in (("train", 10), ("test", 2)):
        for name in ("a", "b"):
            paint(tmp_path / part / name, count)
    data = ready(tmp_path, val_fraction=0.2)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [16, 4, 4]
    assert {path for path, _ in data.validation.files}.isdisjoint(path for path, _ in data.test.files)


def test_an_epoch_delivers_every_picture_once_as_uint8(tmp_path):
    paint(tmp_path / "a", 5, value=10)
    paint(tmp_path / "b", 5, value=200)
    data = ready(tmp_path, batch_size=3)
    batches = list(data.train_dataloader())
    index = torch.cat([batch.index for batch in batches])
    assert sorted(index.tolist()) == list(range(8))
    image, label = torch.cat([b.image for b in batches]), torch.cat([b.label for b in batches])
    assert image.dtype == torch.uint8 and image.shape[1:] == (3, 8, 8)
    assert torch.equal(label, (image.float().mean((1, 2, 3)) > 100).long())


def test_shots_are_balanced_and_chosen_by_the_seed(tmp_path):
    paint(tmp_path / "a", 12)
    paint(tmp_path / "b", 12)
    chosen = [ready(tmp_path, shots=2, seed=seed) for seed in (0, 1)]
    assert [len(data.train) for data in chosen] == [4, 4]
    assert files(chosen[0].train) != files(chosen[1].train)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", ".png"), ("P", ".gif"), ("RGBA", ".png"), ("CMYK", ".jpg"), ("RGB", ".bmp"), ("1", ".tif")]
)
def test_every_colour_mode_becomes_rgb(tmp_path, mode, suffix):
    Image.new("RGB", (10, 9), (200, 200, 200)).convert(mode).save(tmp_path / f"x{suffix}")
    image = read(tmp_path / f"x{suffix}", 6)
    assert image.shape == (3, 6, 6) and image.dtype == torch.uint8
    assert (image.float().mean() - 200).abs() < 60


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data.root: there is no folder .*nowhere"):
        ready(tmp_path / "nowhere")


def test_every_empty_class_folder_is_named(tmp_path):
    paint(tmp_path / "full", 3)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"(?s)2 problems.*hollow holds no picture.*void holds no picture"):
        ready(tmp_path)


def test_one_folder_is_no_classification(tmp_path):
    paint(tmp_path / "only", 3)
    with pytest.raises(DataError, match="two or more classes; found \\['only'\\]"):
        ready(tmp_path)


def test_an_unreadable_picture_is_named_when_it_is_read(tmp_path):
    for suffix in (".jpg", ".png", ".bmp"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"this is no picture")
        with pytest.raises(DataError, match=rf"broken\{suffix} cannot be decoded"):
            read(broken, 8)


def test_a_truncated_picture_is_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[:40])
    with pytest.raises(DataError, match=r"half.jpg cannot be decoded"):
        read(tmp_path / "half.jpg", 8)


def test_all_bad_arguments_are_said_at_once(tmp_path):
    paint(tmp_path / "a", 3)
    paint(tmp_path / "b", 3)
    with pytest.raises(ConfigurationError, match=r"(?s)2 problems.*val_fraction=2.*shots=0"):
        ready(tmp_path, val_fraction=2, shots=0)
    with pytest.raises(DataError, match="shots=9: a, b have fewer"):
        ready(tmp_path, shots=9)


def test_a_broken_picture_is_skipped_and_counted(pictures, tmp_path):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    (root / "dark" / "1.png").write_bytes(b"no picture")
    data = ImageFolders(root=str(root), size_px=8, batch_size=4, on_error="skip")
    data.setup("fit")
    delivered = sum(len(batch.index) for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader)
    assert delivered == 15
    assert len(data.left_out) == 1
    assert "1.png cannot be decoded" in data.left_out[0]
