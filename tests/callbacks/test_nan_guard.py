"""`NaNGuard`: within the step, by name, and the weights stay finite."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_cnn.callbacks import NaNGuard
from lightning_cnn.data import Resumable
from lightning_cnn.errors import ConfigurationError, NumericsError

QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False) | {"accelerator": "cpu"}
POISONED = 21


class Pictures(torch.utils.data.Dataset):
    def __init__(self, poison):
        self.poison = poison

    def __len__(self):
        return 32

    def __getitem__(self, index):
        image = torch.rand(3, 6, 6)
        return (image * self.poison if index == POISONED else image), index % 3


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


class Net(LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
        )
        self.root, self.lr, self.losses = Root(), lr, []

    def training_step(self, batch, batch_idx):
        image, label = batch
        loss = nn.functional.cross_entropy(self.net(self.root(image)), label)
        self.log("loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(guard, poison=-1.0, model=None, **options):
    model = model or Net()
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [guard] if guard else [], **options})
    trainer.fit(model, Resumable(Pictures(poison), batch_size=4))
    return model


def finite(model):
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_stock_training_ends_with_weights_that_are_not_finite():
    assert not finite(fit(None))


@pytest.mark.parametrize(("poison", "place"), [(-1.0, "the output of layer 'root'"), (float("nan"), "the input")])
def test_stop_names_the_place_and_the_sample_and_leaves_a_file_that_repeats_it(poison, place, tmp_path):
    model = Net()
    with pytest.raises(NumericsError, match=rf"{place} is not finite, samples \[{POISONED}\]; to replay it: .*nan_step\d\.pt"):
        fit(NaNGuard(folder=tmp_path), poison, model)
    assert finite(model)
    (path,) = tmp_path.glob("nan_step*.pt")
    state = torch.load(path, weights_only=True)
    again = Net()
    again.load_state_dict(state["state_dict"])
    again.log = lambda *_: None
    loss = again.training_step((state["batch"]["image"], state["batch"]["label"]), state["batch_idx"])
    assert not loss.isfinite()
    assert (state["samples"], state["place"]) == ([POISONED], place)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_training_goes_on_with_finite_weights(action, accumulate, tmp_path, caplog):
    guard = NaNGuard(action=action, every=2, folder=tmp_path)
    model = fit(guard, accumulate_grad_batches=accumulate)
    assert finite(model)
    assert guard.events == 2
    assert sum(loss != loss for loss in model.losses) == 2 * 2, "each once, and once more when it was replayed"
    assert f"samples [{POISONED}]" in caplog.text


def test_a_skipped_step_changes_nothing(tmp_path):
    class Before(NaNGuard):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            events = self.events
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            self.skipped = self.events > events

        def on_train_batch_end(self, trainer, pl_module, *arguments):
            moved = not torch.equal(self.before, torch.cat([p.detach().flatten() for p in pl_module.parameters()]))
            assert moved != self.skipped
            super().on_train_batch_end(trainer, pl_module, *arguments)

    assert finite(fit(Before(action="skip", folder=tmp_path)))


def test_weights_out_of_range_after_a_finite_gradient():
    with pytest.raises(NumericsError, match=r"finite gradients took 'net\.1\.weight' out of range"):
        fit(NaNGuard(action="skip"), 1.0, Net(lr=float("inf")))
    model = fit(NaNGuard(action="rollback"), 1.0, Net(lr=float("inf")))
    assert finite(model)


def test_at_most_three_files(tmp_path):
    fit(NaNGuard(action="skip", folder=tmp_path), max_epochs=5)
    assert len(list(tmp_path.iterdir())) == 3


def test_it_checks_itself():
    with pytest.raises(ConfigurationError, match="2 problems"):
        fit(NaNGuard(action="hope", every=0))
