"""The classifier: any network, weights that are reported, a checkpoint that stands alone."""

import lightning as L
import pytest
import torch
from safetensors.torch import save_file

from lightning_cnn.data import Digits
from lightning_cnn.errors import CheckpointError, ConfigurationError
from lightning_cnn.model import Classifier


def small(**options):
    return Classifier(**{"architecture": "small_cnn", "classes": 10, "in_channels": 1, **options})


def quiet(**options):
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**off, "enable_checkpointing": False, **options})


def test_uint8_and_unit_floats_are_the_same_picture():
    model = small(mean=[0.2], std=[0.5]).eval()
    picture = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(model(picture), model(picture.float() / 255))


def test_normalisation_is_inside_the_model():
    plain, normalised = small().eval(), small(mean=[0.5], std=[0.25]).eval()
    normalised.network.load_state_dict(plain.network.state_dict())
    picture = torch.rand(2, 1, 8, 8)
    assert torch.allclose(normalised(picture), plain((picture - 0.5) / 0.25), atol=1e-6)


def test_it_trains_tests_and_predicts_on_digits(tmp_path):
    data = Digits(shots=20, batch_size=50)
    model = small(lr=3e-3, schedule="one_cycle")
    trainer = quiet(max_epochs=8)
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["test_accuracy"] > 0.75  # chance is 0.1
    log_probability = torch.cat(trainer.predict(model, data))
    assert log_probability.shape == (600, 10)
    assert torch.allclose(log_probability.exp().sum(1), torch.ones(600), atol=1e-5)


def test_a_checkpoint_needs_no_weights_file_and_no_code(tmp_path):
    weights = tmp_path / "w.pth"
    source = small()
    torch.save(source.network.state_dict(), weights)
    model = small(weights=str(weights), mean=[0.1], std=[0.3], classes=[f"c{k}" for k in range(10)])
    trainer = quiet(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, Digits(batch_size=8))
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    weights.unlink()
    again = Classifier.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    assert again.classes == model.classes
    picture = torch.rand(2, 1, 8, 8)
    assert torch.equal(again.eval()(picture), model.eval()(picture))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_head_of_another_size_is_replaced_and_reported(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    state = small(classes=38).network.state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    model = small(weights=str(path))
    assert model.loaded.skipped == ("4.bias", "4.weight")
    assert torch.equal(model.network[0][0].weight, state["0.0.weight"])
    assert "2 skipped for their shape (4.bias, 4.weight)" in str(model.loaded)


@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_0", "mobilenet_v3_small", "resnet20", "vgg11", "googlenet"])
def test_grey_pictures_pass_through_any_network(architecture):
    model = Classifier(architecture=architecture, classes=3, in_channels=1 if architecture != "resnet20" else 3).eval()
    channels = 1 if architecture != "resnet20" else 3
    assert model(torch.randint(0, 256, (2, channels, 64, 64), dtype=torch.uint8)).shape == (2, 3)


def test_timm_networks_are_found_when_timm_is_there():
    assert Classifier(architecture="test_resnet", classes=3).eval()(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_what_cannot_work_is_said():
    with pytest.raises(ConfigurationError, match=r"architecture='resnet81'.*did you mean resnet18"):
        Classifier(architecture="resnet81")
    with pytest.raises(ConfigurationError, match=r"(?s)2 problems.*optimizer='adamm'.*schedule='cosin'"):
        small(optimizer="adamm", schedule="cosin")
    with pytest.raises(CheckpointError, match=r"there is no file nowhere/w\.pth"):
        small(weights="nowhere/w.pth")
    with pytest.raises(ConfigurationError, match=r"torchvision has IMAGENET1K_V1, DEFAULT for resnet18"):
        Classifier(architecture="resnet18", weights="IMAGENET")


def test_weights_of_another_network_or_no_tensors_are_refused(tmp_path):
    torch.save({"x": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds none of the tensors of small_cnn"):
        small(weights=str(tmp_path / "other.pth"))
    (tmp_path / "noise.pth").write_bytes(b"\x80\x04noise")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        small(weights=str(tmp_path / "noise.pth"))
