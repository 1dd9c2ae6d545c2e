"""Marginalising inside a Trainer: all stages, any batch, compiled or not, on two processes, and nothing left behind."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.callbacks import HorizontalFlip, Marginalize, MCDropout, TenCrop
from lightning_cnn.errors import ConfigurationError, NoEffectWarning
from lightning_cnn.functional.batch import Batch

IMAGE = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABEL = torch.arange(12) % 3
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
VIEWS = (HorizontalFlip, MCDropout)


class Model(L.LightningModule):
    def __init__(self, as_dict=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
        with torch.no_grad():
            self.net[-1].weight.mul_(10)
        self.as_dict, self.logits = as_dict, []

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.test_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.logits.append(logits.detach().clone())
        self.log("loss", F.cross_entropy(logits, batch[1]), batch_size=len(logits), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        logits = self(batch[0])
        return {"logits": logits} if self.as_dict else logits

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def house(size, order=None):
    index = torch.arange(12) if order is None else order
    return DataLoader(
        index, batch_size=size, collate_fn=lambda rows: Batch(*(t[torch.stack(rows)] for t in (IMAGE, LABEL, torch.arange(12))))
    )


def foreign(size):
    return DataLoader(TensorDataset(IMAGE, LABEL), batch_size=size)


def trainer(*callbacks, **options):
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **QUIET, "callbacks": list(callbacks), **options})


def flipped_mean(model):
    with torch.no_grad():
        return ((model.eval().net(IMAGE).softmax(-1) + model.net(IMAGE.flip(-1)).softmax(-1)) / 2).log()


@pytest.mark.parametrize("module", [None, "net"])
def test_validation_test_and_prediction_see_the_log_of_the_mean_probability(module):
    model, callback = Model(), Marginalize(views=[HorizontalFlip()], module=module)
    expected = flipped_mean(model)
    for run in ("validate", "test"):
        model.logits.clear()
        loss = getattr(trainer(callback), run)(model, foreign(5), verbose=False)[0]
        torch.testing.assert_close(torch.cat(model.logits), expected)
        assert loss["loss"] == pytest.approx(F.cross_entropy(expected, LABEL).item(), rel=1e-5)
        prefix = {"validate": "val", "test": "test"}[run]
        assert loss[f"{prefix}_entropy"] == pytest.approx(-(expected.exp() * expected).sum(-1).mean().item(), rel=1e-5)
        assert 0 < loss[f"{prefix}_mutual_information"] <= math.log(2)
    torch.testing.assert_close(torch.cat(trainer(callback).predict(model, foreign(5))), expected)
    torch.testing.assert_close(
        callback.uncertainty["entropy"], callback.uncertainty["expected_entropy"] + callback.uncertainty["mutual_information"]
    )
    assert len(callback.uncertainty["entropy"]) == 12


def test_predictions_that_are_dictionaries_carry_their_uncertainty():
    parts = trainer(Marginalize(views=["flip", {"mc_dropout": 4}])).predict(Model(as_dict=True), foreign(5))
    assert [set(part) for part in parts] == [{"logits", "entropy", "expected_entropy", "mutual_information"}] * 3
    assert all(part["mutual_information"].shape == part["logits"].shape[:1] for part in parts)


@pytest.mark.parametrize("loader", [house, foreign])
def test_a_sample_is_predicted_alike_in_any_batch_split(loader):
    def predict(size, expand):
        return torch.cat(trainer(Marginalize(views=[HorizontalFlip(), MCDropout(5)], expand=expand)).predict(Model(), loader(size)))

    whole = predict(12, "late")
    for size, expand in ((5, "late"), (1, "late"), (4, "loop"), (12, "input")):
        torch.testing.assert_close(predict(size, expand), whole, rtol=1e-5, atol=1e-6)


class Raises(L.Callback):
    def __init__(self, hook):
        def explode(*args, **kwargs):
            raise KeyError(hook)

        setattr(self, hook, explode)


@pytest.mark.parametrize("hook", ["on_test_start", "on_test_batch_start", "on_test_batch_end", "on_test_epoch_end", "on_test_end"])
def test_an_exception_in_any_hook_undoes_it(hook):
    for callbacks in (lambda ours: (ours, Raises(hook)), lambda ours: (Raises(hook), ours)):
        model = Model()
        with pytest.raises(KeyError):
            trainer(*callbacks(Marginalize(views=["flip", {"mc_dropout": 2}], module="net"))).test(model, foreign(6), verbose=False)
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_two_of_them_come_and_go_in_any_order():
    model, expected = Model(), flipped_mean(Model())
    trainer(Marginalize(views=["flip"]), Marginalize(views=["flip"])).test(model, foreign(6), verbose=False)
    torch.testing.assert_close(torch.cat(model.logits), expected, msg="the mean over a picture and its mirror image is symmetric")
    assert "forward" not in model.__dict__


def test_validation_inside_fit_is_marginalised_and_training_is_not():
    plain = Model()
    trainer(max_steps=2, num_sanity_val_steps=0).fit(plain, foreign(6), foreign(12))
    marginal = Model()
    trainer(Marginalize(views=["flip"]), max_steps=2, num_sanity_val_steps=0).fit(marginal, foreign(6), foreign(12))
    torch.testing.assert_close(marginal.logits[-1], flipped_mean(plain))


@pytest.mark.parametrize("how", ["net", "module", "target"])
def test_compiled_modules_give_the_same_members(how):
    expected = torch.cat(trainer(Marginalize(views=["flip", {"mc_dropout": 3}])).predict(Model(), foreign(6)))
    model = Model()
    if how != "module":
        model.net = torch.compile(model.net, backend="eager")
    given = torch.compile(model, backend="eager") if how == "module" else model
    module = "net" if how == "target" else None
    plain = torch.cat(trainer().predict(given, foreign(6)))
    found = torch.cat(trainer(Marginalize(views=["flip", {"mc_dropout": 3}], module=module)).predict(given, foreign(6)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.cat(trainer().predict(given, foreign(6))), plain)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_any_precision_gives_normalised_log_probabilities(precision):
    callback = Marginalize(views=["flip", {"mc_dropout": 3}])
    found = torch.cat(trainer(callback, precision=precision).predict(Model(), foreign(6)))
    assert found.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(12, dtype=found.dtype))


class Write(L.Callback):
    def __init__(self, folder):
        self.folder, self.found = folder, []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.found.append((batch.index, pl_module.logits[-1]))

    def on_test_end(self, trainer, pl_module):
        torch.save([torch.cat(part) for part in zip(*self.found, strict=True)], self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.forks
def test_two_processes_predict_the_same_samples_alike(tmp_path):
    views = ["flip", {"mc_dropout": 4}]
    one = torch.cat(trainer(Marginalize(views=views)).predict(Model(), house(12)))
    trainer(Marginalize(views=views), Write(tmp_path), strategy="ddp_fork", devices=2).test(Model(), house(2), verbose=False)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    index = torch.cat([part[0] for part in parts])
    assert index.sort().values.tolist() == list(range(12))
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), one[index], rtol=1e-5, atol=1e-6)


def test_words_of_the_menu_and_objects_are_the_same_views():
    made = Marginalize(views=["flip", {"ten_crop": 3}, {"multi_scale": [4, 6]}, {"mc_dropout": {"k": 3}}, HorizontalFlip()]).views
    assert [view.count for view in made] == [2, 10, 2, 3, 2]
    with pytest.raises(
        ConfigurationError, match=r"'flop' is no view. Give an object such as HorizontalFlip\(\), or a word: flip, five_crop"
    ):
        Marginalize(views=["flop"])
    with pytest.raises(ConfigurationError, match="expand='never' is not known"):
        Marginalize(views=["flip"], expand="never")


def test_what_cannot_work_is_refused_with_its_reason():
    class Pair(Model):
        def forward(self, image):
            return self.net(image), image

        def test_step(self, batch, batch_idx):
            self(batch[0])

    with pytest.raises(ConfigurationError, match=r"Needed are logits .* the forward of Pair gives a tuple. Give module="):
        trainer(Marginalize(views=["flip"])).test(Pair(), foreign(6), verbose=False)
    with pytest.raises(ConfigurationError, match=r"module='nett' is no part of Model. Is it one of net"):
        trainer(Marginalize(views=["flip"], module="nett")).test(Model(), foreign(6), verbose=False)


def test_no_views_and_a_module_that_is_never_called_warn():
    with pytest.warns(NoEffectWarning, match="has no views"):
        trainer(Marginalize()).test(Model(), foreign(6), verbose=False)

    class Idle(Model):
        def test_step(self, batch, batch_idx):
            self.net(batch[0])

    with pytest.warns(NoEffectWarning, match=r"was never called. Check module="):
        trainer(Marginalize(views=[TenCrop(4)])).test(Idle(), foreign(6), verbose=False)
