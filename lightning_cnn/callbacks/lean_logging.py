"""Log from `training_step` at almost no cost: values stay where they are until they are written, and are then read in one go.

What it stands in for is `self.log` inside of `training_step`, which Lightning follows with book-keeping on every step.
"""

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

log = logging.getLogger(__name__)


class LeanLogging(Callback):
    """Step values of `self.log` and `self.log_dict` reach the loggers every `log_every_n_steps`, as before, with one read from the device.

    Everything else is left to Lightning: averages over the epoch, metric objects, reductions over processes, other hooks. The progress
    bar shows the values last written. `callback_metrics` has the latest at the steps that are written and at the end of an epoch.
    """

    def __init__(self) -> None:
        self._latest: dict[str, tuple[Any, bool, bool]] = {}  # value, for the loggers, for the progress bar

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._latest = {}
        original = pl_module.log

        def lean(
            name: str, value: Any, prog_bar: bool = False, logger: bool | None = None, on_step: bool | None = None, **rest: Any
        ) -> None:
            ours = pl_module._current_fx_name == "training_step" and on_step is not False and not rest.get("on_epoch")
            if ours and not rest.get("sync_dist") and isinstance(value, (Tensor, int, float)) and "reduce_fx" not in rest:
                self._latest[name] = (value.detach() if isinstance(value, Tensor) else value, logger is not False, prog_bar)
            else:
                original(name, value, prog_bar=prog_bar, logger=logger, on_step=on_step, **rest)

        def lean_dict(dictionary: Any, *args: Any, **options: Any) -> None:
            for name, value in dictionary.items():
                pl_module.log(name, value, *args, **options)

        pl_module.__dict__.update(log=lean, log_dict=lean_dict)
        log.info("Step values of training_step are read and written every %d steps.", trainer.log_every_n_steps)  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._latest:
            return
        connector: Any = trainer._logger_connector
        due = connector.should_update_logs and not trainer.fit_loop._should_accumulate()
        if due or trainer.is_last_batch:
            connector._callback_metrics.update({name: torch.as_tensor(value) for name, (value, _, _) in self._latest.items()})
        if due:
            values: Any = _read(self._latest)
            connector._progress_bar_metrics.update({name: values[name] for name, (_, _, bar) in self._latest.items() if bar})
            connector.log_metrics({name: values[name] for name, (_, logged, _) in self._latest.items() if logged})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove(pl_module)

    def _remove(self, pl_module: LightningModule) -> None:
        pl_module.__dict__.pop("log", None)
        pl_module.__dict__.pop("log_dict", None)


def _read(latest: dict[str, tuple[Any, bool, bool]]) -> dict[str, float]:
    """All values as numbers; tensors are joined on their device first, so that one read fetches them."""
    tensors = {name: value.float().mean() for name, (value, _, _) in latest.items() if isinstance(value, Tensor)}
    numbers = torch.stack(list(tensors.values())).tolist() if tensors else []
    return {**{name: float(v) for name, (v, _, _) in latest.items() if name not in tensors}, **dict(zip(tensors, numbers, strict=True))}
