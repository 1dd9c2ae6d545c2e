"""A step whose gradients are not finite never reaches the weights: it is stopped at, skipped or rolled back, and can be replayed."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_cnn.callbacks._sharded import sharded_problems
from lightning_cnn.errors import NumericsError, raise_all
from lightning_cnn.files import replacing
from lightning_cnn.functional.batch import Batch, image_key, read
from lightning_cnn.functional.generators import generators_restored, set_states, states
from lightning_cnn.nn.finite import all_finite, bad_rows, first_nonfinite

log = logging.getLogger(__name__)
ACTIONS = ("stop", "skip", "rollback")


@dataclass
class _Seen:
    """A batch of the step under way, and what it takes to run it again."""

    batch: Any
    number: int
    generators: dict[str, Any]
    loss: Tensor | None = None


class NaNGuard(Callback):
    """Look at the gradients before each optimizer step; when one is not finite, say where it comes from and act.

    Args:
        action: `stop` raises; `skip` leaves the step out (weights, running statistics and optimizer state stay as they are);
            `rollback` puts back what they were up to `every` steps ago and goes on with the next batch.
        every: Steps between the copies that `rollback` keeps, in memory.
        folder: Where the reproducer files go, three at most; by default the Trainer's folder.

    Raises:
        NumericsError: under `stop`; and under `skip` if finite gradients took the weights out of range in one step.
    """

    def __init__(
        self, *, action: Literal["stop", "skip", "rollback"] = "stop", every: int = 100, folder: str | Path | None = None
    ) -> None:
        self.action, self.every, self.folder = action, every, folder
        self.events = 0
        self._seen: list[_Seen] = []
        self._buffers: list[Tensor] = []
        self._good: tuple[list[Tensor], dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        problems = sharded_problems(trainer, "NaNGuard")
        if self.action not in ACTIONS:
            problems.append(f"action must be one of {ACTIONS}, got {self.action!r}.")
        if self.every < 1:
            problems.append(f"every must be at least 1 step, got {self.every}.")
        raise_all(problems)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events, self._seen = 0, []
        self._keep(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._seen:
            self._buffers = [buffer.detach().clone() for buffer in pl_module.buffers()]
        self._seen.append(_Seen(batch, batch_idx, states()))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._seen:
            self._seen[-1].loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if all_finite(parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None):
            return
        where = self._diagnosed(trainer, pl_module)
        for parameter in pl_module.parameters():
            parameter.grad = None  # for every torch optimizer a step without gradients changes nothing
        self._act(trainer, pl_module, where)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._seen = []
        if not all_finite(pl_module.parameters()):
            layer = next(name for name, weight in pl_module.named_parameters() if not bool(weight.isfinite().all()))
            where = f"step {trainer.global_step}: finite gradients took '{layer}' out of range; lower the learning rate"
            if self._good is None:
                raise NumericsError(f"{where}, or use action='rollback'.")
            self._act(trainer, pl_module, where)
        elif trainer.global_step % self.every == 0:
            self._keep(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()

    def _forget(self) -> None:
        self._seen, self._buffers, self._good = [], [], None

    def _act(self, trainer: Trainer, pl_module: LightningModule, where: str) -> None:
        self.events += 1
        if self.action == "stop":
            raise NumericsError(f"{where}.")
        if self.action == "rollback" and self._good is not None:
            weights, optimizer = self._good
            _copy(weights, [*pl_module.parameters(), *pl_module.buffers()])
            trainer.optimizers[0].load_state_dict(deepcopy(optimizer))
        log.warning("%s. %s.", where, "Skipped the step" if self.action == "skip" else "Rolled back to the last copy")

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.action == "rollback":
            tensors = [*pl_module.parameters(), *pl_module.buffers()]
            self._good = [tensor.detach().clone() for tensor in tensors], deepcopy(trainer.optimizers[0].state_dict())

    def _diagnosed(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Run the batch again, looking at each layer; leaves running statistics as they were before the step."""
        guilty = next((seen for seen in self._seen if seen.loss is not None and not bool(seen.loss.isfinite().all())), self._seen[-1])
        _copy(self._buffers, list(pl_module.buffers()))
        with generators_restored(), torch.no_grad(), _Silent(pl_module), trainer.precision_plugin.train_step_context():
            set_states(guilty.generators)
            found = first_nonfinite(pl_module, lambda: pl_module.training_step(*_arguments(pl_module, guilty)))
        _copy(self._buffers, list(pl_module.buffers()))
        rows = bad_rows(read(guilty.batch, image_key(guilty.batch)))
        if rows is not None:
            place = "the input"
        elif found is not None:
            place, rows = f"the output of layer '{found[0]}'", found[1]
        else:
            wrong = [n for n, p in pl_module.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
            place, rows = f"the gradient of '{wrong[-1]}'" if wrong else "a gradient", None
        samples = _samples(guilty.batch, rows)
        path = self._reproducer(trainer, pl_module, guilty, place, samples)
        told = f", samples {samples[:8]}{'...' if len(samples) > 8 else ''}" if samples else ""
        where = f"epoch {trainer.current_epoch}, batch {guilty.number}, step {trainer.global_step}"
        return f"{where}: {place} is not finite{told}{f'; to replay it: {path}' if path else ''}"

    def _reproducer(self, trainer: Trainer, pl_module: LightningModule, seen: _Seen, place: str, samples: list[int]) -> Path | None:
        if self.events >= 3:
            return None
        rank = f"_rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(self.folder or trainer.default_root_dir) / f"nan_step{trainer.global_step}{rank}.pt"
        state = {
            "place": place, "samples": samples, "epoch": trainer.current_epoch, "batch_idx": seen.number, "batch": _plain(seen.batch),
            "generators": seen.generators, "state_dict": pl_module.state_dict(),
        }  # fmt: skip
        with replacing(path, NumericsError) as file:
            torch.save(state, file)
        return path


class _Silent:
    """A module whose `log` does nothing: the replay is no step."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module

    def __enter__(self) -> None:
        for name in ("log", "log_dict"):
            object.__setattr__(self.module, name, lambda *_, **__: None)

    def __exit__(self, *_: Any) -> None:
        for name in ("log", "log_dict"):
            object.__delattr__(self.module, name)


def _arguments(module: LightningModule, seen: _Seen) -> tuple:
    count = module.training_step.__code__.co_argcount - 1
    return (seen.batch, seen.number)[:count]


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)


def _samples(batch: Any, rows: list[int] | None) -> list[int]:
    if rows is None:
        return []
    return batch.index[rows].tolist() if isinstance(batch, Batch) and max(rows, default=0) < len(batch.index) else rows


def _plain(batch: Any) -> Any:
    if is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    if isinstance(batch, Mapping):
        return dict(batch)
    return list(batch) if isinstance(batch, list | tuple) else batch
