"""Callbacks that work parameter by parameter are refused where a process has only some of the weights."""

import pytest
from lightning.pytorch import Trainer

from lightning_cnn.callbacks._sharded import sharded_problems
from lightning_cnn.strategy import OneWeirdTrick, Pipeline, Spatial, SyncDDP


@pytest.mark.parametrize(("kind", "refused"), [(Pipeline, True), (OneWeirdTrick, True), (Spatial, False), (SyncDDP, False)])
def test_strategies_that_scatter_the_weights_are_refused(kind, refused):
    problems = sharded_problems(Trainer(accelerator="cpu", devices=2, strategy=kind()), "EMA")
    assert bool(problems) == refused
    assert all(f"{kind.__name__} holds parameters in pieces" in problem for problem in problems)
