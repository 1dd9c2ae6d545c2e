"""Files that are not one dataset are refused, and a checkpoint knows the dataset that it stopped in."""

import shutil

import pytest
import torch

from lightning_cnn.data import PackedDataModule, PackedImages, pack
from lightning_cnn.errors import CheckpointError, DataError

SAMPLES = 12


def pictures(first=0, classes=3):
    return [(torch.full((3, 4, 4), first + i, dtype=torch.uint8), i % classes) for i in range(SAMPLES)]


def packed(folder, source=None, shards=3, name="x"):
    folder.mkdir(exist_ok=True)
    return pack(source or pictures(), folder / f"{name}.pack", size=None, shards=shards, progress=False, workers=0).paths


@pytest.fixture
def shards(tmp_path):
    return packed(tmp_path / "data")


def test_a_pattern_finds_every_shard_and_a_list_may_leave_some_out(shards):
    assert len(PackedImages(shards[0].parent / "x-*.pack")) == SAMPLES
    assert PackedImages(shards[:2]).labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    shards[1].unlink()
    with pytest.raises(DataError, match=r"x: shards \[1\] are missing. Fetch them, or name in a list"):
        PackedImages(shards[0].parent / "x-*.pack")
    with pytest.raises(DataError, match=r"x: shards \[1\] are missing"):
        PackedImages(f"file://{shards[0].parent}/x-*.pack", cache_folder=shards[0].parent / "cache")


def test_shards_in_another_order_are_refused(shards):
    with pytest.raises(DataError, match=r"x: shards are named in the order \[2, 0, 1\]. Name them in rising order"):
        PackedImages([shards[2], shards[0], shards[1]])


def test_a_shard_of_another_source_is_named(shards, tmp_path):
    other = packed(tmp_path / "other", [*pictures(100), *pictures(200)])
    shutil.copy(other[1], shards[1])
    with pytest.raises(DataError, match=r"x-00001-of-00003\.pack: packed from another source than the other shards"):
        PackedImages(shards)


def test_shards_of_two_packings_are_refused(shards):
    packed(shards[0].parent, shards=2)
    with pytest.raises(DataError, match=r"x: shards of several packings are mixed, of \[2, 3\] files each"):
        PackedImages(shards[0].parent / "x-*.pack")


def test_the_same_samples_twice_are_refused(shards):
    shutil.copy(shards[0], shards[0].parent / "x-copy.pack")
    with pytest.raises(DataError, match=r"x-copy\.pack holds the same samples as .*x-00000-of-00003\.pack"):
        PackedImages(shards[0].parent / "x-*.pack")
    with pytest.raises(DataError, match="holds the same samples"):
        PackedImages([shards[0], shards[0]])


def test_files_of_several_sources_make_one_dataset_if_codec_and_classes_agree(tmp_path):
    (one,), (two,) = packed(tmp_path, shards=1, name="one"), packed(tmp_path, pictures(50), shards=1, name="two")
    assert [int(PackedImages([two, one])[k][0][0, 0, 0]) for k in (0, SAMPLES)] == [50, 0]
    (three,) = pack(pictures(9), tmp_path / "three.pack", size=None, codec="jpeg", progress=False, workers=0).paths
    with pytest.raises(DataError, match="differ in codec or classes: they are not shards of one dataset"):
        PackedImages([one, three])


def test_a_checkpoint_inside_an_epoch_of_another_dataset_is_refused(tmp_path):
    (one,), (two,) = packed(tmp_path, shards=1, name="one"), packed(tmp_path, pictures(50), shards=1, name="two")

    def loader(*files):
        return PackedDataModule(train=files, batch_size=4, lane="gather", seed=1).loader("train", shuffle=True)

    begun = loader(one, two)
    next(iter(begun))
    again, swapped = loader(one, two), loader(two, one)
    again.load_state_dict(begun.state_dict())
    swapped.load_state_dict(begun.state_dict())
    assert len(list(again)) == len(again) - 1
    with pytest.raises(CheckpointError, match=r"another order \(fingerprint was \d+ and is \d+\)"):
        next(iter(swapped))
