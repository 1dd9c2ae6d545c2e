"""Shards of a parameter draw the noise of their place in the whole, whatever the layout."""

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_cnn.functional.rounding import as_format, round_stochastic
from lightning_cnn.precision._shadow import Piece
from lightning_cnn.precision._shard import write_back

NOISE = {"seed": 1, "step": 2, "stream": "w"}


def _round_shards(rank: int, store: str, dim: int, size: tuple[int, ...]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    value = torch.randn(size, generator=torch.Generator().manual_seed(0))
    whole = round_stochastic(value, "bf16", **NOISE)
    shard = distribute_tensor(torch.zeros(size, dtype=torch.bfloat16), mesh, [Shard(dim)])
    write_back(Piece(shard), distribute_tensor(value, mesh, [Shard(dim)]), as_format("bf16"), "stochastic", **NOISE)
    same = torch.equal(shard.full_tensor(), whole)
    torch.distributed.destroy_process_group()
    assert same


@pytest.mark.forks
@pytest.mark.parametrize(("dim", "size"), [(0, (5, 3, 2)), (1, (5, 3, 2)), (0, (7,))])
def test_two_shards_make_the_rounded_whole(tmp_path, dim, size):
    mp.start_processes(_round_shards, (str(tmp_path / "store"), dim, size), nprocs=2, start_method="fork")
