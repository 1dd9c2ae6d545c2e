"""The base of the asynchronous strategies: ranks train apart and meet only where Lightning needs them together.

Between the start of an epoch and its end (or its validation) every rank is alone: a barrier passes and a reduction returns the rank's
own value.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_cnn.strategy._doctor import Diagnosis, batch_norms, check, synced_norms
from lightning_cnn.strategy._meeting import Meeting
from lightning_cnn.strategy._metrics import Redirected
from lightning_cnn.strategy._schedule import GlobalClock, fair_share
from lightning_cnn.strategy._stealing import StealingLane, StealingLoader, StealingSampler, loads_a_plan
from lightning_cnn.strategy._stop import save_and_stop
from lightning_cnn.strategy._team import Team


class Apart(Meeting, ParallelStrategy):
    """What asynchronous strategies share; a child says how weights travel (`start`, `settle`) and what it did (`report`)."""

    is_distributed = True

    def __init__(self, *, steal: bool = True, timeout_s: float = 1800.0) -> None:
        super().__init__()
        self.steal, self.timeout_s = steal, timeout_s
        self._num_nodes, self._settled = 1, True
        self.sampler: StealingSampler | None = None
        self._redirected: Redirected | None = None
        self.report: dict[str, Any] = {}

    # -- what a child defines -----------------------------------------------------------------------------------------------------

    def start(self, trainer: Trainer) -> None:
        """Training begins: weights and optimizer state are loaded, and equal on all ranks."""

    def resume(self) -> None:
        """This rank starts an epoch."""

    def pause(self) -> None:
        """This rank has no more batches for now and must not hold anybody up."""

    def settle(self) -> None:
        """All ranks are here: make their weights equal."""

    # -- where this process stands ------------------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        return (self.parallel_devices or [torch.device("cpu")])[self.local_rank]

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices or [])

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        setattr(rank_zero_only, "rank", self.global_rank)  # noqa: B010  Lightning keeps it on the function

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    # -- the life of a run --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check(trainer, trainer.lightning_module)
        self.together = True
        super().setup(trainer)
        module = self.lightning_module
        assert module is not None
        self._redirected = Redirected(module, distributed_available_fn=self._is_together, dist_sync_fn=self._gather_tensors)
        states = self.meet("first weights", module.state_dict() if self.is_global_zero else None)
        module.load_state_dict(states[0])
        if fitting:
            self._gates = self.team.fresh("gate") if self.team else ""
            callbacks(trainer).insert(0, _Boundaries(self))

    def setup_optimizers(self, trainer: Trainer) -> None:
        trainer.fit_loop.setup_data()
        if self.sampler is None:
            super().setup_optimizers(trainer)
            return
        module = trainer.lightning_module
        with fair_share(module, self.sampler):
            super().setup_optimizers(trainer)
        module.lr_scheduler_step = GlobalClock(module, self.sampler)  # type: ignore[method-assign]

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        problems = []
        if dist.is_initialized():
            problems.append(
                "the default process group is initialised (by an earlier Trainer, or by you), and Lightning broadcasts on it before "
                "every batch, which keeps all ranks in step; call torch.distributed.destroy_process_group() first"
            )
        if synced := synced_norms(trainer, model):
            problems.append(
                f"synchronised BatchNorm ({synced[0]}) needs all ranks at every layer, but here each trains alone; drop sync_batchnorm"
            )
        if trainer.limit_val_batches and (trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch is None):
            problems.append(
                "val_check_interval inside an epoch: ranks reach a batch number at different times; validate at the end of epochs"
            )
        if isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches != 1.0 and self.steal:
            problems.append(
                "limit_train_batches as a fraction needs a loader with a length; give a number (for each rank), or steal=False"
            )
        advice = []
        if norms := batch_norms(model):
            advice.append(
                f"BatchNorm ({norms[0]}, ...) uses each rank's own batch; running statistics are averaged whenever the ranks meet"
            )
        if not (self.steal and trainer._accelerator_connector.use_distributed_sampler):
            advice.append(
                "without work stealing each rank trains on its loader's own share, and a slow rank delays the end of every epoch"
            )
        return Diagnosis(problems, advice)

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        loop = self.lightning_module.trainer.fit_loop
        if self.sampler is not None and loop.restarting:  # the loader was there before the checkpoint: it begins anew, where that ended
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)  # type: ignore[arg-type]
        self.start(self.lightning_module.trainer)

    def settle_once(self) -> None:
        if not self._settled:
            self._settled = True
            self.settle()

    def stops(self, trainer: Trainer, team: Team, last: bool) -> bool:
        """Whether this rank's epoch ends here because of a SIGTERM.

        Ranks end an epoch at different times, and nobody waits to ask the others. So each epoch has a gate in the store: the first
        rank that comes to the epoch's end, or hears of the SIGTERM inside it, says once and for all whether it leads on or to a stop.
        """
        if self.sampler is None:
            if team.stopping and self.is_global_zero:
                save_and_stop(trainer)  # each rank has its own share and cannot end it early: what rank 0 has by now is saved
            if team.stopping:
                raise SIGTERMException
            return False
        gate = f"{self._gates}/{trainer.current_epoch}"
        if team.stopping and team.store.compare_set(gate, "", "stop") == b"stop":
            self.sampler.stop()
        return last and team.store.compare_set(gate, "", "on") == b"stop"

    def teardown(self) -> None:
        module = self.lightning_module
        if module is not None and module._trainer is not None:
            mine = callbacks(module.trainer)
            mine[:] = [callback for callback in mine if not isinstance(callback, _Boundaries)]
            module.__dict__.pop("lr_scheduler_step", None)
        if self._redirected is not None:
            self._redirected.undo()
        super().teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.together:  # a checkpoint between epochs holds what all ranks learned; one inside an epoch, what rank 0 has by then
            self.settle_once()
        return super().lightning_module_state_dict()

    def process_dataloader(self, dataloader: object) -> object:
        module = self.lightning_module
        own: Any = getattr(getattr(dataloader, "batch_sampler", None), "sampler", None)
        if getattr(own, "num_replicas", 0) is None:  # shares by itself and would ask the default group, which is not there
            own.num_replicas, own.rank = self.world_size, self.global_rank
        if not (self.steal and self.team is not None and module is not None and module.trainer.training):
            return dataloader
        if loads_a_plan(dataloader):
            lane: Any = dataloader
            order = lane.order
            self.sampler = self._sampler(order.samples, order.batch_size, order.seed, True, order.drop_last, order.indices)
            return StealingLane(lane, self.sampler)
        split = dataloader.sampler if isinstance(dataloader, DataLoader) else None
        if not isinstance(dataloader, DataLoader) or type(split) is not DistributedSampler or dataloader.batch_size is None:
            return dataloader
        length = len(dataloader.dataset)  # type: ignore[arg-type]
        self.sampler = self._sampler(length, dataloader.batch_size, split.seed, split.shuffle, dataloader.drop_last)
        return StealingLoader(dataloader, self.sampler)

    def _sampler(
        self, length: int, batch_size: int, seed: int, shuffle: bool, drop_last: bool, order: Callable[[int], Any] | None = None
    ) -> StealingSampler:
        assert self.team is not None and self.lightning_module is not None
        progress = self.lightning_module.trainer.fit_loop.epoch_progress
        return StealingSampler(
            length=length,
            batch_size=batch_size,
            team=self.team,
            name=self.team.fresh("steal"),
            epoch=lambda: progress.current.processed,  # type: ignore[attr-defined]
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            order=order,
        )


def callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]  # it has no annotation there


class _Boundaries(Callback):
    """First in the Trainer's list: says when ranks part, when they meet, and when a batch is done; a strategy has no hook for these."""

    def __init__(self, strategy: Apart) -> None:
        self.strategy = strategy

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.strategy.together, self.strategy._settled = False, False
        self.strategy.resume()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        strategy = self.strategy
        if strategy.sampler is not None:
            strategy.sampler.finished()
        if strategy.team is not None and strategy.stops(
            trainer, strategy.team, trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        ):
            self._meet()
            strategy.settle_once()
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False  # there is more to come, for who resumes
            save_and_stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._meet()
            self.strategy.settle_once()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meet()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meet()
        self.strategy.settle_once()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.strategy.together = False  # nobody else is on the way here; a checkpoint saved now is this rank's own

    def _meet(self) -> None:
        if not self.strategy.together:
            self.strategy.pause()
            self.strategy.together = True
