"""The lecture's rule, applied to a datamodule."""

import logging

import lightning as L
import pytest
import torch
from _transfer import QUIET, Module, Net, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.callbacks import TransferRecipe
from lightning_cnn.errors import ConfigurationError, NoEffectWarning


class Data(L.LightningDataModule):
    def __init__(self, n=40):
        super().__init__()
        self.n = n

    def train_dataloader(self):
        return loader(self.n)


class Trained(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.parts = {name.split(".")[1] for name, p in pl_module.named_parameters() if p.requires_grad}
        self.factors = [group.get("lr_factor") for group in trainer.optimizers[0].param_groups]


def run(recipe, n=40):
    trained, module = Trained(), Module(net=Net())
    L.Trainer(max_epochs=1, limit_train_batches=1, callbacks=[recipe, trained], **QUIET).fit(module, datamodule=Data(n))
    assert all(p.requires_grad for p in module.parameters())
    return trained


@pytest.mark.parametrize(
    ("n", "similarity", "name", "parts", "factors"),
    [
        (40, "high", "linear", {"fc"}, [None]),
        (40, "low", "stages", {"fc"}, [None]),
        (400, "high", "few_stages", {"body", "top", "norm", "fc"}, [1.0, 0.1, 0.01, 0.01]),
        (400, "low", "all_stages", {"stem", "body", "top", "norm", "fc"}, [1.0, 0.1, 0.1, 0.1]),
    ],
)
def test_each_cell_of_the_table_trains_what_it_says(n, similarity, name, parts, factors):
    recipe = TransferRecipe(similarity=similarity)
    trained = run(recipe, n)
    assert (recipe.recipe.name, trained.parts, trained.factors) == (name, parts, factors)


def test_auto_measures_and_says_what_it_chose_and_why(caplog):
    """Classes that differ in colour are known at the stem; untrained upper stages lose it."""
    recipe, labels = TransferRecipe(probe_images=60), torch.arange(60) % 4
    images = torch.randn(60, 3, 8, 8) + 3 * torch.eye(4)[labels][:, :3, None, None]

    class Colours(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(images, labels), batch_size=20)

    with caplog.at_level(logging.INFO, "lightning_cnn"):
        L.Trainer(max_epochs=1, callbacks=[recipe], **QUIET).fit(Module(net=Net()), datamodule=Colours())
    said = next(r.getMessage() for r in caplog.records if "transfer recipe" in r.getMessage())
    assert "for 60 pictures in 4 classes, similarity" in said
    assert ("similarity high (the top stage knows most" in said) or ("similarity low (" in said)


def test_bad_settings_and_missing_data_are_refused():
    with pytest.raises(ConfigurationError, match="2 problems"):
        TransferRecipe(similarity="medium", probe_images=1)
    with pytest.raises(ConfigurationError, match="datamodule"):
        L.Trainer(max_epochs=1, callbacks=[TransferRecipe()], **QUIET).fit(Module(), loader())


class Batches(L.LightningDataModule):
    """Classes that differ in colour, so that a linear classifier on the pooled features of any network knows them."""

    def train_dataloader(self):
        labels = torch.arange(60) % 4
        images = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(4)[labels][:, :3, None, None]
        return DataLoader(TensorDataset(images, labels), batch_size=20)


class FirstLoss(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not hasattr(self, "loss"):
            self.loss, self.random = float(outputs["loss"]), torch.get_rng_state()


def first_loss(**settings):
    torch.manual_seed(0)
    seen, net = FirstLoss(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU())
    net = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    trainer = L.Trainer(max_epochs=1, callbacks=[TransferRecipe(similarity="high", **settings), seen], **QUIET)
    trainer.fit(Module(net=net), datamodule=Batches())
    return seen.loss, seen.random


def test_the_head_starts_as_a_fitted_probe_and_draws_nothing_from_the_global_generator():
    """A network that knows nothing yet has a loss near log 4 = 1.39; the probe starts lower."""
    (untaught, random), (taught, random_too) = first_loss(head="as_is"), first_loss()
    assert taught < 1.2 < untaught
    assert torch.equal(random, random_too)


def test_a_head_that_cannot_start_as_a_probe_is_left_alone_and_said():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    trainer = L.Trainer(max_epochs=1, callbacks=[TransferRecipe(similarity="high")], **QUIET)
    with pytest.warns(NoEffectWarning, match=r"leaves the head as it is.*is a Conv2d"):
        trainer.fit(Module(net=net), datamodule=Batches())
