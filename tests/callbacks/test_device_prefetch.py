"""Order, types and a loader's position survive prefetching. Copies need a GPU, so a lane that writes down what it is told stands in."""

from collections import namedtuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import DevicePrefetch
from lightning_cnn.callbacks._prefetch import Prefetched, mapped
from lightning_cnn.callbacks.device_prefetch import _problems
from lightning_cnn.data._loader import Resumable
from lightning_cnn.errors import ConfigurationError, NoEffectWarning
from lightning_cnn.functional.batch import Batch

Pair = namedtuple("Pair", "image label")


class Lane:
    def __init__(self):
        self.told = []

    def send(self, batch):
        self.told.append("send")
        return mapped(batch, lambda tensor: tensor + 0), "event"

    def receive(self, batch, event):
        assert event == "event"
        self.told.append("receive")
        return batch


BATCHES = {
    "tensor": lambda k: torch.tensor([k]),
    "tuple": lambda k: (torch.tensor([k]), "a word"),
    "dict": lambda k: {"image": torch.tensor([k]), "names": ["x"]},
    "named tuple": lambda k: Pair(torch.tensor([k]), torch.tensor([k])),
    "nested": lambda k: [{"a": (torch.tensor([k]),)}, 3],
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("depth", [1, 3])
def test_every_batch_comes_once_in_order_and_as_it_was(kind, depth):
    given = [BATCHES[kind](k) for k in range(5)]
    found = list(Prefetched(given, Lane(), depth))
    assert [str(batch) for batch in found] == [str(batch) for batch in given]
    assert [type(batch) for batch in found] == [type(batch) for batch in given]


def test_the_next_copy_is_under_way_before_a_batch_is_handed_out():
    lane = Lane()
    batches = iter(Prefetched(range(3), lane, 1))
    next(batches)
    assert lane.told == ["send", "receive", "send"]


def test_a_batch_s_index_stays_on_the_host():
    batch = Batch(torch.zeros(2), torch.zeros(2), torch.arange(2))
    moved = mapped(batch, lambda tensor: tensor.to("meta"))
    assert (moved.image.device.type, moved.index.device.type) == ("meta", "cpu")
    assert type(moved) is Batch and batch.image.device.type == "cpu"


def test_the_position_is_that_of_the_last_batch_delivered():
    samples = [(torch.tensor(float(k)), k) for k in range(12)]
    plain = Resumable(samples, batch_size=2, seed=3)
    ahead = Prefetched(Resumable(samples, batch_size=2, seed=3), Lane(), 2)
    for one, other in zip(plain, ahead, strict=True):
        assert torch.equal(one.index, other.index)
        assert ahead.state_dict() == plain.state_dict()


def test_a_run_stopped_inside_an_epoch_goes_on_with_the_next_batch():
    samples = [(torch.tensor(float(k)), k) for k in range(12)]
    first = Prefetched(Resumable(samples, batch_size=2, seed=3), Lane(), 2)
    batches = iter(first)
    seen = [next(batches).index.tolist() for _ in range(2)]
    second = Prefetched(Resumable(samples, batch_size=2, seed=3), Lane(), 2)
    second.load_state_dict(first.state_dict())
    seen += [batch.index.tolist() for batch in second]
    assert sorted(index for batch in seen for index in batch) == list(range(12))


def test_a_loader_without_a_state_is_given_none():
    assert not hasattr(Prefetched(DataLoader([1]), Lane(), 1), "state_dict")
    assert Prefetched(DataLoader([1, 2]), Lane(), 1).batch_size == 1


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "validate": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch[0].item())
        return (self.weight * batch).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["validate"].append(batch[0].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def test_a_trainer_s_loaders_pass_through_the_lane_in_training_and_evaluation(monkeypatch):
    lane, callback, model = Lane(), DevicePrefetch(), Net()
    monkeypatch.setattr(callback, "setup", lambda trainer, *a, **k: callback._attach(trainer, lane))
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, DataLoader(torch.arange(6.0), batch_size=2), DataLoader(torch.arange(4.0), batch_size=2))
    assert model.seen == {"train": [0, 2, 4] * 2, "validate": [0, 2] * 2}
    assert lane.told.count("receive") == 10
    assert "process_dataloader" not in vars(trainer.strategy)


def test_on_a_cpu_it_says_that_it_does_nothing():
    with pytest.warns(NoEffectWarning, match="no copy to hide"):
        Trainer(accelerator="cpu", max_epochs=1, callbacks=[DevicePrefetch()], **QUIET).fit(Net(), DataLoader(torch.arange(4.0)))


def test_hooks_that_want_the_batch_before_its_copy_are_named():
    class Own(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch

    (problem,) = _problems(Trainer(accelerator="cpu", **QUIET), Own())
    assert "Own.on_before_batch_transfer" in problem
    with pytest.raises(ConfigurationError, match="depth"):
        DevicePrefetch(depth=0)
