"""The base of the asynchronous strategies: ranks train apart and meet only where Lightning needs them together.

The default process group stays uninitialised: Lightning broadcasts on it before every batch, which would march all ranks in step.
Barriers, reductions and broadcasts go through the job's store instead, gathered by rank 0, so that a lost worker is simply left out.
Between the start of an epoch and its end (or its validation) every rank is alone: a barrier passes and a reduction returns the rank's
own value.
"""

import logging
import pickle
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_cnn.errors import DistributedError
from lightning_cnn.strategy._doctor import Diagnosis, batch_norms, check, synced_norms
from lightning_cnn.strategy._metrics import Redirected
from lightning_cnn.strategy._schedule import GlobalClock, fair_share
from lightning_cnn.strategy._stealing import StealingLane, StealingLoader, StealingSampler, loads_a_plan
from lightning_cnn.strategy._stop import save_and_stop
from lightning_cnn.strategy._team import Team
from lightning_cnn.strategy._watched import Watched

log = logging.getLogger(__name__)


class Apart(Watched, ParallelStrategy):
    """What asynchronous strategies share; a child says how weights travel (`start`, `settle`) and what it did (`report`)."""

    is_distributed = True
    default_group = False

    def __init__(self, *, steal: bool = True, timeout_s: float = 1800.0) -> None:
        super().__init__()
        self.steal, self.timeout_s = steal, timeout_s
        self._num_nodes, self._last_meeting = 1, ""
        self.together, self._settled = True, True
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

    # -- meeting ------------------------------------------------------------------------------------------------------------------

    def meet(self, what: str, value: Any = None) -> list[Any]:
        """Every living rank's value, in order of rank, on every rank. All must come, in the same order of meetings."""
        if self.team is None or not self.together or self.world_size == 1:
            return [value]
        key = self.team.fresh("meet")
        if not self.is_global_zero:
            self.team.store.set(f"{key}/{self.global_rank}", pickle.dumps((what, value)))
            return pickle.loads(self._await(f"{key}/all", 0, what))
        said = {0: (what, value)} | {rank: self._hear(rank, key, what) for rank in self.team.living if rank != 0}
        said = {rank: heard for rank, heard in said.items() if heard is not None}
        if odd := [f"rank {rank} is at '{heard[0]}'" for rank, heard in said.items() if heard[0] != what]:
            raise DistributedError(f"the ranks disagree about where they are: rank 0 is at '{what}', {', '.join(odd)}")
        values = [said[rank][1] for rank in sorted(said)]
        self.team.store.set(f"{key}/all", pickle.dumps(values))
        self.team.store.delete_key(f"{self._last_meeting}/all")  # everybody here has read it
        self._last_meeting = key
        return values

    def _hear(self, rank: int, key: str, what: str) -> tuple[str, Any] | None:
        assert self.team is not None
        data = self._await(f"{key}/{rank}", rank, what)
        self.team.store.delete_key(f"{key}/{rank}")
        return pickle.loads(data) if data else None

    def _await(self, key: str, rank: int, what: str) -> bytes:
        """The value of `key`, which `rank` will set; empty when that rank was lost and training goes on without it."""
        assert self.team is not None
        deadline, pause_s = time.monotonic() + self.timeout_s, 0.0005
        while not self.team.store.check([key]):
            if any(not self.survives(lost) for lost in self.team.lost):
                raise self.team.error(f"waiting at '{what}'")
            if rank in self.team.lost:
                return b""
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"rank {rank} did not come to '{what}' within {self.timeout_s:.0f} s; raise timeout_s or see what it does"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        return self.team.store.get(key)

    def barrier(self, name: str | None = None) -> None:
        self.meet(f"barrier {name}")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        values = self.meet("broadcast", (True, obj) if self.global_rank == src else (False, None))
        return next((value for is_source, value in values if is_source), obj)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        rows = torch.stack(self._gather_tensors(tensor)) if self.together else tensor.detach().clone()[None]
        name = str(reduce_op).rsplit(".", 1)[-1].lower()
        if name in ("mean", "avg"):
            return (rows if rows.is_floating_point() else rows.float()).mean(0)
        return {"sum": lambda: rows.sum(0), "max": lambda: rows.amax(0), "min": lambda: rows.amin(0)}[name]()

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return torch.stack(self._gather_tensors(tensor))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = self.meet("decision", bool(decision))
        return min(votes) if all else max(votes)

    def _gather_tensors(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        return [value.to(tensor.device) for value in self.meet("gather", tensor.detach().cpu())]

    def _is_together(self) -> bool:
        return self.together and self.world_size > 1


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
