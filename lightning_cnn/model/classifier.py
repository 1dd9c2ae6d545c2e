"""One LightningModule for picture classification with any torchvision or timm network."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_cnn.errors import ConfigurationError, raise_all
from lightning_cnn.nn import backbones
from lightning_cnn.nn.transfer_head import transfer_head


class Classifier(L.LightningModule):
    """Cross-entropy on the logits of `network`; takes pictures (b c h w) as uint8 or as floats in [0, 1] and normalises them itself.

    So what it needs travels with its checkpoint: hyper-parameters are plain types, class names among them, and a checkpoint loads
    without the file the pretrained weights came from.

    Args:
        architecture: a name of `lightning_cnn.nn.networks`, torchvision or (when installed) timm.
        classes: their names, or how many.
        weights: a local `.pth` or `.safetensors` file, a name of torchvision's enum such as `DEFAULT`, or none. A head of another size
            is left as initialised. Read at construction, unlike a plugin's files, so that a bare `Classifier(...)(pictures)` is right.
        head: `own`, the network's; or `transfer`, a linear classifier on standardised features, which `TransferRecipe` starts as a
            fitted probe.
        in_channels: channels of the pictures; grey pictures are repeated for a network that takes three.
        optimizer: a class of `torch.optim` in lower case: adamw, sgd, ...
        lr: the learning rate, the peak of it under `one_cycle`.
        schedule: `constant`, `cosine` to zero, or `one_cycle`; stepped every batch.
        mean, std: of each channel for pictures in [0, 1]; by default those the weights expect, or none without weights.

    Raises:
        ConfigurationError: an unknown architecture, optimizer or name of weights.
        CheckpointError: the weights' file is missing, damaged or of another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        architecture: str = "resnet18",
        classes: Sequence[str] | int = 10,
        weights: str | None = None,
        head: Literal["own", "transfer"] = "own",
        in_channels: int = 3,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        momentum: float = 0.9,
        schedule: Literal["constant", "cosine", "one_cycle"] = "cosine",
        label_smoothing: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        names = [str(k) for k in range(classes)] if isinstance(classes, int) else [str(name) for name in classes]
        _check(names, optimizer, schedule, head)
        if mean is None or std is None:
            mean, std = backbones.normalisation(architecture, weights) if weights else ([0.0] * in_channels, [1.0] * in_channels)
        self.classes = names
        self.network = backbones.build(architecture, num_classes=len(names), in_channels=in_channels)
        self.loaded = backbones.load(self.network, weights, architecture=architecture) if weights else None
        if head == "transfer":
            transfer_head(self.network, len(names))
        self.save_hyperparameters(
            {
                "architecture": architecture, "classes": names, "head": head, "in_channels": in_channels, "optimizer": optimizer,
                "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "schedule": schedule, "label_smoothing": label_smoothing,
                "mean": [float(v) for v in mean], "std": [float(v) for v in std],
            }
        )  # fmt: skip
        self.lr = lr  # where Lightning's learning-rate finder looks
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1), persistent=False)
        self.val_accuracy = MulticlassAccuracy(len(names), average="micro")
        self.test_accuracy = MulticlassAccuracy(len(names), average="micro")

    def forward(self, image: Tensor) -> Tensor:
        """Logits (b k) of pictures (b c h w)."""
        if not image.is_floating_point():
            image = image.to(self.mean.dtype) / 255
        image = (image - self.mean) / self.std
        if image.shape[1] == 1 and self._takes_three_channels:
            image = image.expand(-1, 3, -1, -1)
        return self.network(image)

    def training_step(self, batch, batch_index: int) -> Tensor:
        image, label = batch
        loss = F.cross_entropy(self(image), label, label_smoothing=self.hparams["label_smoothing"])
        self.log("train_loss", loss, batch_size=len(image))
        return loss

    def validation_step(self, batch, batch_index: int) -> Tensor:
        """Logits (b k), for callbacks that look at the answers."""
        return self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch, batch_index: int) -> Tensor:
        return self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch, batch_index: int) -> Tensor:
        """Log probabilities (b k)."""
        image = batch if isinstance(batch, Tensor) else batch[0]
        return self(image).log_softmax(-1)

    def configure_optimizers(self) -> Any:
        kind = _optimizer_class(self.hparams["optimizer"])
        extra = {"momentum": self.hparams["momentum"]} if kind is torch.optim.SGD else {}
        optimizer = kind(self.parameters(), lr=self.lr, weight_decay=self.hparams["weight_decay"], **extra)
        if self.hparams["schedule"] == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        if self.hparams["schedule"] == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        else:
            peaks = [group["lr"] for group in optimizer.param_groups]
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=max(2, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch, stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        image, label = batch
        logits = self(image)
        accuracy(logits, label)
        self.log(f"{stage}_loss", F.cross_entropy(logits, label), batch_size=len(image), prog_bar=stage == "val", sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, batch_size=len(image), prog_bar=stage == "val")
        return logits

    @property
    def _takes_three_channels(self) -> bool:
        first = next(module for module in self.network.modules() if isinstance(module, torch.nn.Conv2d))
        return first.in_channels == 3


def _check(names: list[str], optimizer: str, schedule: str, head: str) -> None:
    problems = []
    if len(names) < 2:
        problems.append(f"classes: a classifier needs two or more, got {names}")
    if _optimizer_class(optimizer) is None:
        problems.append(f"optimizer={optimizer!r} is not a class of torch.optim; try adamw or sgd")
    if schedule not in ("constant", "cosine", "one_cycle"):
        problems.append(f"schedule={schedule!r} is not known; choose constant, cosine or one_cycle")
    if head not in ("own", "transfer"):
        problems.append(f"head={head!r} is not known; choose own or transfer")
    raise_all(problems, ConfigurationError)


def _optimizer_class(name: str) -> Any:
    found = {key.lower(): value for key, value in vars(torch.optim).items() if isinstance(value, type)}
    kind = found.get(name.lower())
    return kind if kind is not None and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer else None
