"""`SafeCheckpointIO`: whole or absent, verified or refused, plain, and never in the way of a step."""

import enum
import io
import logging
import os
import pickle
import random
import threading
import zipfile
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from lightning_cnn import files
from lightning_cnn.checkpoint import SafeCheckpointIO, _file, load, save
from lightning_cnn.checkpoint._plain import plain
from lightning_cnn.errors import CheckpointError

QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False) | {"accelerator": "cpu"}


def state(value=0.0, numbers=50):
    return {"state_dict": OrderedDict(w=torch.full((numbers,), value), b=torch.arange(3)), "epoch": 1, "loops": {"x": [1, None, "ä"]}}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one == other


@pytest.fixture
def path(tmp_path):
    save(state(), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


class Tiny(LightningModule):
    def __init__(self, folder=None, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 3), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_everybody_reads_what_it_writes(path):
    """torch, also with mmap, and the standard library's zip reader."""
    for checkpoint in (load(path), torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)):
        assert equal(checkpoint, state())
    assert zipfile.ZipFile(path).testzip() is None


def test_a_trainer_saves_resumes_and_tests_with_it(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, enable_version_counter=False)
    model = Tiny(folder=Path("somewhere"), width=np.int64(3))
    trainer = Trainer(max_epochs=1, callbacks=[saver], plugins=[SafeCheckpointIO()], **QUIET)
    trainer.fit(model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch=0-step=4.ckpt", "last.ckpt", "last.ckpt.previous"]
    again = Tiny.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (again.hparams.folder, again.hparams.width) == ("somewhere", 3)
    assert equal(dict(again.state_dict()), dict(model.state_dict()))
    resumed = Trainer(max_epochs=2, callbacks=[ModelCheckpoint(tmp_path)], plugins=[SafeCheckpointIO()], **QUIET)
    resumed.fit(Tiny(), ckpt_path="last")
    assert resumed.global_step == 8


class Colour(enum.Enum):
    RED = "red"


def test_what_people_put_into_hyper_parameters_becomes_plain(tmp_path, caplog):
    given = {
        "path": Path("a/b"), "number": np.float32(0.5), "list": np.array(["x"]), "array": np.arange(3), "colour": Colour.RED, "set": {1},
        "nested": OmegaConf.create({"a": [1, "${..b}"], "b": 2}), "kind": torch.bfloat16, "counter": Counter(a=2), "activation": partial(max),
    }  # fmt: skip
    save({"hyper_parameters": given, "hparams_type": dict}, tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert equal(loaded["hyper_parameters"].pop("array"), torch.arange(3))
    expected = {"path": "a/b", "number": 0.5, "list": ["x"], "colour": "red", "set": {1}, "nested": {"a": [1, 2], "b": 2}}
    assert loaded == {"hyper_parameters": {**expected, "kind": torch.bfloat16, "counter": Counter(a=2)}}
    assert "left out of the checkpoint, give them again to load_from_checkpoint: activation" in caplog.text


def test_state_without_a_plain_form_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"2 problems:[^;]*callbacks\.Mine\.f is a functools\.partial, which weights_only=True"):
        save({"callbacks": {"Mine": {"f": partial(max), "g": [object()]}}}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_the_copy_is_apart_from_training_and_keeps_ties_and_metadata():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    module = torch.nn.Linear(2, 2)
    given = {"state_dict": module.state_dict(), "tied": [weight, weight], "part": weight[:1]}
    copied = plain(given)
    with torch.no_grad():
        weight.fill_(1)
        module.weight.fill_(1)
    assert copied["tied"][0] is copied["tied"][1]
    assert copied["tied"][0].sum() == 0
    assert copied["part"].untyped_storage().nbytes() == 16
    assert not (copied["state_dict"]["weight"] == 1).any()
    assert copied["state_dict"]._metadata == module.state_dict()._metadata


def outcome(path):
    """Loaded as it was, refused with a type of ours, or wrong."""
    try:
        return "same" if equal(load(path), state()) else "WRONG"
    except CheckpointError as error:
        assert str(path) in str(error)
        return "refused"


def test_no_flipped_bit_is_silent(path, tmp_path):
    whole, draw, damaged = path.read_bytes(), random.Random(0), tmp_path / "damaged.ckpt"
    for _ in range(300):
        bit = draw.randrange(8 * len(whole))
        damaged.write_bytes(flipped(whole, bit))
        assert outcome(damaged) == "refused", bit


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_truncation_and_extension_is_refused(path, tmp_path):
    whole, cut = path.read_bytes(), tmp_path / "cut.ckpt"
    for length in [*range(0, len(whole) - 64, 41), *range(len(whole) - 64, len(whole))]:
        cut.write_bytes(whole[:length])
        assert outcome(cut) == "refused", length
    cut.write_bytes(whole + b"\0")
    assert outcome(cut) == "refused"


def test_damage_falls_back_on_the_file_before_with_a_warning(path, caplog):
    save(state(1.0), path)
    path.write_bytes(flipped(path.read_bytes(), 999))
    assert equal(load(path), state())
    assert "do not match their checksum. Loaded the one before it" in caplog.text
    path.unlink()
    assert equal(load(path), state())


def test_a_file_of_lightning_is_believed_after_its_crcs_and_refused_when_damaged(tmp_path, caplog):
    path = tmp_path / "stock.ckpt"
    torch.save(state(), path)
    assert outcome(path) == "same"
    assert "has no checksum of ours" in caplog.text
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(100):
        path.write_bytes(flipped(whole, draw.randrange(8 * len(whole))))
        assert outcome(path) in ("refused", "same")


class Hostile:
    def __reduce__(self):
        return os.system, ("echo pwned > pwned",)


def signed(data, path):
    """`data`, an archive, made to look like ours: whoever writes a file can write its checksum."""
    with path.open("wb") as file:
        writer = _file._Signed(file)
        writer.write(data)
        writer.sign()


def archive(*entries, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in entries:
            file.writestr(name, data)
    return buffer.getvalue()


PICKLE = ("x/data.pkl", pickle.dumps({"a": 1}, 2))
HOSTILE = {
    "a call of os.system": lambda: archive(("x/data.pkl", pickle.dumps({"a": Hostile()}, 2)), ("x/version", "3\n")),
    "a bomb": lambda: archive(PICKLE, ("x/data/0", bytes(10_000_000)), method=zipfile.ZIP_DEFLATED),
    "a way out": lambda: archive(PICKLE, ("../../etc/x", b"1")),
    "an absolute name": lambda: archive(PICKLE, ("/etc/x", b"1")),
    "a name twice": lambda: archive(PICKLE, PICKLE),
    "no pickle": lambda: archive(("x/version", "3\n")),
    "another pickle": lambda: archive(("x/data.pkl", b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR."), ("x/version", "3\n")),
    "not a dict": lambda: archive(("x/data.pkl", pickle.dumps([1], 2)), ("x/version", "3\n")),
    "nothing": lambda: archive(),
    "no archive": lambda: b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_file_with_a_valid_checksum_is_refused_and_not_run(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    signed(make(), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError):
        load(tmp_path / "x.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]


def test_weights_only_cannot_be_switched_off(path):
    with pytest.raises(CheckpointError, match="loads plain types only"):
        SafeCheckpointIO().load_checkpoint(path, weights_only=False)


def test_a_step_waits_for_the_copy_only_and_a_removal_for_its_turn(tmp_path, monkeypatch):
    go, real, plugin = threading.Event(), _file.write, SafeCheckpointIO()
    save(state(), tmp_path / "old.ckpt")
    monkeypatch.setattr(_file, "write", lambda *a: (go.wait(10), real(*a)))
    plugin.save_checkpoint(state(1.0), tmp_path / "new.ckpt")
    plugin.remove_checkpoint(tmp_path / "old.ckpt")
    assert (tmp_path / "old.ckpt").exists(), "removed while it was the only copy"
    assert not (tmp_path / "new.ckpt").exists()
    go.set()
    assert equal(plugin.load_checkpoint(tmp_path / "new.ckpt"), state(1.0))
    assert not (tmp_path / "old.ckpt").exists()
    plugin.teardown()


def test_a_full_disk_is_seen_before_and_while_writing_and_costs_nothing(path, monkeypatch):
    plugin = SafeCheckpointIO()
    usage = files.shutil.disk_usage
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"needed and .* free; the disk is full"):
        plugin.save_checkpoint(state(1.0), path)
    monkeypatch.setattr(files.shutil, "disk_usage", usage)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_file._Signed, "_pass_on", lambda self, data: setattr(self, "error", OSError(28, "x")) or full(self, data))
    plugin.save_checkpoint(state(1.0), path)
    plugin.remove_checkpoint(path)
    with pytest.raises(CheckpointError, match="the disk is full; nothing was written"):
        plugin.teardown()
    assert equal(load(path), state())
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_remote_paths_are_written_verified_and_fall_back(caplog):
    import fsspec

    store, address = fsspec.filesystem("memory"), "memory://run/last.ckpt"
    plugin = SafeCheckpointIO()
    for value in (0.0, 1.0):
        plugin.save_checkpoint(state(value), address)
    assert equal(plugin.load_checkpoint(address), state(1.0))
    store.pipe("/run/last.ckpt", flipped(store.cat("/run/last.ckpt"), 5000))
    assert equal(plugin.load_checkpoint(address), state())
    plugin.remove_checkpoint(address)
    plugin.teardown()
    assert store.find("/run") == []
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match="no such checkpoint"):
        load(address)
