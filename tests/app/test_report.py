"""What a run leaves behind costs it next to nothing: the pictures evaluated are counted as they pass."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import torch

from lightning_cnn.app import _report
from lightning_cnn.data import Digits
from lightning_cnn.model import Classifier

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_the_answers_counted_while_testing_are_those_a_prediction_gives():
    data, model, answers = Digits(size_px=32), Classifier(architecture="squeezenet1_1", in_channels=1), _report.Answers()
    trainer = L.Trainer(accelerator="cpu", callbacks=[answers], limit_test_batches=3, limit_predict_batches=3, **QUIET)
    trainer.test(model, datamodule=data, verbose=False)
    first = answers.counts
    trainer.test(model, datamodule=data, verbose=False)
    np.testing.assert_array_equal(first, answers.counts)  # of the last test alone
    np.testing.assert_array_equal(answers.counts, _report.confusion(trainer, model, data, 10))


def test_the_schedule_shows_the_rates_that_the_steps_take():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": weights[:1], "name": "head"}, {"params": weights[1:], "name": "stem", "lr_factor": 0.1}]
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(groups, lr=1.0)])
    columns = {"SGD/head": [1.0, 0.5], "SGD/stem": [1.0, 0.5], "SGD": [0.2]}
    assert _report._effective(columns, trainer) == {"SGD/head": [1.0, 0.5], "SGD/stem": [0.1, 0.05], "SGD": [0.2]}


def test_outputs_that_are_not_logits_are_not_counted():
    answers = _report.Answers()
    for outputs in (None, torch.zeros(4), torch.zeros(4, 7)):
        answers.on_test_batch_end(
            None, Classifier(architecture="squeezenet1_1"), outputs, (torch.zeros(4, 3, 8, 8), torch.arange(4)), 0
        )
    assert answers.counts is None
