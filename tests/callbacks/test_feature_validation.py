"""Validation answers with what the prefix said once, and its metrics are those of the run that asks it every time."""

import pytest
import torch
from _transfer import Module, Net, fit, loader
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_cnn.callbacks import FeatureCache, GradualUnfreezing
from lightning_cnn.data import Resumable


class Metrics(Callback):
    """The loss of each validation, and how often the first convolution ran in it."""

    def __init__(self):
        self.losses, self.passes, self.on = [], [], False

    def setup(self, trainer, pl_module, stage):
        first = next(m for m in pl_module.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_hook(lambda *_: self.passes.__setitem__(-1, self.passes[-1] + 1) if self.on else None)

    def on_validation_start(self, trainer, pl_module):
        self.on = not trainer.sanity_checking
        self.passes += [0] * self.on

    def on_validation_end(self, trainer, pl_module):
        if self.on:
            self.losses.append(float(trainer.callback_metrics["val/loss"]))
        self.on = False


def watched(*callbacks, val, epochs=3, module=None, **settings):
    metrics = Metrics()
    torch.manual_seed(0)
    module = module or Module(net=Net(), momentum=0.9)
    fit(module, *callbacks, metrics, epochs=epochs, data=loader(shuffle=True), val=val, **settings)
    return metrics


def frozen():
    return GradualUnfreezing(up_to=1)


VALIDATIONS = {
    "loader": lambda: loader(20),
    "workers": lambda: DataLoader(loader(20).dataset, batch_size=8, num_workers=2),
    "shuffled": lambda: DataLoader(loader(20).dataset, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "this package's": lambda: Resumable(loader(20).dataset, batch_size=8),
}


@pytest.mark.parametrize("name", VALIDATIONS)
def test_metrics_are_identical_and_the_prefix_runs_in_the_first_validation_only(name):
    plain = watched(frozen(), val=VALIDATIONS[name]())
    cached = watched(frozen(), FeatureCache(), val=VALIDATIONS[name]())
    assert len(set(plain.losses)) == 3
    assert cached.losses == plain.losses
    assert [count > 0 for count in plain.passes] == [True, True, True]
    # A batch of other samples than before holds the same answers only up to rounding, so metrics are compared to the plain run's above.
    assert [count > 0 for count in cached.passes] == [True, False, False]


def test_several_validations_an_epoch_and_a_moving_prefix_change_nothing():
    def settings():
        return [GradualUnfreezing(every=2)]

    plain = watched(*settings(), val=loader(20), epochs=5, val_check_interval=0.5)
    cached = watched(*settings(), FeatureCache(), val=loader(20), epochs=5, val_check_interval=0.5)
    assert cached.losses == plain.losses and len(plain.losses) == 10
    assert [count > 0 for count in cached.passes[:4]] == [True, False, False, False]


class Shifted(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        image, label = loader(20).dataset[i]
        return image + torch.rand(()), label


def test_random_validation_pictures_are_never_remembered(caplog):
    with caplog.at_level("INFO", "lightning_cnn"):
        cached = watched(frozen(), FeatureCache(), val=DataLoader(Shifted(), batch_size=8))
    assert "validation runs as without it: its data are random" in caplog.text
    assert 0 not in cached.passes


class Nameless(Dataset):
    """The same pictures every time, and nothing by which a later run could know them."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return loader(20).dataset[i]


def test_pictures_that_no_folder_can_name_are_validated_as_without_it(tmp_path, caplog):
    def val():
        return DataLoader(Nameless(), batch_size=8)

    plain = watched(frozen(), val=val())
    with caplog.at_level("INFO", "lightning_cnn"):
        cached = watched(frozen(), FeatureCache(folder=str(tmp_path)), val=val())
    assert "validation goes on as without it: cannot tell whether the data of a Nameless" in caplog.text
    assert cached.losses == plain.losses and 0 not in cached.passes


class Twice(Module):
    """Looks at each picture and at its mirror image."""

    def validation_step(self, batch, batch_idx):
        image, label = batch
        logits = self(image) + self(image.flip(-1))
        self.log("val/loss", nn.functional.cross_entropy(logits, label))


def test_a_step_that_runs_the_prefix_twice_is_left_alone():
    plain = watched(frozen(), val=loader(20), module=Twice(net=Net()))
    cached = watched(frozen(), FeatureCache(), val=loader(20), module=Twice(net=Net()))
    assert cached.losses == plain.losses and cached.passes == plain.passes


class OtherWeights(Callback):
    """Validates with a moved first layer from the second validation on, as a callback that exchanges weights might."""

    def __init__(self):
        self.validations = 0

    def on_validation_start(self, trainer, pl_module):
        self.validations += not trainer.sanity_checking
        self.move(pl_module, self.validations > 1)

    def on_validation_end(self, trainer, pl_module):
        self.move(pl_module, self.validations > 1, back=True)

    @torch.no_grad()
    def move(self, pl_module, really, back=False):
        if really:
            next(pl_module.parameters()).mul_(0.5 if back else 2.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_exchanged_for_the_validation_are_asked_anew(workers):
    def val():
        return DataLoader(loader(20).dataset, batch_size=8, num_workers=workers)

    plain = watched(frozen(), OtherWeights(), val=val())
    cached = watched(frozen(), FeatureCache(), OtherWeights(), val=val())
    assert cached.losses == plain.losses


def test_what_does_not_fit_is_left_to_the_network(caplog):
    small = FeatureCache()
    with caplog.at_level("INFO", "lightning_cnn"):
        plain = watched(frozen(), val=loader(4000), epochs=2)
        small.memory_gib = 40 * 32 * 4 / 2**30
        cached = watched(frozen(), small, val=loader(4000), epochs=2)
    assert "validation goes on as without it" in caplog.text
    assert cached.losses == plain.losses and 0 not in cached.passes
