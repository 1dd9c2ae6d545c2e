"""Importing the package registers the names, and loads no strategy until one is used."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

import lightning_cnn.strategy
from lightning_cnn.strategy._names import NAMES, register


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_its_strategy(name):
    trainer = Trainer(accelerator="cpu", devices=2, strategy=name, logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is getattr(lightning_cnn.strategy, NAMES[name])


def test_registering_twice_changes_nothing():
    before = {name: StrategyRegistry[name] for name in NAMES}
    register()
    assert {name: StrategyRegistry[name] for name in NAMES} == before
