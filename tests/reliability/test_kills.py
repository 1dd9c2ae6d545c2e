"""Processes killed at random moments of writing: a final name is complete, and holds the last step that was saved."""

import os
import random
import resource
import signal
import time

import numpy as np
import pytest
from reliability import _job as job

from lightning_cnn.checkpoint import SafeCheckpointIO, _file
from lightning_cnn.data import PackedImages, pack
from lightning_cnn.errors import CheckpointError, DataError

pytestmark = pytest.mark.forks
SEED = 1000 * int(os.environ.get("SOAK_ROUND", "0"))  # soak.py asks for other moments each round
TRIALS = [3, pytest.param(None, marks=pytest.mark.soak, id="soak")]
ELSEWHERE = {"TMPDIR": "/dev/shm"}  # another file system than the target's


def killed_after(process, seconds):
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return job.ended(process)


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("background", [False, True], ids=["in the step", "in a thread"])
def test_training_killed_while_saving(trials, background, tmp_path, figure):
    draw, killed, lost = random.Random(SEED + int(background)), 0, 0
    for trial in range(trials or 70):
        folder = tmp_path / str(trial)
        folder.mkdir()
        count = folder / "count"

        def train(folder=folder, count=count):
            io = SafeCheckpointIO(background=background)
            job.train(job.Count(count), padding=300_000, saver=job.last_saver(folder), io=io, limit_val_batches=0, max_epochs=100)

        process = job.forked(train, ELSEWHERE if trial % 2 else None)
        while not (folder / "last.ckpt").exists():
            time.sleep(0.002)
        killed += killed_after(process, draw.uniform(0, 0.4)) == -signal.SIGKILL
        step = _file._load(str(folder / "last.ckpt"), "cpu")["global_step"]
        for file in folder.glob("*.ckpt"):
            _file._load(str(file), "cpu")  # not `load`, which would fall back
        done = int(count.read_text() or 0)
        lost += step < done - (1 if not background else 5)  # the step of the kill; in a thread also those still in line
    where = "in a thread" if background else "in the step"
    assert lost == 0
    figure(f"kill -9 of training while saving {where}, TMPDIR on another file system every second time", killed,
           f"0 unreadable files, {lost} lost a saved step")  # fmt: skip


@pytest.mark.parametrize("trials", TRIALS)
def test_packing_killed(trials, tmp_path, figure):
    pictures = [(np.full((24, 24, 3), k % 256, np.uint8), k % 3) for k in range(300)]
    draw, killed, there = random.Random(SEED + 2), 0, 0
    for trial in range(trials or 70):
        out = tmp_path / f"{trial % 2}.pack"
        work = lambda out=out: [pack(pictures, out, size=None, workers=0, overwrite=True, progress=False) for _ in range(100)]  # noqa: E731
        process = job.forked(work, ELSEWHERE if trial % 2 else None)
        killed += killed_after(process, draw.uniform(0.005, 0.25)) == -signal.SIGKILL
        if out.exists():
            there += 1
            images = PackedImages(out)
            assert all(np.array_equal(images.pixels(k), pictures[k][0]) for k in range(300))
    figure("kill -9 of packing", killed, f"0 unreadable files ({there} complete, the others absent)")


@pytest.mark.parametrize("trials", TRIALS)
def test_a_disk_that_fills_up_while_writing(trials, tmp_path, figure):
    """A limit on the size of files fails a write in the middle as a full disk does; then the process is killed as well."""
    good = {"state_dict": {"w": np.zeros(1)}, "global_step": 1}
    draw, path, refusals = random.Random(SEED + 3), tmp_path / "last.ckpt", 0
    _file.save(good, path)

    def write(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            _file.save({"state_dict": {"w": np.random.rand(400_000)}, "global_step": 2}, path)
        except CheckpointError as error:
            assert "the disk is full; nothing was written" in str(error)
            raise SystemExit(7) from None

    def write_pack(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            pack([(np.zeros((64, 64, 3), np.uint8), 0)] * 300, tmp_path / "x.pack", size=None, workers=0, progress=False)
        except DataError:
            raise SystemExit(7) from None

    for trial in range(trials or 60):
        work = write if trial % 2 else write_pack
        process = job.forked(lambda work=work: work(draw.randrange(1, 2_000_000)))
        refusals += job.ended(process) == 7
        assert _file._load(str(path), "cpu")["global_step"] == 1
        assert not (tmp_path / "x.pack").exists()
    assert refusals == (trials or 60)
    figure(
        "writes of checkpoints and packed files onto a full disk",
        refusals,
        "each a typed error, the file before untouched",
    )
