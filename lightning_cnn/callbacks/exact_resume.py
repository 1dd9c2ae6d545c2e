"""Training that can be interrupted at any step: what was resumed ends in the same bits, and a signal loses no step."""

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_cnn.callbacks._sharded import sharded_problems
from lightning_cnn.errors import CheckpointError, raise_all
from lightning_cnn.functional import counter
from lightning_cnn.functional.generators import seed_generators

log = logging.getLogger(__name__)
KEY = "exact_resume"
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


class ExactResume(Callback):
    """Make a run a function of its seed and its step, and end it cleanly on SIGTERM, SIGINT and SIGUSR1.

    The global generators of torch, numpy and Python are seeded before each step by (seed, epoch, batch, rank), so whatever draws from
    them repeats itself after a resume; a checkpoint taken while gradients accumulate holds them. On a signal the step is finished,
    `last.ckpt` written, and the process exits with 128 + the signal's number; a second signal acts at once.

    Args:
        seed: Another seed is other noise.
        folder: Where `last.ckpt` goes; by default where the ModelCheckpoint writes, else `checkpoints/` in the Trainer's folder.
        signals: Which of SIGTERM, SIGINT and SIGUSR1 to answer. After SIGUSR1 a Slurm job is requeued.

    Raises:
        ConfigurationError: before the first step: a training loader without a position (wrap its dataset in `data.Resumable`), or a
            strategy that holds parameters in pieces.
    """

    def __init__(self, *, seed: int = 0, folder: str | Path | None = None, signals: tuple[str, ...] | list[str] = SIGNALS) -> None:
        self.seed, self.folder, self.signals = seed, folder, tuple(signals)
        self._earlier: dict[int, Any] = {}
        self._received = 0
        self._gradients: dict[str, torch.Tensor] = {}
        self._moment: list[Any] = []  # of the last seeding: its name, number and epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        wrong = [name for name in self.signals if name not in SIGNALS]
        raise_all([*sharded_problems(trainer, "ExactResume"), *(f"signals: {name!r} is not one of {SIGNALS}." for name in wrong)])
        callbacks = vars(trainer)["callbacks"]
        # Behind all that change the state at the end of a batch, before those that save. A new list: the old one is being walked.
        others = [other for other in callbacks if other is not self]
        savers = [other for other in others if isinstance(other, Checkpoint)]
        vars(trainer)["callbacks"] = [*(other for other in others if other not in savers), self, *savers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders = vars(trainer.fit_loop)["_combined_loader"].flattened
        raise_all(
            f"The training loader {type(loader).__name__} has no position to resume from: use lightning_cnn.data.Resumable(dataset, "
            "batch_size=...), or any loader with state_dict and load_state_dict."
            for loader in loaders
            if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"))
        )
        _place_loaders(trainer)
        parameters = dict(pl_module.named_parameters())
        for name, gradient in self._gradients.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        self._gradients = {}
        self._seed(trainer, *(self._moment or ["start"]))
        self._listen()
        log.info(
            "Global generators follow (seed %d, epoch, batch, rank); answering %s.", self.seed, ", ".join(self.signals) or "no signal"
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seed(trainer, "epoch")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seed(trainer, "step", batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._seed(trainer, "between", batch_idx)
        if _accumulating(trainer) or not self._asked(trainer):
            return
        self._save(trainer)
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._exit(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._seed(trainer, "validated", trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._asked(trainer):
            self._save(trainer)
            self._exit(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        gradients = {}
        if trainer.state.fn == "fit" and _accumulating(trainer):
            given = {name: parameter.grad for name, parameter in pl_module.named_parameters() if parameter.grad is not None}
            gradients = {
                name: trainer.strategy.all_gather(gradient).reshape(trainer.world_size, *gradient.shape)
                for name, gradient in given.items()
            }
        moment = self._next(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
        checkpoint[KEY] = {"seed": self.seed, "moment": moment, "gradients": gradients}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(KEY)
        if state is None or trainer.state.fn != "fit":
            return
        if state["seed"] != self.seed:
            raise CheckpointError(f"The run was started with ExactResume(seed={state['seed']}); resume it with that, not {self.seed}.")
        self._moment = list(state["moment"])
        of_ranks = {name: gradient.unbind() for name, gradient in state["gradients"].items()}
        ranks, rank = trainer.world_size, trainer.global_rank
        self._gradients = {name: g[rank] if len(g) == ranks else torch.stack(g).mean(0) for name, g in of_ranks.items()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_listening()

    def _seed(self, trainer: Trainer, moment: str, number: int = 0, epoch: int | None = None) -> None:
        self._moment = [moment, number, trainer.current_epoch if epoch is None else epoch]
        share = (trainer.distributed_sampler_kwargs or {}).get("rank", trainer.global_rank)  # one for all who see the same batches
        key = counter.key(self.seed, "exact_resume", *self._moment, share)
        seed_generators(key)
        torch.cuda.manual_seed_all(key)

    def _next(self, epoch_is_over: bool) -> list[Any]:
        """The seeding before the batch to come; resumed in an epoch's last batch, Lightning enters the next without a hook."""
        if epoch_is_over and self._moment:
            return ["epoch", 0, self._moment[2] + 1]
        return ["between", *self._moment[1:]] if self._moment[:1] == ["step"] else self._moment  # saved by one who comes before us

    def _listen(self) -> None:
        self._received = 0
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread answer signals
        for name in self.signals:
            number = getattr(signal, name)
            self._earlier[number] = signal.signal(number, self._note)

    def _stop_listening(self) -> None:
        for number, handler in self._earlier.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._earlier = {}

    def _note(self, number: int, frame: Any) -> None:
        if self._received:  # asked twice: as if we were not here
            self._stop_listening()
            signal.raise_signal(number)
        self._received = number

    def _asked(self, trainer: Trainer) -> bool:
        """Whether any process has received a signal; all answer alike, so that they stop after the same step."""
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            received = torch.tensor(self._received, device=trainer.strategy.root_device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self._received = int(received)
        return bool(self._received)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._path(trainer))

    def _path(self, trainer: Trainer) -> str:
        folder = self.folder or getattr(trainer.checkpoint_callback, "dirpath", None) or f"{trainer.default_root_dir}/checkpoints"
        return f"{folder}/last.ckpt"

    def _exit(self, trainer: Trainer) -> None:
        name, path = signal.Signals(self._received).name, self._path(trainer)
        log.warning("%s: stopped after step %d. Go on with ckpt_path=%s", name, trainer.global_step, path)
        trainer.strategy.checkpoint_io.teardown()  # what is being written reaches the disk before any process ends
        trainer.strategy.barrier("exact_resume")
        job = os.environ.get("SLURM_JOB_ID")
        if self._received == signal.SIGUSR1 and job and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", job], check=True)
        raise SystemExit(128 + self._received)


def _accumulating(trainer: Trainer) -> bool:
    """Whether gradients wait for batches to come."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def _place_loaders(trainer: Trainer) -> None:
    """Load the positions that Lightning has read but not used.

    It forgets them when `configure_optimizers` asked for `estimated_stepping_batches`: then the loaders were there before the checkpoint's
    loops were read, and are not looked at again.
    """
    loop = vars(trainer.fit_loop)
    if loop["_combined_loader_states_to_load"]:
        loop["_combined_loader"]._load_state_dicts(loop["_combined_loader_states_to_load"])
        loop["_combined_loader_states_to_load"] = []
        iter(loop["_data_fetcher"])
