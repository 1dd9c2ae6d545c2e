"""Average the weights of several finetuned checkpoints of one pretrained network, and evaluate the average.

As good as an ensemble at the price of one network, as long as the members started from the same weights. Greedy takes only members that
help on validation data. Batch norm's statistics are averaged too; `reestimate_batch_norm` measures them properly.

Source: Wortsman et al. 2022, arXiv:2203.05482, algorithm 1.
"""

import glob
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_cnn.errors import CheckpointError, raise_all
from lightning_cnn.functional.weights import average, greedy_soup
from lightning_cnn.nn.features import image_of, label_of
from lightning_cnn.nn.stages import evaluating

log = logging.getLogger(__name__)


class ModelSoup(Callback):
    """`members`: checkpoint files or patterns (`runs/*/best.ckpt`). `method`: "greedy" (scored on the datamodule's validation set) or
    "uniform". Replaces the weights while validating, testing or predicting outside of fit, and puts them back afterwards.
    """

    def __init__(self, *, members: Sequence[str], method: str = "greedy") -> None:
        problems = ["members must name at least one checkpoint"] if not members else []
        problems += [f"method must be 'greedy' or 'uniform', got {method!r}"] if method not in ("greedy", "uniform") else []
        raise_all(problems)
        self.members, self.method = list(members), method
        self.chosen: list[str] = []
        self._soup: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            return
        problems = [f"no checkpoint matches {pattern!r}" for pattern in self.members if not _files(pattern)]
        if self.method == "greedy" and getattr(trainer, "datamodule", None) is None:
            problems.append(
                "a greedy soup is scored on a datamodule's validation set, and there is none: give datamodule= or method='uniform'"
            )
        raise_all(problems, CheckpointError)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.training and trainer.state.fn != "fit":
            self._serve(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._serve(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._serve(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._clear(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._clear(pl_module)

    def _serve(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._soup:
            self._soup = self._cook(trainer, pl_module)
        self._own = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
        pl_module.load_state_dict(self._soup)

    def _cook(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        files = sorted({name for pattern in self.members for name in _files(pattern)})
        states = [_weights(name) for name in files]
        if self.method == "uniform":
            self.chosen, soup = files, average(states)
        else:
            soup, chosen = greedy_soup(states, lambda state: _accuracy(trainer, pl_module, state))
            self.chosen = [files[i] for i in chosen]
        log.info("%s soup of %d of %d checkpoints: %s", self.method, len(self.chosen), len(files), ", ".join(self.chosen))
        return soup

    def _clear(self, pl_module: LightningModule) -> None:
        if self._own:
            pl_module.load_state_dict(self._own)
        self._own, self._soup = {}, {}


def _files(pattern: str) -> list[str]:
    return glob.glob(pattern)  # noqa: PTH207 - Path.glob takes no absolute pattern


def _weights(name: str) -> dict[str, Tensor]:
    try:
        return dict(torch.load(Path(name), map_location="cpu", weights_only=True)["state_dict"])
    except (KeyError, RuntimeError, OSError, EOFError, UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{name} is no readable Lightning checkpoint ({reason}).") from error


@torch.no_grad()
def _accuracy(trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Tensor]) -> float:
    loader: Any = trainer.datamodule.val_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
    right = seen = 0
    with evaluating(pl_module), trainer.precision_plugin.forward_context():
        for batch in loader:
            batch = trainer.strategy.batch_to_device(batch)
            here = {name: tensor.to(pl_module.device) for name, tensor in state.items()}
            answer = torch.func.functional_call(pl_module, here, (image_of(batch),)).argmax(-1)
            right += int((answer == label_of(batch)).sum())
            seen += len(answer)
    return right / max(seen, 1)
