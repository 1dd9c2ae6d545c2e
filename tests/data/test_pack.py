"""`pack`: any source, the same bytes whoever packs, every failure named."""

import gzip
import io
import logging
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_cnn.data import PackedImages, pack
from lightning_cnn.errors import ConfigurationError, DataError

CLASSES = ("ant", "bee")


def picture(index, height=20, width=30):
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)


def encoded(index, kind="PNG", **size):
    buffer = io.BytesIO()
    Image.fromarray(picture(index, **size)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        place = tmp_path / "pictures" / CLASSES[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(encoded(index))
    return tmp_path / "pictures"


def packed(source, out, **options):
    return pack(source, out, **{"progress": False, "workers": 0, **options})


def test_a_folder_becomes_one_file_of_its_classes(folder, tmp_path):
    report = packed(folder, tmp_path / "x.pack", size=None)
    images = PackedImages(tmp_path / "x.pack")
    assert (report.samples, report.skipped, images.classes) == (6, [], list(CLASSES))
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert all(np.array_equal(images.pixels(k), picture(index)) for k, index in enumerate([0, 2, 4, 1, 3, 5]))
    stacked = np.stack([picture(index) for index in range(6)]) / 255
    assert images.metadata["mean"] == pytest.approx(stacked.mean((0, 1, 2)), abs=1e-6)
    assert images.metadata["std"] == pytest.approx(stacked.std((0, 1, 2)), abs=1e-6)


@pytest.mark.parametrize(("fit", "shape"), [("crop", (10, 10)), ("short", (10, 15)), ("keep", (20, 30))])
def test_scaling_is_torchs_antialiased_one(folder, tmp_path, fit, shape):
    packed(folder, tmp_path / "x.pack", size=10, fit=fit)
    image, _ = PackedImages(tmp_path / "x.pack")[0]
    expected = torch.from_numpy(picture(0)).permute(2, 0, 1)
    if fit != "keep":
        expected = F.interpolate(expected[None], (10, 15), mode="bilinear", antialias=True)[0]
    if fit == "crop":
        expected = expected[:, :, 2:12]
    assert image.shape[1:] == shape
    assert torch.equal(image, expected)


def test_the_same_source_gives_the_same_bytes_for_any_number_of_workers(folder, tmp_path):
    for workers in (0, 2):
        packed(folder, tmp_path / f"{workers}.pack", size=12, workers=workers)
    assert (tmp_path / "0.pack").read_bytes() == (tmp_path / "2.pack").read_bytes()


def test_a_jpeg_that_is_kept_stays_byte_for_byte(tmp_path):
    place = tmp_path / "a" / "x"
    place.mkdir(parents=True)
    original = encoded(0, "JPEG")
    (place / "0.jpg").write_bytes(original)
    packed(tmp_path / "a", tmp_path / "x.pack", size=None, codec="jpeg")
    images = PackedImages(tmp_path / "x.pack")
    assert images.stored(0).tobytes() == original
    assert np.array_equal(images.pixels(0), np.asarray(Image.open(io.BytesIO(original))))


def test_a_turned_jpeg_is_stored_upright(tmp_path):
    place = tmp_path / "a" / "x"
    place.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(0)).save(place / "0.jpg", exif=exif)
    for codec in ("raw", "jpeg"):
        packed(tmp_path / "a", tmp_path / f"{codec}.pack", size=None, codec=codec)
        assert PackedImages(tmp_path / f"{codec}.pack").shape == (30, 20)


def test_a_webdataset_tar_and_a_dataset_give_the_folders_pixels(folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for index in range(6):
            for name, data in ((f"{index}.png", encoded(index)), (f"{index}.cls", str(index % 2).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pairs = [(Image.fromarray(picture(index)), index % 2) for index in range(6)]
    for name, source in (("tar", tmp_path / "x.tar"), ("pairs", pairs)):
        packed(source, tmp_path / f"{name}.pack", size=None)
        images = PackedImages(tmp_path / f"{name}.pack")
        assert images.labels.tolist() == [0, 1, 0, 1, 0, 1]
        assert all(np.array_equal(images.pixels(index), picture(index)) for index in range(6))


def test_a_grey_picture_is_stored_in_three_channels(tmp_path):
    packed([(picture(0)[..., 0], 0)], tmp_path / "x.pack", size=None)
    assert np.array_equal(PackedImages(tmp_path / "x.pack").pixels(0), picture(0)[..., :1].repeat(3, 2))


def test_a_broken_picture_is_named_or_left_out_and_reported(folder, tmp_path, caplog):
    (folder / "ant" / "2.png").write_bytes(encoded(2)[:50])
    with pytest.raises(DataError, match=r"ant/2\.png: .*on_error='skip'"):
        packed(folder, tmp_path / "x.pack")
    assert not (tmp_path / "x.pack").exists()
    with caplog.at_level(logging.WARNING):
        report = packed(folder, tmp_path / "x.pack", on_error="skip")
    assert report.samples == 5
    assert [name.endswith("ant/2.png") for name, _ in report.skipped] == [True]
    assert "ant/2.png" in caplog.text


def test_shards_laid_end_to_end_are_the_dataset(folder, tmp_path):
    report = packed(folder, tmp_path / "x.pack", size=None, shards=4)
    assert [path.name for path in report.paths] == [f"x-{k:05d}-of-00004.pack" for k in range(4)]
    packed(folder, tmp_path / "one.pack", size=None)
    shards, one = PackedImages(tmp_path / "x-*.pack"), PackedImages(tmp_path / "one.pack")
    assert len(shards) == 6
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(shards, one, strict=True))


def test_a_dataset_survives_the_workers_of_a_stock_dataloader(folder, tmp_path):
    packed(folder, tmp_path / "x.pack", size=8)
    loader = torch.utils.data.DataLoader(PackedImages(tmp_path / "x.pack"), 3, num_workers=1, multiprocessing_context="forkserver")
    assert [tuple(image.shape) for image, _ in loader] == [(3, 3, 8, 8)] * 2


def test_damage_is_found_when_the_sample_is_read_unless_it_is_not_looked_for(folder, tmp_path):
    path = tmp_path / "x.pack"
    packed(folder, path, size=8)
    with path.open("r+b") as file:
        file.seek(4096 + 2 * 192 + 5)
        file.write(b"\x00\x01\x02")
    PackedImages(path)[1]
    with pytest.raises(DataError, match=r"x\.pack: damaged at byte 4480: sample 2 does not match its checksum"):
        PackedImages(path)[2]
    assert PackedImages(path, verify="open")[2][0].shape == (3, 8, 8)


def test_what_cannot_work_is_refused_before_anything_is_read(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"(?s)6 problems:.*size.*codec.*fit.*quality.*shards.*on_error"):
        packed("nowhere", tmp_path / "x.pack", size=0, codec="gif", fit="x", quality=0, shards=0, on_error="x")
    with pytest.raises(DataError, match=r"nowhere: neither a folder of <class>/<picture> nor a webdataset tar"):
        packed("nowhere", tmp_path / "x.pack")
    with pytest.raises(DataError, match="no pictures found"):
        packed(folder / "ant", tmp_path / "x.pack")
    (tmp_path / "both" / "train").mkdir(parents=True)
    (tmp_path / "both" / "val").mkdir()
    with pytest.raises(DataError, match=r"both holds train and val, which are no classes. Give each by itself: .*both.train"):
        packed(tmp_path / "both", tmp_path / "x.pack")
    packed(folder, tmp_path / "x.pack")
    with pytest.raises(DataError, match=r"x\.pack: exists already.*overwrite=True"):
        packed(folder, tmp_path / "x.pack")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match=r"about .* GB are needed and 1e-06 GB are free"):
        packed(folder, tmp_path / "y.pack")


def test_every_broken_picture_is_listed_and_nothing_written(tmp_path, pictures):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    for name in ("dark/1.png", "light/5.png"):
        (root / name).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2 problems:\n  - .*dark/1\.png.*\n  - .*light/5\.png"):
        pack(root, tmp_path / "x.pack", size=8, workers=0, on_error="report", progress=False)
    assert not (tmp_path / "x.pack").exists()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda content: content[:700], "not a whole, uncompressed tar"),
        (gzip.compress, "not a whole, uncompressed tar"),
        (lambda content: content.replace(b"\n7\n", b"\nx\n"), r"class of sample '0' is a whole number as text; got b'\\nx\\n'"),
    ],
    ids=["cut", "compressed", "no number"],
)
def test_a_tar_that_cannot_be_read_is_a_data_error_that_names_it(tmp_path, damage, match):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("0.png", encoded(0)), ("0.cls", b"\n7\n")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    path = tmp_path / "x.tar"
    path.write_bytes(damage(buffer.getvalue()))
    with pytest.raises(DataError, match=match):
        packed(path, tmp_path / "x.pack", size=None)
