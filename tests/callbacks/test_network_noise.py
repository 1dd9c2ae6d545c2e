"""Noise in the network is a function of (seed, epoch, sample) in training, and absent everywhere else."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import Marginalize, MCDropout, NetworkNoise
from lightning_cnn.errors import ConfigurationError, NoEffectWarning, UnsupportedLayerError
from lightning_cnn.functional.batch import Batch

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
NOISES = [{"dropout": 0.5}, {"dropconnect": 0.5}, {"stochastic_depth": {"net.2": 0.5}}]
one_kind = pytest.mark.parametrize("noise", NOISES, ids=lambda noise: next(iter(noise)))


class Outputs(LightningModule):
    """Every sample is the same picture, and the weights never move: outputs differ by their noise alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
        self.found = {}

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        logits = self(batch.image)
        self.found.update({(self.current_epoch, i): row for i, row in zip(batch.index.tolist(), logits.detach(), strict=True)})
        return 0 * logits.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def collate(items):
    index = torch.tensor(items)
    return Batch(torch.ones(len(items), 3, 2, 2), index % 3, index)


def outputs(callback, order=range(12), batch_size=4):
    model = Outputs()
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(model, DataLoader(list(order), batch_size=batch_size, collate_fn=collate))
    return model.found


@one_kind
def test_a_sample_meets_the_same_noise_in_any_batch_of_its_epoch(noise):
    whole, parts = outputs(NetworkNoise(**noise), batch_size=12), outputs(NetworkNoise(**noise), reversed(range(12)), batch_size=5)
    for place, row in whole.items():
        torch.testing.assert_close(row, parts[place], rtol=1e-5, atol=1e-6)  # matrix products of 12 rows and of 5 sum in another order
    rows = torch.stack(list(whole.values()))
    assert len(rows.unique(dim=0)) > 1, "equal pictures differ by their noise"
    assert not torch.allclose(rows[:12], rows[12:]), "another epoch is other noise"
    other = outputs(NetworkNoise(**noise, seed=1), batch_size=12)
    assert not torch.allclose(rows, torch.stack(list(other.values()))), "another seed is other noise"


@one_kind
def test_global_generators_are_neither_read_nor_moved(noise):
    torch.manual_seed(3)
    first = outputs(NetworkNoise(**noise))
    torch.manual_seed(4)
    assert all(torch.equal(row, first[place]) for place, row in outputs(NetworkNoise(**noise)).items())


def test_marginalize_finds_the_noise_and_the_model_leaves_without_it():
    model, data = Outputs(), DataLoader(range(4), batch_size=4, collate_fn=collate)
    model.predict_step = lambda batch, batch_idx: model(batch.image)
    callbacks = [NetworkNoise(dropout=0.5), Marginalize(views=[MCDropout(16)])]
    averaged = Trainer(accelerator="cpu", callbacks=callbacks, **QUIET).predict(model, data)[0]
    plain = model(torch.ones(4, 3, 2, 2)).log_softmax(-1)
    assert not torch.allclose(averaged, plain, atol=1e-4)
    assert [name for name, _ in model.named_modules() if "injected" in name] == []


def test_what_cannot_work_is_refused_at_setup_by_name():
    with pytest.raises(UnsupportedLayerError, match="2 problems") as caught:
        outputs(NetworkNoise(dropout={"nett.*": 0.5}, dropconnect={"net.2": 0.5}))
    assert "no layer is called 'nett.*'" in str(caught.value)
    assert "layer 'net.2' is ReLU" in str(caught.value)
    with pytest.raises(ConfigurationError, match="would draw the same noise"):
        Trainer(accelerator="cpu", max_epochs=1, callbacks=[NetworkNoise(dropout=0.5), NetworkNoise(dropconnect=0.5)], **QUIET).fit(
            Outputs(), DataLoader(range(4), collate_fn=collate)
        )


def test_no_noise_is_no_effect_and_says_so():
    with pytest.warns(NoEffectWarning, match="asked for no noise"):
        outputs(NetworkNoise())
