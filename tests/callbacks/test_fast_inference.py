"""A faster copy answers, agrees with the network, and is gone afterwards."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import FastInference
from lightning_cnn.errors import ConfigurationError, NoEffectWarning


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
        self.net[1].running_var.uniform_(0.5, 2)

    def forward(self, image):
        return self.net(image / 2)

    def predict_step(self, batch, batch_idx):
        return self(batch)


IMAGES = [torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]


def predicted(callback, model):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return torch.cat(
        Trainer(accelerator="cpu", callbacks=[callback] if callback else [], **quiet).predict(
            model, DataLoader(IMAGES, batch_size=None)
        )
    )


def test_a_folded_copy_answers_and_the_network_stays(monkeypatch):
    monkeypatch.setattr("lightning_cnn.callbacks.fast_inference.timed", lambda run, device: [next(seconds)])
    seconds = iter([2.0, 1.0])  # the network, and its folded copy
    model, callback = Net(), FastInference(switches=["folded"])
    plain = predicted(None, model)
    calls = []
    model.net[1].register_forward_hook(lambda *a: calls.append(1))
    fast = predicted(callback, model)
    assert len(calls) == 1  # the first batch's reference; folded copies have no batch norm
    assert torch.allclose(fast, plain, atol=1e-5)
    assert callback.error < 1e-5 and callback.trials[0].kept
    assert "forward" not in vars(model.net)


def test_a_copy_that_disagrees_is_refused(monkeypatch):
    monkeypatch.setattr("lightning_cnn.callbacks.fast_inference.timed", lambda run, device: [next(seconds)])
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr("lightning_cnn.callbacks.fast_inference._made", lambda name, net, best: (net, lambda x: best(x) * 1.1))
    model, callback = Net(), FastInference(switches=["folded"])
    with pytest.warns(NoEffectWarning, match="changed nothing"):
        assert torch.equal(predicted(callback, model), predicted(None, model))
    assert "off by" in str(callback.trials[0])


@pytest.mark.filterwarnings("ignore::lightning_cnn.errors.NoEffectWarning")
def test_what_cannot_be_used_is_named_with_the_reason():
    callback = FastInference(switches=["packed", "folded"])
    model = Net()
    model.net[1] = nn.Identity()
    predicted(callback, model)
    assert str(callback.trials[0]) == "packed needs 1-bit layers"
    assert str(callback.trials[1]).startswith("folded cannot be used: Sequential has no batch norm")


def test_wrong_arguments_are_named_together():
    with pytest.raises(ConfigurationError, match=r"3 problems:\n.*warp.*\n.*least.*\n.*max_error"):
        FastInference(switches=["warp"], least=0, max_error=0)
