"""The lecture as a ladder: three labelled pictures a class, and each rung adds one idea."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from kornia.augmentation import RandomAffine
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save_file

from lightning_cnn import plot
from lightning_cnn.callbacks import Augmented, BatchAugmentation, DiscriminativeLR, FrozenBatchNorm, Marginalize
from lightning_cnn.data import Digits, Letters
from lightning_cnn.errors import ConfigurationError, raise_all
from lightning_cnn.functional.batch import Batch
from lightning_cnn.model import Classifier

HEAD = "4."  # the last layer of small_cnn


@dataclass(frozen=True)
class Rung:
    """One row of the table: what this training adds, as callbacks and settings."""

    name: str
    lr: float = 3e-3
    augment: bool = True
    pretrained: bool = False
    frozen: bool = False
    factors: tuple[float, ...] | None = None


RUNGS = (
    Rung("small CNN from scratch", augment=False),
    Rung("+ augmentation on the batch"),
    Rung("+ letters' features, frozen (DeCAF)", pretrained=True, frozen=True, lr=1e-2),
    Rung("+ fine-tuned: 1, 1/10, 1/100", pretrained=True, factors=(1.0, 0.1, 0.01), lr=1e-2),
)
MARGINALISED = "+ averaged over {views} views"


class DigitsLadder:
    """From scratch; with augmentation; with features of printed letters, frozen and fine-tuned; averaged over views when tested.

    Each seed chooses the labelled pictures, the initial weights and the noise, and climbs every rung; so the difference to the rung
    before is paired. The network that is transferred is trained once.

    Args:
        seeds: runs of each rung.
        shots: labelled pictures a class.
        epochs: of one batch each, as all labelled pictures fit into one.
        pretraining_epochs: on the letters.
        views: augmented views averaged over when testing.
    """

    def __init__(self, *, seeds: int = 5, shots: int = 3, epochs: int = 100, pretraining_epochs: int = 30, views: int = 16) -> None:
        least = {"seeds": 2, "shots": 1, "epochs": 1, "pretraining_epochs": 1, "views": 1}
        given = {"seeds": seeds, "shots": shots, "epochs": epochs, "pretraining_epochs": pretraining_epochs, "views": views}
        raise_all(
            [f"{name}={given[name]}: choose {low} or more" for name, low in least.items() if given[name] < low], ConfigurationError
        )
        self.seeds, self.shots, self.epochs, self.pretraining_epochs, self.views = seeds, shots, epochs, pretraining_epochs, views

    def __call__(self, folder: Path) -> Mapping[str, float]:
        """Climb, print the table, write the pictures and `report.md` into `folder`; returns the mean accuracy of each rung."""
        folder.mkdir(parents=True, exist_ok=True)
        threads, notes = torch.get_num_threads(), logging.getLogger("lightning_cnn")
        level = notes.level
        torch.set_num_threads(1)  # networks this small only wait for a second thread
        notes.setLevel(logging.WARNING)  # what each of 21 trainings has to say would tear the progress bar
        try:
            return self._all(folder)
        finally:
            torch.set_num_threads(threads)
            notes.setLevel(level)

    def _all(self, folder: Path) -> Mapping[str, float]:
        weights = folder / "letters.safetensors"
        scores: dict[str, list[float]] = {}
        seconds: dict[str, list[float]] = {}
        with Progress() as progress:
            bar = progress.add_task("printed letters", total=1 + self.seeds * len(RUNGS))
            letters = self._pretrain(weights)
            progress.advance(bar)
            for seed in range(self.seeds):
                for rung in RUNGS:
                    progress.update(bar, description=f"seed {seed}: {rung.name}")
                    for name, (score, took) in self._climb(rung, seed, weights, folder).items():
                        scores.setdefault(name, []).append(score)
                        seconds.setdefault(name, []).append(took)
                    progress.advance(bar)
        plot.ladder(scores).savefig(folder / "ladder.png")
        rows = [_row(name, scores, seconds) for name in scores]
        _show(rows, folder, letters, self)
        means = {name: float(np.mean(values)) for name, values in scores.items()}
        return means | {"test_accuracy": max(means.values())}

    def _pretrain(self, weights: Path) -> float:
        """Train on the letters with the same augmentation; returns the accuracy on three unseen fonts."""
        L.seed_everything(0, verbose=False)
        data = Letters(batch_size=128)
        model = Classifier(architecture="small_cnn", classes=Letters.classes, in_channels=1, lr=3e-3, schedule="one_cycle")
        trainer = _trainer(self.pretraining_epochs, [BatchAugmentation(augment=[affine()])])
        trainer.fit(model, train_dataloaders=_ready(data).train_dataloader())
        save_file(model.network.state_dict(), weights)
        return trainer.test(model, data, verbose=False)[0]["test_accuracy"]

    def _climb(self, rung: Rung, seed: int, weights: Path, folder: Path) -> dict[str, tuple[float, float]]:
        """Train one rung for one seed; the last rung is tested twice, plainly and averaged over views."""
        L.seed_everything(seed, verbose=False)
        data = _ready(Digits(shots=self.shots, batch_size=10 * self.shots, seed=seed))
        model = Classifier(
            architecture="small_cnn", classes=10, in_channels=1, lr=rung.lr, weights=str(weights) if rung.pretrained else None,
            mean=[0.0], std=[1.0],
        )  # fmt: skip
        begin = time.perf_counter()
        record = _Record() if rung.factors and seed == 0 else None
        trainer = _trainer(self.epochs, [*_callbacks(rung, model, seed), *([record] if record else [])])
        trainer.fit(model, train_dataloaders=data.train_dataloader())
        took = time.perf_counter() - begin
        scores = {rung.name: (_tested(model, data, []), took)}
        if rung is RUNGS[-1]:
            marginalize = Marginalize(views=[Augmented(self.views, augment=[affine()], seed=seed)])
            scores[MARGINALISED.format(views=self.views)] = (_tested(model, data, [marginalize]), took)
            if record:
                self._pictures(folder, model, data, record)
        return scores

    def _pictures(self, folder: Path, model: Classifier, data: Digits, record: "_Record") -> None:
        plot.schedule(record.rates).savefig(folder / "schedule.png")
        batch = next(iter(data.train_dataloader()))
        some = Batch(batch.image[:6], batch.label[:6], batch.index[:6])
        plot.augmentation_grid(BatchAugmentation(augment=[affine()]), some).savefig(folder / "augmentation.png")
        image, label = data.test.tensors
        with torch.inference_mode():
            answer = model.eval()(image).argmax(-1)
        counts = torch.bincount(label * 10 + answer, minlength=100).view(10, 10).numpy()
        plot.confusion_matrix(counts, Digits.classes).savefig(folder / "confusion_matrix.png")


def affine() -> RandomAffine:
    """The noise of every rung but the first, and of the views."""
    return RandomAffine(degrees=12.0, translate=(0.08, 0.08), scale=(0.9, 1.1), shear=10.0, p=1.0)


class _Record(L.Callback):
    """The rate that each parameter group learns with, and 0 where it is frozen."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: object, **__: object) -> None:
        for group in trainer.optimizers[0].param_groups:
            rate = group["lr"] * group.get("lr_factor", 1.0) if any(p.requires_grad for p in group["params"]) else 0.0
            self.rates.setdefault(str(group.get("name", "all")), []).append(rate)


def _callbacks(rung: Rung, model: Classifier, seed: int) -> list[L.Callback]:
    callbacks: list[L.Callback] = [BatchAugmentation(augment=[affine()], seed=seed)] if rung.augment else []
    if rung.frozen:
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad = name.startswith(HEAD)
        callbacks.append(FrozenBatchNorm())
    if rung.factors:
        callbacks.append(DiscriminativeLR(factors=rung.factors))
    return callbacks


def _trainer(epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _ready(data):
    data.setup()
    return data


def _tested(model: Classifier, data: Digits, callbacks: list[L.Callback]) -> float:
    return _trainer(1, callbacks).test(model, data.test_dataloader(), verbose=False)[0]["test_accuracy"]


def _row(name: str, scores: dict[str, list[float]], seconds: dict[str, list[float]]) -> tuple[str, ...]:
    names = list(scores)
    mean = f"{np.mean(scores[name]):.3f}"
    took = f"{np.mean(seconds[name]):.1f}"
    if name == names[0]:
        return name, mean, "", took
    paired = np.array(scores[name]) - np.array(scores[names[names.index(name) - 1]])
    return name, mean, f"{paired.mean():+.3f} ± {paired.std(ddof=1) / len(paired) ** 0.5:.3f}", took


def _show(rows: list[tuple[str, ...]], folder: Path, letters: float, ladder: DigitsLadder) -> None:
    title = f"{ladder.shots} labelled pictures a class, {ladder.seeds} seeds, 600 test pictures; differences are paired, ± their standard error"
    header = ("rung", "accuracy", "to the rung before", "seconds")
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = [
        f"# The ladder: {title}",
        "",
        "| " + " | ".join(header) + " |",
        "|---|---|---|---|",
        *("| " + " | ".join(r) + " |" for r in rows),
    ]
    lines += ["", f"The network that is transferred reads {letters:.1%} of the letters of three unseen fonts."]
    (folder / "report.md").write_text("\n".join(lines) + "\n")
