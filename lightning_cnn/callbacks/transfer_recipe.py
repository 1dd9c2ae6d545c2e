"""The lecture's rule for transfer learning, applied: how much to finetune, and how fast each part learns.

Few or many pictures a class decides the row, similarity to the pretraining set the column; `similarity="auto"` measures it with
linear probes on a few hundred pictures. The choice and its reason are said in one line; then the head starts as a linear classifier
fitted to the features of all training pictures, and `GradualUnfreezing` and `DiscriminativeLR` do the work.

Source: CS231n 2016, lecture 11, "transfer learning with CNNs is pervasive"; Kumar et al. 2022, arXiv:2202.10054 (the head's start).
"""

import itertools
import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_cnn.callbacks.discriminative_lr import DiscriminativeLR
from lightning_cnn.callbacks.gradual_unfreezing import GradualUnfreezing
from lightning_cnn.errors import ConfigurationError, NoEffectWarning, UnsupportedLayerError, raise_all
from lightning_cnn.functional.transfer import Recipe, similarity_of, transfer_recipe
from lightning_cnn.nn.features import features, image_of
from lightning_cnn.nn.probe import linear_probe, shots
from lightning_cnn.nn.stages import stages
from lightning_cnn.nn.transfer_head import head_probe, start_head

log = logging.getLogger(__name__)


class TransferRecipe(Callback):
    """`similarity`: "auto", "high" or "low". `probe_images`: how many training pictures "auto" looks at.

    `head`: "probe" starts the last layer as a fitted linear classifier, "as_is" leaves it alone.
    """

    def __init__(
        self, *, similarity: str = "auto", probe_images: int = 400, head: str = "probe", patterns: Sequence[str] | None = None
    ) -> None:
        problems = [f"similarity must be auto, high or low, got {similarity!r}"] if similarity not in ("auto", "high", "low") else []
        problems += [f"probe_images must be at least 20, got {probe_images}"] if probe_images < 20 else []
        problems += [f"head must be probe or as_is, got {head!r}"] if head not in ("probe", "as_is") else []
        raise_all(problems)
        self.similarity, self.probe_images, self.head, self.patterns = similarity, probe_images, head, patterns
        self.recipe: Recipe | None = None
        self._parts: list[Any] = []
        self._chosen: tuple[str, str, int, int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._parts = []
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if data is None:
            raise ConfigurationError("TransferRecipe counts and probes the pictures of a datamodule: fit(model, datamodule=...).")
        if getattr(pl_module, "loaded", True) is None:
            warnings.warn("TransferRecipe: the network has no pretrained weights, so all of it trains.", NoEffectWarning, stacklevel=2)
            return
        self._chosen = self._chosen or self._choose(trainer, pl_module, data)
        alike, why, images, classes = self._chosen
        self.recipe = transfer_recipe(images, alike, classes)
        depth = self.recipe.trained_stages or len(stages(pl_module, self.patterns))
        log.info(
            "transfer recipe '%s' for %d pictures in %d classes, similarity %s (%s): %s",
            self.recipe.name, images, classes, alike, why, self.recipe.reason,
        )  # fmt: skip
        self._parts = [
            GradualUnfreezing(unfrozen=depth, up_to=depth, patterns=self.patterns),
            DiscriminativeLR(factors=self.recipe.factors, patterns=self.patterns),
        ]
        # A part that has nothing to do here (everything trains, one rate for all) is left out rather than warned about.
        useful = (self.recipe.trained_stages is not None, len(set(self.recipe.factors)) > 1)
        self._parts = [part for part, use in zip(self._parts, useful, strict=True) if use]
        self._each("setup", trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._chosen is not None and self.head == "probe" and trainer.ckpt_path is None:
            self._start_head(trainer, pl_module)
        self._each("on_fit_start", trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._each("on_train_start", trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._each("on_train_epoch_start", trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._each("on_train_batch_start", trainer, pl_module, batch, batch_idx)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._each("teardown", trainer, pl_module, stage)
        self._chosen = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._each("on_exception", trainer, pl_module, exception)

    def _start_head(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        strategy = trainer.strategy

        def forward(batch: Any) -> Any:
            # The class's own transfer: the probe is fitted to pictures as they are, without other callbacks' noise.
            moved = type(strategy).batch_to_device(strategy, batch)
            with strategy.precision_plugin.forward_context():
                return pl_module(image_of(strategy.precision_plugin.convert_input(moved)))

        try:
            with torch.random.fork_rng():
                # Loaders may shuffle, and every process must start from the same weights.
                start_head(pl_module, strategy.broadcast(head_probe(pl_module, data.train_dataloader(), forward)))
        except UnsupportedLayerError as error:
            warnings.warn(f"TransferRecipe leaves the head as it is: {error}", NoEffectWarning, stacklevel=2)
            return
        log.info("the head starts as a linear classifier fitted to the training pictures")

    def _each(self, hook: str, *arguments: Any) -> None:
        for part in self._parts:
            getattr(part, hook)(*arguments)

    def _choose(self, trainer: Trainer, pl_module: LightningModule, data: Any) -> tuple[str, str, int, int]:
        """(similarity, why, pictures, classes), before a checkpoint is loaded: a resumed run measures the same network."""
        loader = data.train_dataloader()
        batches = len(loader)
        first = next(iter(loader))
        images = getattr(getattr(loader, "order", None), "samples", None) or _length(loader) or batches * len(image_of(first))
        names = getattr(pl_module, "classes", None) or getattr(data, "classes", None)
        found, labels = self._features(pl_module, data.train_dataloader(), len(image_of(first)))
        classes = len(names) if isinstance(names, (list, tuple)) else int(labels.max()) + 1
        if self.similarity != "auto":
            return self.similarity, "as given", images, classes
        order = shots(labels, None)
        a, b = order[: len(order) * 2 // 3], order[len(order) * 2 // 3 :]
        accuracies = [linear_probe(x[a], labels[a], x[b], labels[b], strengths=(1e-2,)).accuracy for x in found.values()]
        return *similarity_of(accuracies, 1 / classes), images, classes

    def _features(self, pl_module: LightningModule, loader: Iterable[Any], batch_size: int) -> tuple[dict[str, Tensor], Tensor]:
        some = itertools.islice(loader, -(-self.probe_images // batch_size) if self.similarity == "auto" else 1)
        device = next((p.device for p in pl_module.parameters()), torch.device("cpu"))
        return features(pl_module, None, some, forward=lambda batch: pl_module(image_of(batch).to(device)))


def _length(loader: Any) -> int:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return 0
