"""Every model trains, tests, predicts and exports, and its hyper-parameters are plain types."""

import lightning as L
import pytest
import torch

from lightning_cnn.data import Digits
from lightning_cnn.model import Classifier

CASES = {"classifier": lambda: Classifier(architecture="small_cnn", classes=10, in_channels=1)}
every = pytest.mark.parametrize("make", CASES.values(), ids=list(CASES))


def trainer():
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=1, limit_test_batches=1, **quiet)


@every
def test_fit_test_and_predict_run_and_training_moves_the_weights(make):
    model, data = make(), Digits(batch_size=16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner = trainer()
    runner.fit(model, data)
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert runner.test(model, data, verbose=False)
    assert runner.predict(model, data)


@every
def test_hyper_parameters_are_plain_types(make):
    def plain(value):
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return isinstance(value, str | int | float | bool | type(None))

    assert [name for name, value in make().hparams.items() if not plain(value)] == []


@every
def test_it_exports_to_a_program_with_the_same_answers(make):
    model = make().eval()
    picture = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    program = torch.export.export(model, (picture,), dynamic_shapes=({0: torch.export.Dim("b")},))
    other = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.allclose(program.module()(other), model(other), atol=1e-5)
