"""What a run leaves behind: `report.md` with the final numbers, the pictures, and the path as the last line printed."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lightning_cnn import plot
from lightning_cnn.functional.batch import Batch, label_key, read


def finish(
    folder: Path, numbers: Mapping[str, float], *, title: str | None = None, loaded: Any = None, table: bool = True
) -> float | None:
    """Write `report.md`, print the numbers as a table and the folder as the last line; returns the test accuracy if there is one."""
    shown = {name: value for name, value in sorted(numbers.items()) if not name.startswith("lr-")}
    lines = [f"# {title or folder.parent.name}", ""]
    if loaded is not None:
        lines += [f"Weights: {loaded}", ""]
    lines += ["| figure | value |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in shown.items()), ""]
    lines += [f"![{path.stem}]({path.name})" for path in sorted(folder.glob("*.png"))]
    body = "\n".join(lines) + "\n"
    report = folder / "report.md"
    # A recipe writes its own text first; the numbers follow it.
    report.write_text(report.read_text() + "\n" + body if report.exists() else body)
    console = Console()
    if shown and table:
        console.print(_table(shown, title))
    console.print(str(folder), soft_wrap=True, highlight=False)
    return next((numbers[name] for name in ("test_accuracy", "val_accuracy") if name in numbers), None)


def _table(numbers: Mapping[str, float], title: str | None) -> Table:
    table = Table("figure", "value", title=title)
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4f}")
    return table


class Answers(L.Callback):
    """Counts (k k) of the pictures evaluated last, rows the truth and columns the answer, where steps give logits (b k); else none."""

    def __init__(self) -> None:
        self.counts: np.ndarray | None = None

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.counts = None

    on_validation_start = on_test_start

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        classes: list[str] = list(getattr(pl_module, "classes", ()))
        if isinstance(outputs, torch.Tensor) and outputs.shape[1:] == (len(classes),):
            counts = _counts(read(batch, label_key(batch)).cpu(), outputs.argmax(-1).cpu(), len(classes))
            self.counts = counts if self.counts is None else self.counts + counts

    on_validation_batch_end = on_test_batch_end


def pictures(folder: Path, trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule) -> None:
    """The schedule, the augmented training pictures, and the confusion matrix of the pictures evaluated last."""
    rates = _learning_rates(folder / "metrics.csv")
    if rates:
        steps, columns = rates
        plot.schedule(_effective(columns, trainer), steps=steps).savefig(folder / "schedule.png")
    classes: list[str] = list(getattr(model, "classes", ()))
    if not trainer.is_global_zero or trainer.world_size > 1 or not classes:
        return
    counted = next((c.counts for c in vars(trainer)["callbacks"] if isinstance(c, Answers)), None)
    if counted is not None or trainer.global_step:  # answers of a head that nobody trained say nothing
        counts = confusion(trainer, model, data, len(classes)) if counted is None else counted
        plot.confusion_matrix(counts, classes).savefig(folder / "confusion_matrix.png")
    augmentation = next((c for c in vars(trainer)["callbacks"] if type(c).__name__ == "BatchAugmentation"), None)
    if augmentation is not None:
        augmentation_grid(folder, augmentation, data)


def confusion(trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule, classes: int) -> np.ndarray:
    """Counts (k k) of the test pictures: rows the truth, columns the answer."""
    outputs = trainer.predict(model, dataloaders=data.test_dataloader())
    answer = torch.cat([part for part in outputs or [] if isinstance(part, torch.Tensor)]).argmax(-1).cpu()
    truth = torch.cat([batch[1] for batch in data.test_dataloader()])[: len(answer)]
    return _counts(truth, answer, classes)


def _counts(truth: torch.Tensor, answer: torch.Tensor, classes: int) -> np.ndarray:
    return torch.bincount(truth * classes + answer, minlength=classes**2).view(classes, classes).numpy()


def augmentation_grid(folder: Path, augmentation: Any, data: L.LightningDataModule, count: int = 6) -> None:
    """Some training pictures, each beside what the augmentation makes of it in eight epochs."""
    batch = next(iter(data.train_dataloader()))
    if isinstance(batch, Batch):
        some = Batch(batch.image[:count], batch.label[:count], batch.index[:count])
        plot.augmentation_grid(augmentation, some).savefig(folder / "augmentation.png")


def _learning_rates(path: Path) -> tuple[list[int], dict[str, list[float]]] | None:
    if not path.exists():
        return None
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if any(row[k] for k in row if k.startswith("lr-"))]
    names = [name for name in (rows[0] if rows else {}) if name.startswith("lr-")]
    if not names:
        return None
    return [int(row["step"]) for row in rows], {name.removeprefix("lr-"): [float(row[name] or 0) for row in rows] for name in names}


def _effective(columns: dict[str, list[float]], trainer: L.Trainer) -> dict[str, list[float]]:
    """Rates times the factor that `DiscriminativeLR` gives the group of that name for the duration of a step."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    factors = {group.get("name"): group.get("lr_factor", 1.0) for group in groups}
    return {name: [rate * factors.get(name.rpartition("/")[2], 1.0) for rate in rates] for name, rates in columns.items()}
