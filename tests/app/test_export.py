"""A checkpoint becomes one file that answers as the model does; what cannot be written is refused by name."""

import importlib.util
import json

import pytest
import torch
from safetensors import safe_open

from lightning_cnn.app.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a training run of one batch stands."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick = ["trainer.max_epochs=1", "+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "trainer.accelerator=cpu"]
        assert main(["train", *quick, "test=false"]) == 0
    return folder


@pytest.mark.parametrize("name", ["model.pt2", "weights.safetensors"])
def test_the_file_holds_the_model_and_its_class_names(trained, name, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert main(["export", f"out={name}"]) == 0
    assert "largest difference of a logit" in capsys.readouterr().out
    if name.endswith(".pt2"):
        extra = {"classes": ""}
        program = torch.export.load(trained / name, extra_files=extra).module()
        assert program(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).shape == (3, len(json.loads(extra["classes"])))
    else:
        with safe_open(str(trained / name), "pt") as file:
            assert len(json.loads(file.metadata()["classes"])) == 10


def test_onnx_is_written_or_its_extra_named(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    installed = importlib.util.find_spec("onnxscript") is not None and importlib.util.find_spec("onnx") is not None
    assert main(["export", "out=model.onnx"]) == (0 if installed else 2)
    said = capsys.readouterr()
    assert "largest difference" in said.out if installed else "lightning-cnn[export]" in said.err


def test_another_suffix_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert main(["export", "out=model.bin"]) == 2
    assert "choose one of .pt2, .onnx, .safetensors" in capsys.readouterr().err


def test_a_file_that_answers_differently_is_not_called_done(trained, monkeypatch):
    from lightning_cnn.app import export

    monkeypatch.chdir(trained)
    monkeypatch.setattr(export, "_weights", lambda model, pictures, out: lambda images: model(images) + 1)
    with pytest.raises(RuntimeError, match="answers differently"):
        main(["export", "out=weights.safetensors"])
