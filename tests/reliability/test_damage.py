"""A checkpoint of a real training state, damaged in every way that disks and strangers know: refused with a type of ours, never wrong."""

import os
import random

import pytest
import torch

from lightning_cnn.checkpoint import _file, load, save
from lightning_cnn.errors import CheckpointError

SEED = 1000 * int(os.environ.get("SOAK_ROUND", "0"))  # soak.py asks for other moments each round
SLICE, SOAK = 60, pytest.param(None, marks=pytest.mark.soak, id="soak")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Net, momentum and loops: some 80 KB."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.Linear(32, 256))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    state = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "loops": {str(k): {"total": k} for k in range(50)},
    }
    path = tmp_path_factory.mktemp("damage") / "last.ckpt"
    save(state, path)
    return path


def refused(path):
    with pytest.raises(CheckpointError):
        load(path)


@pytest.mark.parametrize("count", [SLICE, SOAK])
def test_flipped_bits(count, path, tmp_path, figure):
    whole, draw, damaged = bytearray(path.read_bytes()), random.Random(SEED + 1), tmp_path / "damaged.ckpt"
    bits = draw.sample(range(8 * len(whole)), count or 2000)
    for bit in bits:
        whole[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(whole)
        whole[bit // 8] ^= 1 << bit % 8
        refused(damaged)
    figure("single flipped bits of a checkpoint", len(bits), "0 silent, each a CheckpointError")


@pytest.mark.parametrize("count", [SLICE, SOAK])
def test_truncations(count, path, tmp_path, figure):
    whole, cut = path.read_bytes(), tmp_path / "cut.ckpt"
    lengths = range(0, min(len(whole), 65536), 1 if count is None else 65536 // count)
    cut.write_bytes(whole[: max(lengths)])
    for length in reversed(lengths):
        with cut.open("r+b") as file:
            file.truncate(length)
        refused(cut)
    figure("truncations within the first 64 KB of a checkpoint", len(lengths), "each a CheckpointError")


@pytest.mark.parametrize("count", [SLICE, SOAK])
def test_mutations_with_a_valid_checksum(count, path, tmp_path, figure):
    """Whoever writes a file can sign it; the parsers behind the checksum end with a type of ours or a checkpoint, and run nothing."""
    whole, draw, hostile, ends = path.read_bytes()[: -_file.COMMENT_BYTES], random.Random(SEED + 2), tmp_path / "hostile.ckpt", [0, 0]
    for _ in range(count or 20_000):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            # most of the structure is in the pickle at the start and the directory at the end
            place = draw.choice((draw.randrange(4096), draw.randrange(len(data) - 6000, len(data)), draw.randrange(len(data))))
            data[place] = draw.choice((0, 1, 0xFF, 0x80, draw.randrange(256)))
        if draw.random() < 0.2:
            start = draw.randrange(len(data))
            del data[start : start + draw.randrange(1, 300)]
        data[-2:] = bytes(2)
        with hostile.open("wb") as file:
            writer = _file._Signed(file)
            writer.write(bytes(data))
            writer.sign()
        try:
            assert isinstance(load(hostile), dict)
            ends[0] += 1
        except CheckpointError:
            ends[1] += 1
    figure("mutated checkpoints with a valid checksum", sum(ends), f"no crash, no hang: {ends[1]:,} refused, {ends[0]:,} still a dict")
