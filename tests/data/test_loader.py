"""`Resumable`: the same batches for any workers, and through the Trainer's checkpoints to the bit."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from lightning_cnn.data import Resumable
from lightning_cnn.errors import DataError
from lightning_cnn.functional.batch import Batch

SAMPLES, BATCH = 22, 4
QUIET = dict(
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3
)


class Noisy(torch.utils.data.Dataset):
    """Images that carry their index, plus noise from all three global generators."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = torch.rand(3, 2, 2) + np.random.rand() + random.random()
        return torch.full((3, 2, 2), float(index)) + noise, index % 5


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(12, 5), []

    def training_step(self, batch, batch_idx):
        image, label = batch
        loss = torch.nn.functional.cross_entropy(self.layer(image.flatten(1)), label)
        self.seen.append((self.trainer.current_epoch, batch_idx, batch.index.tolist(), float(loss.detach())))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(loader, ckpt_path=None, callbacks=(), **options):
    torch.manual_seed(0)
    model = Recorder()
    Trainer(**{**QUIET, **options}, callbacks=list(callbacks)).fit(model, loader(), ckpt_path=ckpt_path)
    return model.seen


def loader(**options):
    return Resumable(Noisy(), **{"batch_size": BATCH, "seed": 1, **options})


def test_it_delivers_batches_that_know_their_samples():
    batch = next(iter(loader(shuffle=False)))
    assert isinstance(batch, Batch)
    assert batch.index.tolist() == [0, 1, 2, 3]
    assert batch.label.tolist() == [0, 1, 2, 3]
    assert batch.image.shape == (4, 3, 2, 2)


def test_workers_change_nothing_and_outlive_the_epoch():
    plain, busy = loader(), loader(num_workers=2)
    for _ in range(2):
        for one, other in zip(plain, busy, strict=True):
            assert torch.equal(one.image, other.image)
            assert torch.equal(one.index, other.index)


def test_noise_belongs_to_the_sample_and_the_epoch():
    def pictures(batch_size, epochs=1):
        source = loader(batch_size=batch_size)
        return [{int(i): image for b in source for i, image in zip(b.index, b.image, strict=True)} for _ in range(epochs)]

    (one,), (other, later) = pictures(4), pictures(7, 2)
    assert all(torch.equal(one[i], other[i]) for i in range(SAMPLES))
    assert not any(torch.equal(one[i], later[i]) for i in range(SAMPLES))


def test_the_callers_generators_are_left_alone():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    next(iter(loader()))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_images_of_different_shapes_are_named():
    with pytest.raises(DataError, match=r"samples \[0, 1\].*found torch.Size\(\[1\]\), torch.Size\(\[2\]\)"):
        next(iter(Resumable([(torch.zeros(1), 0), (torch.zeros(2), 1)], batch_size=2, shuffle=False)))


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (5, 0), (6, 0), (7, 0), (7, 2), (11, 0), (12, 0)])
def test_a_run_resumed_through_a_checkpoint_is_the_run_that_was_never_interrupted(tmp_path, step, workers):
    """An epoch is 6 batches: steps 6 and 12 are checkpoints on an epoch's last batch, where a stateful loader loses an epoch."""
    path = tmp_path / "x.ckpt"
    whole = fit(loader, callbacks=[SaveAt(step, path)])
    assert len(whole) == 18
    assert fit(lambda: loader(num_workers=workers), ckpt_path=path) == whole[step:]


@pytest.mark.parametrize("options", [{"limit_train_batches": 4}, {"reload_dataloaders_every_n_epochs": 1}])
@pytest.mark.parametrize("step", [3, 4, 6])
def test_it_resumes_when_the_trainer_cuts_or_reloads_epochs(tmp_path, step, options):
    path = tmp_path / "x.ckpt"
    whole = fit(loader, callbacks=[SaveAt(step, path)], **options)
    assert fit(loader, ckpt_path=path, **options) == whole[step:]
    assert len({tuple(seen[2]) for seen in whole if seen[1] == 0}) == 3


def test_a_loader_cycled_inside_an_epoch_resumes_where_it_was(tmp_path):
    class Pair(Recorder):
        def training_step(self, batch, batch_idx):
            self.extra = [*getattr(self, "extra", []), batch[1].index.tolist()]
            return super().training_step(batch[0], batch_idx)

    def run(**resume):
        torch.manual_seed(0)
        model = Pair()
        both = CombinedLoader([loader(batch_size=2), loader(batch_size=8)], "max_size_cycle")
        Trainer(**QUIET, callbacks=[SaveAt(9, tmp_path / "x.ckpt")] if not resume else []).fit(model, both, **resume)
        return model.seen, model.extra

    whole, resumed = run(), run(ckpt_path=tmp_path / "x.ckpt")
    assert resumed[0] == whole[0][9:]
    assert resumed[1] == whole[1][9:]


@pytest.mark.forks
@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_ranks_share_each_epoch(tmp_path, use_distributed_sampler):
    class Written(Recorder):
        def on_train_end(self):
            torch.save(self.seen, tmp_path / f"{self.global_rank}.pt")

    options = dict(devices=2, strategy="ddp_fork", use_distributed_sampler=use_distributed_sampler)
    Trainer(**{**QUIET, **options, "max_epochs": 2}).fit(Written(), loader(batch_size=3))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for epoch in range(2):
        parts = [[seen[2] for seen in rank if seen[0] == epoch] for rank in ranks]
        assert sorted(i for part in parts for batch in part for i in batch) == list(range(SAMPLES))
    global_batches = [a[2] + b[2] for a, b in zip(*ranks, strict=True)]
    one_process = loader(batch_size=6)
    assert global_batches == [batch.index.tolist() for _ in range(2) for batch in one_process]


class Broken(Noisy):
    """Samples 3 and 17 cannot be read."""

    def __getitem__(self, index):
        if index in (3, 17):
            raise DataError(f"picture {index} cannot be decoded")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_raised_skipped_and_counted_or_all_reported(num_workers):
    def broken(on_error):
        return Resumable(Broken(), batch_size=BATCH, seed=1, on_error=on_error, num_workers=num_workers)

    with pytest.raises(DataError, match="cannot be decoded"):
        list(broken("raise"))
    skipping = broken("skip")
    seen = torch.cat([batch.index for batch in skipping])
    assert sorted(seen.tolist()) == [index for index in range(SAMPLES) if index not in (3, 17)]
    assert skipping.left_out == {3: "picture 3 cannot be decoded", 17: "picture 17 cannot be decoded"}
    with pytest.raises(DataError, match=r"2 problems:\n  - sample 3: picture 3 .*\n  - sample 17: picture 17"):
        list(broken("report"))
