"""Callbacks that change training batches stack in order, leave in any order, and know which sample is which."""

from collections import namedtuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_cnn.callbacks import BatchAugmentation, NetworkNoise
from lightning_cnn.callbacks._batch_hook import BatchTransform
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.batch import Batch, image_key, label_key, read, write

Pair = namedtuple("Pair", "x y")


class Letter(BatchTransform):
    """Appends its letter as a digit: order is visible in the result."""

    def __init__(self, digit: int, seed: int = 0) -> None:
        self.digit, self.seed, self.samples = digit, seed, []

    def transform(self, batch, samples):
        self.samples.append(samples)
        key = image_key(batch)
        return write(batch, {key: read(batch, key) * 10 + self.digit})


class Pictures(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, item):
        return torch.zeros(3, 2, 2), item


class Watcher(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "validate": [], "test": []}

    def note(self, stage, batch):
        self.seen[stage].append(read(batch, image_key(batch)).flatten()[0].item())
        return self.weight.sum()

    def training_step(self, batch, batch_idx):
        return self.note("train", batch)

    def validation_step(self, batch, batch_idx):
        self.note("validate", batch)

    def test_step(self, batch, batch_idx):
        self.note("test", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def collate(kind):
    def make(items):
        image, label = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
        return {
            "tuple": (image, label),
            "list": [image, label],
            "namedtuple": Pair(image, label),
            "dict": {"image": image, "label": label},
            "Batch": Batch(image, label, label + 100),
        }[kind]

    return make


def fit(kind, *callbacks, **options):
    model, loader = Watcher(), DataLoader(Pictures(), batch_size=4, collate_fn=collate(kind))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(**{"accelerator": "cpu", "max_epochs": 2, **quiet, "callbacks": list(callbacks), **options})
    trainer.fit(model, loader, loader)
    trainer.test(model, loader, verbose=False)
    return model, trainer


@pytest.mark.parametrize("kind", ["tuple", "list", "namedtuple", "dict", "Batch"])
def test_they_stack_in_the_order_of_the_list_in_training_alone(kind):
    model, trainer = fit(kind, Letter(1), Letter(2, seed=1))
    assert set(model.seen["train"]) == {12.0}
    assert set(model.seen["validate"]) == set(model.seen["test"]) == {0.0}
    assert "batch_to_device" not in trainer.strategy.__dict__


def test_samples_of_a_house_batch_are_keyed_by_index_and_of_a_foreign_one_by_position():
    house, foreign = Letter(1), Letter(1)
    fit("Batch", house)
    fit("tuple", foreign, accumulate_grad_batches=2)
    assert [s.index.tolist() for s in house.samples[:2]] == [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert [s.moment for s in house.samples] == [("epoch", 0), ("epoch", 0), ("epoch", 1), ("epoch", 1)]
    assert [s.index.tolist() for s in foreign.samples] == [[0, 1, 2, 3]] * 4
    assert len({s.key(0, "x") for s in foreign.samples}) == 4, "each batch has noise of its own, also while gradients accumulate"


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_removal_is_safe_in_any_order_and_under_a_foreign_wrapper(first_to_leave):
    model, trainer = fit("tuple")
    transforms = [Letter(1), Letter(2, seed=1)]
    bare = trainer.strategy.batch_to_device
    for transform in transforms:
        transform.setup(trainer, model, "fit")
    ours = trainer.strategy.batch_to_device
    transforms[first_to_leave].teardown(trainer, model, "fit")
    assert trainer.strategy.batch_to_device is ours
    trainer.strategy.batch_to_device = wrapper = lambda *args, **kwargs: ours(*args, **kwargs)
    transforms[1 - first_to_leave].teardown(trainer, model, "fit")
    assert trainer.strategy.batch_to_device is wrapper, "somebody else's wrapper is not ours to remove"
    assert ours([torch.ones(1)])[0].item() == 1.0
    assert bare == trainer.strategy.__class__.batch_to_device.__get__(trainer.strategy)


def test_two_of_a_kind_with_one_seed_and_a_module_that_fetches_its_own_batches_are_refused_together():
    class OwnFetch(Watcher):
        def training_step(self, dataloader_iter):
            return self.weight.sum()

    letters = [Letter(1), Letter(2)]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=letters)
    with pytest.raises(ConfigurationError, match="2 problems") as caught:
        letters[0].setup(trainer, OwnFetch(), "fit")
    assert "same noise" in str(caught.value)
    assert "dataloader_iter" in str(caught.value)


def test_a_batch_without_images_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"images of a batch were not found; the batch is a dict with \['pixels'\]"):
        image_key({"pixels": torch.zeros(1)})
    assert label_key(Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1))) == "label"


SHARES = {0: [0, 1, 2, 3], 1: [6, 2, 5, 0]}  # the sample numbers of each process: 0 and 2 are met by both


class SameEverywhere(LightningModule):
    """Every sample is the same picture and the weights stand still: what differs is noise."""

    def __init__(self, folder, kind):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
        self.folder, self.kind, self.found = folder, kind, []

    def train_dataloader(self):
        index = torch.tensor(SHARES[self.global_rank])
        image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(5)).expand(4, 3, 8, 8)
        return DataLoader([Batch(image, index % 4, index) if self.kind == "Batch" else (image, index % 4)], batch_size=None)

    def training_step(self, batch, batch_idx):
        image, _ = batch
        logits = self.net(image)
        self.found.append((image.clone(), logits.detach().clone()))
        return 0 * logits.sum()

    def on_train_end(self):
        torch.save(self.found, self.folder / f"{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.forks
@pytest.mark.parametrize("kind", ["Batch", "tuple"])
def test_two_processes_give_equal_samples_equal_noise_and_others_their_own(kind, tmp_path):
    """A batch that knows its samples is keyed by them; of another only the place in the global batch is known, and no two share it."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [BatchAugmentation(augment=["affine", "jitter"]), NetworkNoise(dropout=0.5)]
    strategy = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    Trainer(accelerator="cpu", max_epochs=2, callbacks=callbacks, **strategy, **quiet).fit(SameEverywhere(tmp_path, kind))
    seen = {}
    for rank, share in SHARES.items():
        for epoch, fields in enumerate(torch.load(tmp_path / f"{rank}.pt")):
            for place, sample in enumerate(share):
                who = sample if kind == "Batch" else (rank, place)
                seen.setdefault((epoch, who), []).append(torch.cat([field[place].flatten() for field in fields]))
    assert len(seen) == (12 if kind == "Batch" else 16)
    assert all(torch.allclose(looks[0], again, rtol=1e-5, atol=1e-6) for looks in seen.values() for again in looks)
    looks = torch.stack([looks[0] for looks in seen.values()])
    for part in (looks[:, :-4], looks[:, -4:]):  # the picture, and what the network with its noise made of it
        assert len(part.unique(dim=0)) == len(seen), "no two samples, and no two epochs of one, look alike"
