"""Every callback keeps one contract: off is absent, resume is exact, evaluation is untouched, an exception undoes it.

To add a callback, append a `Case` to CASES. What it holds is read in `Case`; nothing else here needs a change.
"""

import builtins
import inspect
import io
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn

from lightning_cnn.callbacks import (
    EMA,
    L2SP,
    ArchitectureSummary,
    BatchAugmentation,
    BatchNormReestimation,
    BottleneckMonitor,
    CutMix,
    DecafReport,
    DevicePrefetch,
    DiscriminativeLR,
    EvaluationReport,
    ExactResume,
    FastInference,
    FastTraining,
    FeatureCache,
    FrozenBatchNorm,
    GradualUnfreezing,
    HorizontalFlip,
    LeanLogging,
    Marginalize,
    MixUp,
    ModelSoup,
    NaNGuard,
    NetworkNoise,
    ProgressiveResizing,
    RandomErasing,
    SnapshotEnsemble,
    TemperatureScaling,
    TransferRecipe,
)
from lightning_cnn.data._loader import CountedLoader
from lightning_cnn.data._order import Order, shuffled
from lightning_cnn.functional.batch import Batch


@pytest.fixture(scope="module", autouse=True)
def folder():
    """Where reports are written, with one checkpoint for those that read some."""
    FOLDER.mkdir(exist_ok=True)
    torch.save({"state_dict": Tiny().state_dict()}, FOLDER / "other.ckpt")
    yield
    shutil.rmtree(FOLDER)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Callback]  # as small as still has an effect on the tiny model below
    off: Callable[[], Callback] | None = None  # arguments under which it must do nothing; None where absence is the only way
    plain_evaluation: bool = True  # False where validating, testing or predicting differently is the callback's purpose
    trains_differently: bool = True  # False where the callback only looks
    beside: Callable[[], list[Callback]] = list  # callbacks it needs before it, there with and without it


CASES = [
    Case("cutmix", lambda: CutMix(classes=3), off=lambda: CutMix(classes=3, p=0.0)),
    Case("mixup", lambda: MixUp(classes=3, alpha=1.0), off=lambda: MixUp(classes=3, p=0.0)),
    Case("batch_augmentation", lambda: BatchAugmentation(augment=["flip", "affine"]), off=lambda: BatchAugmentation(augment=[])),
    Case("batch_norm_reestimation", lambda: BatchNormReestimation(batches=2)),
    Case("discriminative_lr", DiscriminativeLR, off=lambda: DiscriminativeLR(factors=[1.0])),
    Case("ema", lambda: EMA(decay=0.5), off=lambda: EMA(start=10**6), plain_evaluation=False),
    Case("exact_resume", ExactResume, trains_differently=False),
    Case("frozen_batch_norm", lambda: FrozenBatchNorm(layers="all"), off=FrozenBatchNorm),
    Case("gradual_unfreezing", GradualUnfreezing, off=lambda: GradualUnfreezing(unfrozen=9)),
    Case("l2_sp", lambda: L2SP(alpha=0.1), off=lambda: L2SP(alpha=0, beta=0)),
    Case("nan_guard", lambda: NaNGuard(action="rollback", every=2), trains_differently=False),
    Case("network_noise", lambda: NetworkNoise(dropout=0.5, dropconnect={"net.3": 0.5}), off=NetworkNoise),
    Case("progressive_resizing", lambda: ProgressiveResizing(full_from=0.5, multiple_px=6), off=lambda: ProgressiveResizing(start=1.0)),
    Case("random_erasing", lambda: RandomErasing(p=1.0), off=lambda: RandomErasing(p=0.0)),
    Case("snapshot_ensemble", lambda: SnapshotEnsemble(cycles=2), plain_evaluation=False),
    Case("marginalize", lambda: Marginalize(views=[HorizontalFlip()]), off=lambda: Marginalize(), plain_evaluation=False),
    Case("feature_cache", FeatureCache, trains_differently=False, beside=lambda: [GradualUnfreezing(up_to=1)]),
    Case("transfer_recipe", lambda: TransferRecipe(similarity="high")),
    Case("temperature_scaling", TemperatureScaling, plain_evaluation=False, trains_differently=False),
    Case("evaluation_report", lambda: EvaluationReport(compare={"flip": ["flip"]}, folder=str(FOLDER)), trains_differently=False),
    Case("decaf_report", lambda: DecafReport(shots=[None], folder=str(FOLDER)), trains_differently=False),
    Case(
        "model_soup",
        lambda: ModelSoup(members=[str(FOLDER / "*.ckpt")], method="uniform"),
        plain_evaluation=False,
        trains_differently=False,
    ),
    Case("bottleneck_monitor", BottleneckMonitor, trains_differently=False),
    Case("fast_inference", FastInference, off=lambda: FastInference(switches=[]), plain_evaluation=False, trains_differently=False),
    Case("fast_training", FastTraining, off=lambda: FastTraining(switches=[]), trains_differently=False),
    Case("device_prefetch", DevicePrefetch, off=DevicePrefetch, trains_differently=False),
    Case("lean_logging", LeanLogging, trains_differently=False),
    Case("architecture_summary", lambda: ArchitectureSummary(), off=lambda: ArchitectureSummary(), trains_differently=False),
]

FOLDER = Path(tempfile.gettempdir()) / f"callbacks_contract_{os.getpid()}"
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SAMPLES, BATCH, EPOCHS = 12, 4, 2
STEPS = EPOCHS * SAMPLES // BATCH
IMAGES = torch.rand(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Loader(CountedLoader):
    """Order = f(epoch); its state is two integers, so that a resume is exact as far as the data goes."""

    def __init__(self) -> None:
        super().__init__(Order(SAMPLES, BATCH, draw=shuffled(SAMPLES)))

    def _load(self, epoch, plan):
        for index in map(torch.as_tensor, plan):
            yield Batch(IMAGES[index], index % 3, index)


class Data(LightningDataModule):
    def train_dataloader(self):
        return Loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Tiny(LightningModule):
    """Convolution, batch norm, head; writes down what it saw. `explode_in` names a hook that raises."""

    def __init__(self, explode_in: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )
        self.explode_in = explode_in
        self.seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        image, label = batch
        self.may_explode("training_step", batch_idx)
        self.seen.append(("train", image.clone(), batch.index.clone()))
        loss = nn.functional.cross_entropy(self(image), label)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.may_explode("validation_step", batch_idx)
        self.evaluate("validate", batch)

    def test_step(self, batch, batch_idx):
        self.evaluate("test", batch)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def evaluate(self, stage, batch):
        image, label = batch
        logits = self(image)
        self.seen += [(stage, image.clone(), batch.index.clone()), (stage + " logits", logits.clone(), batch.index.clone())]
        self.log("val_loss", nn.functional.cross_entropy(logits, label))

    def on_train_epoch_end(self):
        self.may_explode("on_train_epoch_end", 1)

    def may_explode(self, hook, batch_idx):
        if self.explode_in == hook and batch_idx == 1:
            raise RuntimeError(f"raised in {hook}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class SaveEachStep(Callback):
    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def trainer_with(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"accelerator": "cpu", "max_epochs": EPOCHS, **quiet, "callbacks": list(callbacks), **options})


def fitted(*callbacks: Callback, ckpt_path=None) -> tuple[Tiny, Trainer]:
    model, trainer = Tiny(), trainer_with(*callbacks)
    trainer.fit(model, Data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return model, trainer


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return [name for (name, a), (other_name, b) in pairs if name != other_name or a.dtype != b.dtype or not torch.equal(a, b)]


def shape_of(trainer: Trainer, model: nn.Module) -> dict[str, Any]:
    """All that a plugin may hang on a model or strategy, values of weights aside."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    modules = {
        name: (type(m), sorted(set(m.__dict__) - {"_trainer"}), [len(getattr(m, h)) for h in hooks])
        for name, m in model.named_modules()
    }
    return {
        "modules": modules,
        "parameters": {name: (type(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()},
        "strategy": sorted(trainer.strategy.__dict__),
    }


def left_behind(hook: str, callbacks: list[Callback]) -> dict[str, Any]:
    model, trainer = Tiny(explode_in=hook), trainer_with(*callbacks, num_sanity_val_steps=0)
    if not hook:
        trainer.fit(model, Data())
    else:
        with pytest.raises(RuntimeError, match=f"raised in {hook}"):
            trainer.fit(model, Data())
    return shape_of(trainer, model)


@every
@pytest.mark.filterwarnings("ignore::lightning_cnn.errors.NoEffectWarning")
def test_off_is_absent_to_the_last_bit(case):
    without, _ = fitted(*case.beside())
    off, _ = fitted(*case.beside(), *([case.off()] if case.off else []))
    assert differences(without, off) == []
    assert all(torch.equal(a[1], b[1]) for a, b in zip(without.seen, off.seen, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.trains_differently], ids=lambda case: case.name)
def test_it_has_an_effect(case):
    without, _ = fitted(*case.beside())
    on, _ = fitted(*case.beside(), case.make())
    assert differences(without, on) or not all(torch.equal(a[1], b[1]) for a, b in zip(without.seen, on.seen, strict=True))


@every
def test_a_run_resumed_at_any_step_ends_in_the_same_bits(case, tmp_path):
    whole, _ = fitted(*case.beside(), case.make(), SaveEachStep(tmp_path))
    for step in range(1, STEPS):
        resumed, trainer = fitted(*case.beside(), case.make(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert trainer.global_step == STEPS
        assert differences(whole, resumed) == [], f"resumed at step {step}"


@every
def test_it_never_leaks_into_evaluation(case):
    """The pictures are the raw ones, and outside of fit the logits are those of the bare model."""
    model, trainer = fitted(*case.beside(), case.make())
    bare = Tiny().eval()
    bare.load_state_dict(model.state_dict())
    model.seen.clear()
    trainer.validate(model, Data(), verbose=False)
    trainer.test(model, Data(), verbose=False)
    predictions = torch.cat(trainer.predict(model, Data()))
    order = torch.cat([index for stage, _, index in model.seen if stage == "test"])
    assert [stage for stage, image, index in model.seen if "logits" not in stage and not torch.equal(image, IMAGES[index])] == []
    if case.plain_evaluation:
        with torch.no_grad():
            expected = torch.cat([bare(IMAGES[index]) for index in order.split(BATCH)])
        assert torch.equal(predictions, expected)
        assert torch.equal(torch.cat([logits for stage, logits, _ in model.seen if stage == "test logits"]), expected)


@every
def test_validation_inside_fit_sees_raw_pictures(case):
    model, _ = fitted(*case.beside(), case.make())
    validated = [(image, index) for stage, image, index in model.seen if stage == "validate"]
    assert len(validated) >= EPOCHS * len(Loader())
    assert all(torch.equal(image, IMAGES[index]) for image, index in validated)


@every
@pytest.mark.parametrize(
    "hook", ["training_step", "validation_step", "on_train_epoch_end", ""], ids=lambda hook: hook or "no exception"
)
def test_nothing_is_left_behind_by_an_exception_or_a_whole_fit(case, hook):
    """Compared with the same run without the callback, because Lightning itself leaves attributes behind."""
    without, with_it = (left_behind(hook, callbacks) for callbacks in (case.beside(), [*case.beside(), case.make()]))
    assert with_it == without


@every
def test_the_constructor_is_keyword_only_and_touches_no_file(case, monkeypatch):
    parameters = inspect.signature(type(case.make())).parameters.values()  # made once, so that lazy imports are done
    assert [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY] == []

    def refuse(*args, **kwargs):
        raise AssertionError(f"the constructor did I/O: {args}")

    for owner, name in ((builtins, "open"), (io, "open"), (os, "open"), (socket, "socket")):
        monkeypatch.setattr(owner, name, refuse)
    case.make()
