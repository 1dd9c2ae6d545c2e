"""Elastic data parallelism: every replica is a job of its own; a lost one does not stop the others, and may come back."""

import importlib.util
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from lightning_cnn.errors import ConfigurationError, raise_all
from lightning_cnn.strategy._doctor import Diagnosis, batch_norms, check
from lightning_cnn.strategy._replica import replica_loader
from lightning_cnn.strategy._schedule import known_to_schedulers
from lightning_cnn.strategy._server import parts

log = logging.getLogger(__name__)


class Elastic(SingleDeviceStrategy):
    """Average the gradients of all replicas that are there now; torchft's lighthouse knows which, and heals one that comes back.

    Start a lighthouse, then one process with `Trainer(devices=1)` a replica. A step is taken when every replica that began it is still
    there at its end; otherwise the others repeat it, so no batch of theirs is lost. What a replica trains on is a function of the step.

    Source: torchft, github.com/meta-pytorch/torchft. Departs: a step that was not agreed on is repeated instead of skipped.
    """

    def __init__(
        self,
        *,
        replica: int | None = None,
        replicas: int | None = None,
        lighthouse: str | None = None,
        min_replicas: int = 1,
        timeout_s: float = 60.0,
    ) -> None:
        raise_all(
            [f"replica must be at least 0, got {replica}"] * (replica is not None and replica < 0)
            + [f"replicas must be at least 1, got {replicas}"] * (replicas is not None and replicas < 1)
            + [f"min_replicas must be at least 1, got {min_replicas}"] * (min_replicas < 1)
            + [f"timeout_s must be positive, got {timeout_s}"] * (timeout_s <= 0)
        )
        super().__init__()
        self.replica, self.replicas, self.lighthouse = replica, replicas, lighthouse
        self.min_replicas, self.timeout_s = min_replicas, timeout_s
        self.manager: Any = None
        self.repeated = 0
        self._begun = False

    # -- the life of a run --------------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        accelerator: Any = self.accelerator
        self._root_device = accelerator.get_parallel_devices(accelerator.parse_devices(1))[0]
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.replica, self.replicas, self.lighthouse = self._place()
            check(trainer, trainer.lightning_module, workers=self.replicas)
        super().setup(trainer)

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        problems = []
        if importlib.util.find_spec("torchft") is None:
            problems.append("Elastic needs torchft, which is not installed; pip install 'lightning-cnn[elastic]'")
        if trainer.num_devices != 1 or trainer.num_nodes != 1:
            problems.append("each replica is a process of its own with Trainer(devices=1, num_nodes=1); start as many as you like")
        if trainer.accumulate_grad_batches != 1:
            problems.append("accumulate_grad_batches is one step in several batches, which cannot be repeated; use a larger batch")
        if not model.automatic_optimization:
            problems.append("manual optimization cannot be repeated when a replica is lost inside a step; use automatic optimization")
        norms = batch_norms(model)
        advice = f"BatchNorm ({', '.join(norms[:1])}, ...) keeps each replica's own running statistics; the saved ones are replica 0's"
        return Diagnosis(problems, [advice] if norms else [])

    def _place(self) -> tuple[int, int, str]:
        """Which replica this is, of how many, and who knows the others: as given, else from torchft's environment variables."""
        replica = int(os.environ.get("REPLICA_GROUP_ID", -1)) if self.replica is None else self.replica
        replicas = int(os.environ.get("NUM_REPLICA_GROUPS", 0)) if self.replicas is None else self.replicas
        lighthouse = self.lighthouse or os.environ.get("TORCHFT_LIGHTHOUSE", "")
        raise_all(
            ["which replica is this? Give replica=0, 1, ... or set REPLICA_GROUP_ID"] * (replica < 0)
            + ["how many replicas are there at most? Give replicas= or set NUM_REPLICA_GROUPS"] * (replicas < 1)
            + [f"replica={replica} of replicas={replicas}: they are numbered from 0"] * (0 < replicas <= replica)
            + [
                "no lighthouse: start `torchft_lighthouse --min_replicas 1` once, and give its address as lighthouse= or TORCHFT_LIGHTHOUSE"
            ]
            * (not lighthouse)
        )
        return replica, replicas, lighthouse

    def process_dataloader(self, dataloader: object) -> object:
        module = self.lightning_module
        if module is None or not module.trainer.training:
            return dataloader
        self._join(module.trainer)
        assert self.replica is not None and self.replicas is not None
        return replica_loader(dataloader, self.replica, self.replicas, self.manager.current_step, self._skip)

    def _join(self, trainer: Trainer) -> None:
        """Weights are loaded and nothing has been read yet: meet the others, and take their state when they are ahead."""
        if self.manager is not None:
            return
        if len(self.optimizers) != 1:
            raise ConfigurationError(f"Elastic runs one optimizer; configure_optimizers gave {len(self.optimizers)}.")
        self._module, self._optimizer = trainer.lightning_module, self.optimizers[0]
        self.manager = self._new_manager()
        self.manager.load_state_dict({"step": trainer.global_step, "batches_committed": 0})
        self._own_step = self._optimizer.step
        self._optimizer.step = self._agreed_step  # type: ignore[method-assign]
        self._begin()
        log.info("Elastic: replica %s joined at step %d, %d there", self.replica, self.manager.current_step(), self._there())

    def _new_manager(self) -> Any:
        from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL  # pyright: ignore[reportMissingImports]

        host, timeout = _reachable_name(), timedelta(seconds=self.timeout_s)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        group = ProcessGroupNCCL if self.root_device.type == "cuda" else ProcessGroupGloo
        return Manager(
            pg=group(timeout=timeout), load_state_dict=self._take, state_dict=self._give, min_replica_size=self.min_replicas,
            use_async_quorum=False, timeout=timeout, quorum_timeout=timeout, connect_timeout=timeout, rank=0, world_size=1,
            store_addr=host, store_port=self._store.port, lighthouse_addr=self.lighthouse, replica_id=f"replica{self.replica}",
            hostname=host,
        )  # fmt: skip

    def teardown(self) -> None:
        if self.manager is not None:
            self._optimizer.__dict__.pop("step", None)
            self._optimizer.step = self._own_step  # type: ignore[method-assign]
            self.manager.shutdown(wait=False)
            self.manager = None
        super().teardown()

    def _skip(self, batches: int) -> None:
        # Who joins inside an epoch has fewer batches to come; Lightning steps its schedules at the last of as many as a whole epoch has.
        fetcher: Any = self._module.trainer.fit_loop._data_fetcher
        fetcher.fetched += batches

    # -- a step -------------------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Agree who takes part in this step; a replica that is behind takes the others' state here."""
        if not self._begun:
            self.manager.start_quorum()
            self._begun = True

    @known_to_schedulers
    def _agreed_step(self, closure: Callable[[], Any]) -> Any:
        """Stands in for `optimizer.step`: forward, backward and average again until everybody who began has finished."""
        while True:
            self._begin()
            with torch.enable_grad():
                output = closure()
            self._begun = False
            if self.manager.should_commit():
                break
            self.repeated += 1
            log.warning("Elastic: step %d is repeated, a replica was lost in it", self.manager.current_step())
        self._own_step()
        return output

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients, before they are clipped; when a replica is lost here the step will be repeated."""
        super().post_backward(closure_loss)
        if self.manager is None:
            return
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        gradient = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        self.manager.allreduce(gradient).wait()
        for parameter, part in zip(parameters, parts(gradient, parameters), strict=True):
            if parameter.grad is not None or part.any():
                parameter.grad = part.clone()

    # -- what a replica that comes back is given ----------------------------------------------------------------------------------

    def _give(self) -> dict[str, Any]:
        trainer = self._module.trainer
        return {
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
        }

    def _take(self, state: dict[str, Any]) -> None:
        trainer = self._module.trainer
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        loop = trainer.fit_loop
        for name in ("ready", "started", "processed", "completed"):
            setattr(loop.epoch_progress.current, name, state["epoch"])
        steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.ready = steps.completed = state["step"]
        log.info("Elastic: took the others' state at step %d, epoch %d", state["step"], state["epoch"])

    def _there(self) -> int:
        return self.manager.num_participants()

    # -- one replica writes -------------------------------------------------------------------------------------------------------

    @property
    def _writes(self) -> bool:
        return self.manager is None or self.manager.participating_rank() == 0

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._writes:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self._writes:
            super().remove_checkpoint(filepath)


def _reachable_name() -> str:
    """This machine's name if it has an address (other replicas connect to it), else the loopback's."""
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return "localhost"
    return socket.gethostname()
