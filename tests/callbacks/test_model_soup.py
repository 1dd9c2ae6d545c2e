"""Several checkpoints, one network."""

import lightning as L
import pytest
import torch
from _transfer import QUIET, Module, fit, loader, same, weights

from lightning_cnn.callbacks import ModelSoup
from lightning_cnn.errors import CheckpointError, ConfigurationError
from lightning_cnn.functional.weights import average


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three finetunings of one network; the third has gone wrong."""
    folder = tmp_path_factory.mktemp("runs")
    states = []
    for i, lr in enumerate((0.01, 0.02, 0.03)):
        module = Module(lr=lr)
        trainer = fit(module, epochs=2)
        if i == 2:
            torch.nn.init.normal_(module.model.fc.weight, std=100.0)
        trainer.save_checkpoint(folder / f"{i}.ckpt")
        states.append(weights(module))
    return folder, states


class Data(L.LightningDataModule):
    def val_dataloader(self):
        return loader()

    def test_dataloader(self):
        return loader(8)


class Inside(L.Callback):
    def on_test_batch_end(self, trainer, pl_module, *rest):
        self.weights = weights(pl_module)


def test_a_uniform_soup_is_the_mean_while_testing_and_gone_afterwards(runs):
    folder, states = runs
    module, inside = Module(), Inside()
    own = weights(module)
    L.Trainer(callbacks=[ModelSoup(members=[f"{folder}/*.ckpt"], method="uniform"), inside], **QUIET).test(
        module, loader(8), verbose=False
    )
    assert same(inside.weights, average(states))
    assert same(own, weights(module))


def test_a_greedy_soup_leaves_the_bad_one_out(runs):
    folder, _ = runs
    soup = ModelSoup(members=[f"{folder}/*.ckpt"])
    L.Trainer(callbacks=[soup], **QUIET).test(Module(), datamodule=Data(), verbose=False)
    assert soup.chosen and not any(name.endswith("2.ckpt") for name in soup.chosen)


def test_missing_checkpoints_and_a_missing_validation_set_are_refused_together():
    with pytest.raises(CheckpointError, match=r"2 problems(?s:.)*no checkpoint matches 'nowhere(?s:.)*method='uniform'"):
        L.Trainer(callbacks=[ModelSoup(members=["nowhere/*.ckpt"])], **QUIET).test(Module(), loader(8), verbose=False)


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt is no readable"):
        L.Trainer(callbacks=[ModelSoup(members=[f"{tmp_path}/bad.ckpt"], method="uniform")], **QUIET).test(
            Module(), loader(8), verbose=False
        )


def test_bad_settings_are_refused_together():
    with pytest.raises(ConfigurationError, match="2 problems"):
        ModelSoup(members=[], method="gradual")
