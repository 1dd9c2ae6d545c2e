"""What testing buys: accuracy, calibration and cost of one pass and of each marginalisation, on the same pictures in one test run.

Source: CS231n 2016, lecture 11 (single, flip, ten crops, ensembles); Guo et al. 2017, arXiv:1706.04599 (calibration error).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_cnn.callbacks._members import Members
from lightning_cnn.callbacks._views import place_of, read_views
from lightning_cnn.callbacks.marginalize import WORDS, Marginalize
from lightning_cnn.callbacks.snapshot_ensemble import SnapshotEnsemble
from lightning_cnn.callbacks.temperature_scaling import TemperatureScaling
from lightning_cnn.errors import ConfigurationError, raise_all
from lightning_cnn.functional.batch import Batch, image_key, label_key, read
from lightning_cnn.functional.calibration import Scores, scores
from lightning_cnn.functional.marginalize import log_mean_prob

log = logging.getLogger(__name__)

COLUMNS = ("accuracy", "ece", "brier", "nll", "cost")


class EvaluationReport(Callback):
    """Compare ways of testing on the test pictures; write `evaluation.md`, `reliability.png` and `rejection.png`.

    Args:
        compare: Views by name, each as `Marginalize` takes them: `{"flip": ["flip"], "mc": [{"mc_dropout": 10}]}`. A plain pass is
            always the first row, `single`. `cost` is its multiple in FLOPs.
        module: Name of the submodule whose forward takes pictures and gives logits; by default the LightningModule itself.
        folder: Where the files go; by default the logger's folder, else `default_root_dir`.

    Attributes:
        table: The figures by name, after the test.
    """

    def __init__(
        self,
        *,
        compare: Mapping[str, Sequence[Any]],
        module: str | None = None,
        seed: int = 0,
        folder: str | None = None,
    ) -> None:
        raise_all(["compare must not contain 'single': the plain pass has that name."] if "single" in compare else [])
        self.compare = {"single": [], **{name: read_views(views, WORDS) for name, views in compare.items()}}
        self.module, self.seed, self.folder = module, seed, folder
        self.table: dict[str, dict[str, float]] = {}
        self._members: dict[str, Members] = {}
        self._scores: dict[str, list[Scores]] = {}
        self._flops: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "test":
            return
        place = place_of(pl_module, self.module, trainer)
        self._members = {name: Members(place, views, self.seed) for name, views in self.compare.items()}
        found = [f"{name}: {problem}" for name, members in self._members.items() for problem in members.problems()]
        raise_all([*found, *_changed_forwards(trainer)])

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scores, self._flops = {name: [] for name in self.compare}, {}
        for members in self._members.values():
            members.attach()

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        image, label = read(batch, image_key(batch)), read(batch, label_key(batch))
        index = batch.index if isinstance(batch, Batch) else None
        for name, members in self._members.items():
            if not self._flops.get(name):
                members.log_probs(members.place.target.forward, image, index)  # looks for skips, once, outside of what is counted
                with FlopCounterMode(display=False) as counted, trainer.precision_plugin.forward_context():
                    members.log_probs(members.place.target.forward, image, index)
                self._flops[name] = max(counted.get_total_flops(), 1)
            with trainer.precision_plugin.forward_context():
                found = members.log_probs(members.place.target.forward, image, index)
            self._scores[name].append(scores(log_mean_prob(found), label))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(self._scores.values()):
            raise ConfigurationError("EvaluationReport saw no test batch. Give the Trainer a test loader with at least one.")
        joined = {name: _joined(parts) for name, parts in self._scores.items()}
        single = self._flops["single"]
        self.table = {name: {**one.summary(), "cost": self._flops[name] / single} for name, one in joined.items()}
        log.info("Accuracy: %s.", ", ".join(f"{name} {row['accuracy']:.4f}" for name, row in self.table.items()))
        if trainer.is_global_zero:
            self._write(Path(self.folder or trainer.log_dir or trainer.default_root_dir), joined)
        self._scores = {}

    def _write(self, folder: Path, joined: Mapping[str, Scores]) -> None:
        from lightning_cnn.plot import rejection_curve, reliability_diagram

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.md").write_text(markdown(self.table, len(joined["single"].nll)))
        reliability_diagram(joined).savefig(folder / "reliability.png")
        rejection_curve(joined).savefig(folder / "rejection.png")


def _changed_forwards(trainer: Trainer) -> list[str]:
    """Callbacks under which the row `single` would not be a plain pass."""
    changing = (Marginalize, TemperatureScaling, SnapshotEnsemble)
    others = [other for other in vars(trainer)["callbacks"] if isinstance(other, changing)]
    return [
        f"{type(other).__name__} changes the forward that EvaluationReport compares ways of, so every row would be of the changed one. "
        "Test without it; its views can be a row of compare=."
        for other in others
        if not (isinstance(other, Marginalize) and not other.views) and getattr(other, "answer", True)
    ]


def markdown(table: Mapping[str, Mapping[str, float]], n: int) -> str:
    """The table as a page of Markdown."""
    head = f"# Ways of testing, {n} pictures\n\n| way | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}\n"
    rows = [f"| {name} | {' | '.join(f'{row[column]:.4f}' for column in COLUMNS)} |" for name, row in table.items()]
    pictures = "![reliability](reliability.png)\n\n![rejection](rejection.png)\n"
    return head + "\n".join(rows) + "\n\nCost: FLOPs as a multiple of one pass. ECE, Brier and NLL: lower is better.\n\n" + pictures


def _joined(parts: Sequence[Scores]) -> Scores:
    """The scores of all batches of all processes."""
    own = {field.name: torch.cat([getattr(part, field.name) for part in parts]).cpu() for field in fields(Scores)}
    if not torch.distributed.is_initialized():
        return Scores(**own)
    everyone: list[dict[str, Tensor]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return Scores(**{name: torch.cat([one[name] for one in everyone]) for name in own})
