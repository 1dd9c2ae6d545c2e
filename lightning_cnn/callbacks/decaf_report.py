"""What every stage of a network knows about your pictures: DeCAF's study as a report.

At the end of `fit` (also of one with `max_epochs=0`: the network as it came) a linear classifier is fitted to the pooled features of
each stage, with all training pictures and with a few a class; the report shows accuracy by layer, nearest neighbours and a 2-D map.

Source: Donahue et al. 2014, arXiv:1310.1531, sections 3 and 4; van der Maaten & Hinton 2008 (t-SNE).
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_cnn import plot
from lightning_cnn.errors import ConfigurationError, raise_all
from lightning_cnn.nn.features import features, image_of
from lightning_cnn.nn.probe import linear_probe, shots

log = logging.getLogger(__name__)
DRAWS = 3  # few-shot training sets
THUMB_PX = 48
MAPPED = 600


class DecafReport(Callback):
    """`shots`: training pictures a class, null for all; `layers`: module names, null for the end of every stage; `kind`: "logistic" or
    "svm". Writes `decaf.md`, `layer_accuracy.png`, `neighbours.png` and `projection.png` to `folder` (null: the Trainer's).
    """

    def __init__(
        self,
        *,
        shots: Sequence[int | None] = (None, 5, 20),
        layers: Sequence[str] | None = None,
        kind: str = "logistic",
        pool: str = "mean+max",
        folder: str | None = None,
        seed: int = 0,
    ) -> None:
        problems = [f"kind must be 'logistic' or 'svm', got {kind!r}"] if kind not in ("logistic", "svm") else []
        problems += [f"shots must be at least 1 or null, got {k}" for k in shots if k is not None and k < 1]
        problems += ["shots must not be empty"] if not shots else []
        raise_all(problems)
        self.shots, self.layers, self.kind, self.pool, self.folder, self.seed = list(shots), layers, kind, pool, folder, seed
        self.accuracy: dict[str, dict[str, tuple[float, float]]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and getattr(trainer, "datamodule", None) is None:
            raise ConfigurationError(
                "DecafReport reads train_dataloader and val_dataloader of a datamodule: fit(model, datamodule=...)."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        train, train_labels, train_thumbs = self._read(pl_module, data.train_dataloader())
        test, test_labels, test_thumbs = self._read(pl_module, data.val_dataloader())
        curves = {
            str(k or "all"): self._curve(k, train, train_labels, test, test_labels) for k in self.shots if _enough(train_labels, k)
        }
        layers = list(train)
        self.accuracy = {layer: {name: (m[i], e[i]) for name, (m, e) in curves.items()} for i, layer in enumerate(layers)}
        trainer.callback_metrics.update(
            {f"decaf/{layer}": torch.tensor(next(iter(v.values()))[0]) for layer, v in self.accuracy.items()}
        )
        top, names = layers[-1], _names(pl_module, data, train_labels)
        folder = Path(self.folder or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        titled = {name if name == "all" else f"{name} a class": curve for name, curve in curves.items()}
        plot.layer_accuracy(layers, titled, chance=1 / len(names)).savefig(folder / "layer_accuracy.png")
        _neighbours(train[top], train_labels, train_thumbs, test[top], test_labels, test_thumbs).savefig(folder / "neighbours.png")
        _projection(test[top], test_labels, names, top, self.seed).savefig(folder / "projection.png")
        (folder / "decaf.md").write_text(table := self._table(len(train_labels), len(test_labels)))
        log.info("DeCAF report in %s\n%s", folder, table)

    def _read(self, module: LightningModule, loader: Iterable[Any]) -> tuple[dict[str, Tensor], Tensor, list[np.ndarray]]:
        thumbs: list[np.ndarray] = []
        found, labels = features(
            module,
            self.layers,
            _watched(loader, thumbs),
            pool=self.pool,
            forward=lambda batch: module(image_of(batch).to(module.device)),
        )
        return found, labels, thumbs

    def _curve(
        self, k: int | None, train: dict[str, Tensor], train_labels: Tensor, test: dict[str, Tensor], test_labels: Tensor
    ) -> tuple[list[float], list[float]]:
        means, errors = [], []
        for layer in train:
            chosen = [shots(train_labels, k, self.seed + draw) for draw in range(DRAWS if k else 1)]
            reached = [
                linear_probe(train[layer][some], train_labels[some], test[layer], test_labels, kind=self.kind, seed=self.seed).accuracy
                for some in chosen
            ]
            means.append(mean(reached))
            errors.append(stdev(reached) / len(reached) ** 0.5 if k else (means[-1] * (1 - means[-1]) / len(test_labels)) ** 0.5)
        return means, errors

    def _table(self, train: int, test: int) -> str:
        columns = list(next(iter(self.accuracy.values())))
        titles = [f"{name} a class" if name != "all" else f"all {train}" for name in columns]
        rows = [[layer, *(f"{m:.3f} +- {e:.3f}" for m, e in cells.values())] for layer, cells in self.accuracy.items()]
        lines = [f"| {' | '.join(row)} |" for row in [["layer", *titles], ["---"] * (len(columns) + 1), *rows]]
        note = f"Accuracy on {test} pictures of a {self.kind} classifier on each stage's pooled features, and its standard error"
        return "\n".join(["# What each layer knows", "", *lines, "", f"{note} (few-shot: over {DRAWS} draws).", ""])


def _watched(loader: Iterable[Any], thumbs: list[np.ndarray]) -> Iterator[Any]:
    """Keep a small copy of each picture on the way."""
    for batch in loader:
        image = image_of(batch).float()
        small = F.interpolate(image, size=THUMB_PX, mode="bilinear", antialias=image.shape[-1] > THUMB_PX)
        low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
        scaled = ((small - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1)
        thumbs.extend((scaled * 255).byte().permute(0, 2, 3, 1).cpu().numpy())
        yield batch


def _enough(labels: Tensor, k: int | None) -> bool:
    """A class with fewer pictures than asked for drops that curve."""
    enough = k is None or int(labels.unique(return_counts=True)[1].min()) >= k
    if not enough:
        log.warning("DecafReport leaves out %s shots a class: the rarest class has fewer", k)
    return enough


def _names(module: LightningModule, data: Any, labels: Tensor) -> list[str]:
    names = getattr(module, "classes", None) or getattr(data, "classes", None)
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else [str(k) for k in range(int(labels.max()) + 1)]


def _neighbours(train: Tensor, train_labels: Tensor, thumbs: list, test: Tensor, test_labels: Tensor, test_thumbs: list) -> Any:
    """The first picture of each of up to eight classes, and the six nearest by the angle between standardised features."""
    first = {int(label): i for i, label in reversed(list(enumerate(test_labels.tolist())))}
    chosen = [first[label] for label in sorted(first)][:8]
    mean_, std = train.mean(0), train.std(0) + 1e-6
    likeness = F.normalize((test[chosen] - mean_) / std) @ F.normalize((train - mean_) / std).T
    nearest = likeness.topk(min(6, len(train)), 1).indices.tolist()
    found = [[thumbs[j] for j in row] for row in nearest]
    agree = [[bool(train_labels[j] == test_labels[i]) for j in row] for i, row in zip(chosen, nearest, strict=True)]
    return plot.neighbours([test_thumbs[i] for i in chosen], found, agree)


def _projection(values: Tensor, labels: Tensor, names: list[str], layer: str, seed: int) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    some = shots(labels, None, seed)[:MAPPED]
    x = StandardScaler().fit_transform(values[some].flatten(1).numpy())
    x = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
    points = TSNE(2, perplexity=min(30.0, (len(x) - 1) / 3), init="pca", random_state=seed).fit_transform(x)
    return plot.projection(points, labels[some].numpy(), names, title=f"t-SNE of '{layer}', {len(x)} validation pictures")
