"""`PackedDataModule`: its lanes' pixels, its orders, its refusals, and a real run."""

import logging

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from lightning_cnn.data import PackedDataModule, PackedImages, pack
from lightning_cnn.data._ring import Ring
from lightning_cnn.errors import ConfigurationError, DataError
from lightning_cnn.kernels import resample

SAMPLES, SIDE = 22, 24


def picture(index, height=SIDE, width=SIDE):
    return torch.from_numpy(np.random.default_rng(index).integers(0, 256, (3, height, width), np.uint8))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    alike = [(picture(i), i % 3) for i in range(SAMPLES)]
    pack(alike, folder / "raw.pack", size=None, progress=False, workers=0)
    pack(alike, folder / "shard.pack", size=None, shards=3, progress=False, workers=0)
    pack(alike, folder / "jpeg.pack", size=None, codec="jpeg", progress=False, workers=0)
    pack([(picture(i, 20 + i, 30), i % 3) for i in range(SAMPLES)], folder / "any.pack", size=None, progress=False, workers=0)
    return folder


def module(path, **options):
    return PackedDataModule(**{"train": path, "batch_size": 4, "lane": "fused", "seed": 1, **options})


def delivered(path, shuffle=True, split="train", epochs=1, **options):
    """{sample: picture} of each epoch, from the whole of it."""
    loader = module(path, **options).loader(split, shuffle)
    epochs = [{int(i): image for b in loader for i, image in zip(b.index, b.image.clone(), strict=True)} for _ in range(epochs)]
    return epochs if len(epochs) > 1 else epochs[0]


def reference(stored, index, size, epoch=0, seed=1):
    """RandomResizedCrop and flip with torch, with the drawn box."""
    from lightning_cnn.functional import counter

    _, height, width = stored.shape
    box, flip, i = np.zeros((1, 4), np.int64), np.zeros(1, np.bool_), np.array([index])
    key = counter.key(seed, "augment", epoch)
    resample.random_resized_boxes(
        key, i, np.array([height]), np.array([width]), np.array([0.08, 1]), np.log(np.array([3 / 4, 4 / 3])), box
    )
    resample.random_flips(key, i, 0.5, flip)
    top, left, h, w = box[0]
    image = (
        F.interpolate(stored[None, :, top : top + h, left : left + w].float(), (size, size), mode="bilinear", antialias=True)[0] / 255
    )
    return image.flip(-1) if flip[0] else image


@pytest.mark.parametrize("name", ["raw.pack", "shard-*.pack", "jpeg.pack", "any.pack"])
def test_the_fused_lane_equals_torch_for_every_kind_of_file(files, name):
    images = PackedImages(files / name)
    got = delivered(files / name, size=16)
    assert sorted(got) == list(range(SAMPLES))
    for index, image in got.items():
        assert torch.allclose(image, reference(images[index][0], index, 16), atol=1e-4)


def test_noise_changes_with_the_epoch_and_the_seed_alone(files):
    first, second = delivered(files / "raw.pack", size=16, epochs=2)
    same = delivered(files / "raw.pack", size=16, batch_size=7, threads=3)
    other = delivered(files / "raw.pack", size=16, seed=2)
    assert all(torch.equal(first[i], same[i]) for i in range(SAMPLES))
    assert not any(torch.equal(first[i], second[i]) or torch.equal(first[i], other[i]) for i in range(SAMPLES))


@pytest.mark.parametrize("name", ["raw.pack", "shard-*.pack", "jpeg.pack"])
def test_the_gather_lane_delivers_the_stored_pixels(files, name):
    images = PackedImages(files / name)
    got = delivered(files / name, lane="gather")
    assert all(torch.equal(got[i], images[i][0]) for i in range(SAMPLES))


def test_lanes_agree_where_they_do_the_same_work(files):
    """A central crop of the whole picture: uint8 from both, in the same order."""
    options = {"val": files / "raw.pack", "crop": "center", "size": SIDE, "dtype": "uint8"}
    gather, fused = (module(None, lane=lane, **options).loader("val") for lane in ("gather", "fused"))
    for a, b in zip(gather, fused, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.label, b.label)


@pytest.mark.parametrize("name", ["raw.pack", "jpeg.pack"])
def test_the_dali_lane_does_the_work_of_the_fused_one(files, name):
    """Its antialiasing filter and JPEG decoder are its own: on white noise, some levels where another crop differs by a hundred."""
    options = {"size": 16, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    fused, dali = (delivered(files / name, lane=lane, **options) for lane in ("fused", "dali"))
    errors = torch.stack([(fused[i] - dali[i]).abs() * 255 * 0.25 for i in range(SAMPLES)])
    assert list(fused) == list(dali)
    assert errors.mean() < 1
    assert errors.max() < (16 if name == "raw.pack" else 30)


def test_the_dali_lane_pads_as_the_fused_one(files):
    fused, dali = (delivered(files / "raw.pack", lane=lane, crop="padded", dtype="uint8") for lane in ("fused", "dali"))
    assert all(torch.equal(fused[i], dali[i]) for i in range(SAMPLES))


def test_evaluation_takes_the_centre_without_noise(files):
    got = delivered(None, val=files / "raw.pack", split="val", size=21, dtype="uint8")
    assert all(torch.equal(got[i], picture(i)[:, 1:22, 1:22]) for i in range(SAMPLES))
    assert list(got) == list(range(SAMPLES))


def test_normalisation_and_padded_crops(files):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    got = delivered(files / "raw.pack", crop="padded", padding=0, flip=0, mean=mean, std=std)
    for i in range(SAMPLES):
        expected = (picture(i).float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert torch.allclose(got[i], expected, atol=1e-5)
    moved = delivered(files / "raw.pack", crop="padded", padding=3, flip=0, dtype="uint8")
    windows = {(y, x) for y in range(7) for x in range(7)}
    for i in range(SAMPLES):
        padded = F.pad(picture(i), (3, 3, 3, 3))
        assert any(torch.equal(moved[i], padded[:, y : y + SIDE, x : x + SIDE]) for y, x in windows)


def test_balanced_classes_come_equally_often_with_noise_of_their_own(tmp_path):
    pack([(picture(i), int(i >= 18)) for i in range(24)], tmp_path / "x.pack", size=None, progress=False, workers=0)
    loader = module(tmp_path / "x.pack", order="balanced", size=16).loader("train", True)
    batches = [(b.label.clone(), b.index.clone(), b.image.clone()) for b in loader]
    labels, index, image = (torch.cat(part) for part in zip(*batches, strict=True))
    assert labels.bincount().tolist() == [12, 12]
    assert index.max() < 24
    assert len(index[labels == 0].unique()) == 12
    assert len(image.flatten(1).unique(dim=0)) == 24


def test_weights_and_subsets_choose_samples(files):
    weights = [0.0] * 11 + [1.0] * 11
    assert set(delivered(files / "raw.pack", weights=weights)) == set(range(11, 22))
    assert set(delivered(files / "raw.pack", subset=[3, 5, 20])) == {3, 5, 20}
    assert set(delivered(files / "raw.pack", subset=[3, 5], weights=[0, 1])) == {5}


def test_batches_that_are_kept_are_not_overwritten(files):
    loader = module(files / "raw.pack", lane="gather").loader("train")
    kept = list(loader)
    assert all(torch.equal(image, picture(int(i))) for b in kept for i, image in zip(b.index, b.image, strict=True))


def test_a_buffer_is_used_again_only_when_nobody_holds_it():
    ring = Ring((4, 3), torch.float32)
    first = ring.take(4)
    part, address = first[1:2], first.data_ptr()
    del first
    assert ring.take(4).data_ptr() != address
    del part
    assert ring.take(4).data_ptr() == address


def test_a_loader_that_is_abandoned_stops_its_threads(files):
    import threading

    for _ in module(files / "raw.pack").loader("train"):
        break
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("lane")] == []


def test_damage_is_named_through_the_lane(files, tmp_path):
    data = bytearray((files / "raw.pack").read_bytes())
    data[4096 + 5 * 3 * SIDE * SIDE] ^= 1
    (tmp_path / "x.pack").write_bytes(data)
    with pytest.raises(DataError, match="sample 5 does not match its checksum"):
        delivered(tmp_path / "x.pack")
    assert len(delivered(tmp_path / "x.pack", verify="off")) == SAMPLES


def test_what_cannot_work_is_refused_at_setup_in_one_message(files):
    wrong = dict(lane="x", crop="x", dtype="x", order="x", size=0, flip=2, area=(0, 1), std=(0, 1, 1), ahead=0, train=None)
    with pytest.raises(
        ConfigurationError, match=r"(?s)10 problems:.*lane.*crop.*dtype.*order.*Name a packed.*size.*flip.*area.*std.*ahead"
    ):
        module(**{"path": None, **wrong}).setup()
    with pytest.raises(DataError, match=r"lane='gather' delivers the stored \(24, 24\); size=16 needs lane='fused'"):
        module(files / "raw.pack", lane="gather", size=16).setup("fit")
    with pytest.raises(DataError, match=r"samples differ in size; say which size="):
        module(files / "any.pack").setup("fit")
    with pytest.raises(DataError, match=r"(?s)3 problems:.*cannot cut 40 pixels from 24.*subset.*weights needs 2 numbers"):
        module(files / "raw.pack", size=40, crop="padded", subset=[0, 99], weights=[1]).setup("fit")
    with pytest.raises(ConfigurationError, match="no packed file for val"):
        module(files / "raw.pack").loader("val")


class Net(L.LightningModule):
    def __init__(self, classes=3, pooled=1):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(pooled), torch.nn.Flatten(), torch.nn.Linear(8 * pooled**2, classes)
        )
        self.losses = []

    def forward(self, image):
        return self.net(image.float() * (1 / 255) if image.dtype == torch.uint8 else image)

    def training_step(self, batch, batch_index):
        loss = F.cross_entropy(self(batch.image), batch.label)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_index):
        self.log("val_loss", F.cross_entropy(self(batch.image), batch.label), batch_size=len(batch.label))

    test_step = validation_step

    def predict_step(self, batch, batch_index):
        return self(batch.image)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


QUIET = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def test_it_trains_validates_tests_and_predicts(files, caplog):
    trainer, model, data = L.Trainer(**QUIET, max_epochs=1), Net(), module(files / "raw.pack", val=files / "jpeg.pack")
    with caplog.at_level(logging.INFO):
        trainer.fit(model, datamodule=data)
    assert "lane fused of train: 22 pictures, val: 22 pictures" in caplog.text
    assert data.classes == ["0", "1", "2"]
    assert trainer.test(model, datamodule=data, verbose=False)[0]["val_loss"] > 0
    assert sum(len(part) for part in trainer.predict(model, datamodule=data)) == SAMPLES


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The handwritten digits of scikit-learn, in colour."""
    images, labels = load_digits(return_X_y=True)
    pictures = torch.from_numpy(images[:400].reshape(-1, 1, 8, 8) * 15).to(torch.uint8).expand(-1, 3, 8, 8)
    path = tmp_path_factory.mktemp("digits") / "digits.pack"
    pack([(picture, int(label)) for picture, label in zip(pictures, labels, strict=False)], path, size=None, progress=False, workers=0)
    return path


WHOLE = {"crop": "center", "flip": 0.0, "size": 8}
SAME_WORK = {
    "whole pictures": [{"lane": "gather"}, {"cache": "device", "lane": "auto"}, *({"lane": x, **WHOLE} for x in ("fused", "dali"))],
    "whole pictures as uint8": [{"lane": "gather"}, *({"lane": x, **WHOLE, "dtype": "uint8"} for x in ("fused", "dali"))],
    "padded crops and flips": [{"lane": x, "crop": "padded", "padding": 1} for x in ("fused", "dali")],
}


@pytest.mark.parametrize("work", SAME_WORK)
def test_lanes_train_to_equal_losses_where_the_work_is_equal(digits, work):
    """To the bit: uint8 is scaled by the model as floats are by the lane, a product with 1/255 (a quotient has other last bits)."""
    losses = []
    for options in SAME_WORK[work]:
        torch.manual_seed(0)
        model = Net(classes=10, pooled=6)
        L.Trainer(**QUIET, max_epochs=2).fit(model, datamodule=module(digits, batch_size=20, **options))
        losses.append(model.losses)
    assert len(losses[0]) == 40
    assert sum(losses[0][-10:]) < sum(losses[0][:10])
    assert all(other == losses[0] for other in losses[1:])


def test_overfitting_repeats_the_same_batches(files):
    model = Net()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.0)
    options = {"crop": "center", "flip": 0.0}
    L.Trainer(**QUIET, max_epochs=2, overfit_batches=2).fit(model, datamodule=module(files / "raw.pack", **options))
    assert model.losses[:2] == model.losses[2:]
