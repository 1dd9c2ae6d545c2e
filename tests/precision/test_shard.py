"""Shards of a parameter draw the noise of their place in the whole, whatever the layout, and train to the weights of one process."""

import os
import socket

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.rounding import as_format, round_stochastic
from lightning_cnn.precision import FixedPoint, LowBit, StochasticRounding
from lightning_cnn.precision._shard import write_back
from lightning_cnn.strategy import OneWeirdTrick

NOISE = {"seed": 1, "step": 2, "stream": "w"}


def _round_shards(rank: int, store: str, dim: int, size: tuple[int, ...]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    value = torch.randn(size, generator=torch.Generator().manual_seed(0))
    whole = round_stochastic(value, "bf16", **NOISE)
    shard = distribute_tensor(torch.zeros(size, dtype=torch.bfloat16), mesh, [Shard(dim)])
    write_back(shard, distribute_tensor(value, mesh, [Shard(dim)]), as_format("bf16"), **NOISE)
    same = torch.equal(shard.full_tensor(), whole)
    torch.distributed.destroy_process_group()
    assert same


@pytest.mark.forks
@pytest.mark.parametrize(("dim", "size"), [(0, (5, 3, 2)), (1, (5, 3, 2)), (0, (7,))])
def test_two_shards_make_the_rounded_whole(tmp_path, dim, size):
    mp.start_processes(_round_shards, (str(tmp_path / "store"), dim, size), nprocs=2, start_method="fork")


class Net(L.LightningModule):
    """The gradient is the same constant for every weight, in one process and in two."""

    def __init__(self, divide: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.divide = nn.Linear(6, 8), divide

    def configure_model(self) -> None:
        if self.divide == "data":
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])
        elif self.divide == "columns":
            parallelize_module(self, self.device_mesh["tensor_parallel"], {"layer": ColwiseParallel(output_layouts=Replicate())})

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).float().sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, foreach=False)


def fit(plugin, divide: str = "", epochs: int = 2, start=None, save=None) -> Net:
    strategies = {
        "": "auto",
        "outputs": OneWeirdTrick(),
        "data": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo"),
    }
    tensor = ModelParallelStrategy(1, 2, save_distributed_checkpoint=False, process_group_backend="gloo")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=2 if divide else 1,
        strategy=strategies.get(divide, tensor),
        plugins=plugin,
        use_distributed_sampler=False,
        **quiet,
    )
    model = Net(divide)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 6)), 2)
    run.fit(model, data, ckpt_path=start, weights_only=True)
    if save:
        run.save_checkpoint(save)
    return model


def weights(model: Net) -> dict[str, torch.Tensor]:
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name: value.detach() for name, value in whole.items()}


def _train(rank: int, port: int, folder, options: dict, divide: str) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="shards")
    whole = resumed = weights(fit(StochasticRounding(**options), divide))
    if divide == "columns" and options.get("format") != "fp16":  # torch's way to make empty moments spoils weights in float16
        fit(StochasticRounding(**options), divide, 1, save=folder / "half.ckpt")
        resumed = weights(fit(StochasticRounding(**options), divide, 2, folder / "half.ckpt"))
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    if rank == 0:
        torch.save(whole, folder / "weights.pt")


@pytest.mark.forks
@pytest.mark.parametrize("options", [{}, {"states": "bf16"}, {"states": "8bit"}, {"format": "fp16"}], ids=str)
def test_divided_weights_train_to_the_bits_of_whole_ones_and_resume(tmp_path, options):
    """Tensor parallel by columns, FSDP2, one weird trick."""
    found = {}
    for divide in ("columns", "data", "outputs"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(_train, (port, tmp_path, options, divide), nprocs=2, start_method="fork")
        found[divide] = torch.load(tmp_path / "weights.pt", weights_only=True)
    one = weights(fit(StochasticRounding(**options)))
    assert not torch.equal(one["layer.weight"].float(), Net().layer.weight.to(one["layer.weight"].dtype).float())
    for divide, whole in found.items():
        assert all(torch.equal(whole[name], value) and whole[name].dtype == value.dtype for name, value in one.items()), divide


@pytest.mark.parametrize("plugin", [FixedPoint, LowBit])
def test_plugins_that_look_at_whole_weights_refuse_shards(plugin):
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(1, 2), logger=False, enable_checkpointing=False)
    model = Net("columns")
    model.trainer = trainer
    with pytest.raises(ConfigurationError, match=f"{plugin.__name__} looks at whole weights, and ModelParallelStrategy divides them"):
        plugin().convert_module(model)
