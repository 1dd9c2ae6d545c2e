"""Groups of processes hold one copy of the model together: they see the same batches, draw the same noise and log the same numbers."""

import math
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch._dynamo.eval_frame import OptimizedModule

from lightning_cnn.errors import DataError
from lightning_cnn.strategy._doctor import Diagnosis, check
from lightning_cnn.strategy._metrics import Redirected
from lightning_cnn.strategy._watched import Watched


class Divided(Watched, DDPStrategy):
    """Base of the strategies that divide the model or the picture instead of the batch.

    With `data_parallel` copies the batch is divided among them: neighbouring ranks hold one copy, and the processes with the same part
    of all copies are peers.
    """

    def __init__(self, *, data_parallel: int = 1, timeout_s: float = 1800.0, **kwargs: Any) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_s), **kwargs)
        self.data_parallel, self.timeout_s = data_parallel, timeout_s
        self._copy: Any = None  # the group that holds this copy (None: all processes)
        self._peers: Any = None  # the group that holds the same part of every copy (None: there is one copy)
        self._world: Any = None  # the group of all processes of which those are parts
        self._redirected: Redirected | None = None

    @property
    def _copy_size(self) -> int:
        return self.world_size // self.data_parallel

    @property
    def _place(self) -> int:
        """The number of this process in its copy."""
        return self.global_rank % self._copy_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel, "rank": self.global_rank // self._copy_size}

    def process_dataloader(self, dataloader: object) -> object:
        own: Any = getattr(getattr(dataloader, "batch_sampler", None), "sampler", None)
        if getattr(own, "num_replicas", 0) is None:  # it shares by itself and would ask the process group
            own.num_replicas, own.rank = self.distributed_sampler_kwargs.values()
        return dataloader

    def setup(self, trainer: Trainer) -> None:
        check(trainer, trainer.lightning_module)
        if self.data_parallel > 1 and self._world is not dist.group.WORLD:
            grid = torch.arange(self.world_size).view(self.data_parallel, -1)
            self._world, timeout = dist.group.WORLD, timedelta(seconds=self.timeout_s)
            self._copy, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=timeout)
            self._peers, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=timeout)
        super().setup(trainer)
        alone = {"distributed_available_fn": _never}  # every process of a copy has counted everything that the copy has seen
        peers = {"process_group": self._peers}
        self._redirected = Redirected(trainer.lightning_module, **(alone if self.data_parallel == 1 else peers))
        torch.set_rng_state(self.broadcast(torch.get_rng_state()))
        if self.root_device.type == "cuda":
            torch.cuda.set_rng_state(self.broadcast(torch.cuda.get_rng_state()))

    def teardown(self) -> None:
        if self._redirected is not None:
            self._redirected.undo()
        super().teardown()

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        problems = []
        if self._layer_sync is not None:
            problems.append("sync_batchnorm=True is for processes with different batches; here they see the same one. Leave it out")
        if compiled := [name or "the model" for name, m in model.named_modules() if isinstance(m, OptimizedModule)]:
            problems.append(f"{compiled[0]} is compiled, and a compiled graph cannot be divided; hand over the model as it was before")
        return Diagnosis(problems, [])

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        _sync_module_states(self.lightning_module)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """From all copies, which have seen different pictures; with one copy the tensor itself, as in one process."""
        if group is not None and group is not dist.group.WORLD:
            return super().all_gather(tensor, group, sync_grads)
        return tensor if self.data_parallel == 1 else super().all_gather(tensor, self._peers, sync_grads)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Every process of a copy has the number of the copy's whole batch already."""
        return tensor if self.data_parallel == 1 else super().reduce(tensor, self._peers, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        vote = torch.tensor(int(decision), device=self.root_device)
        if dist.is_initialized():
            dist.all_reduce(vote, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(vote)

    def check_same_batch(self, batch: Any) -> None:
        """Raise where the processes of a copy were given different batches: the sum of all numbers in it must agree."""
        sums: list[float] = []
        apply_to_collection(batch, Tensor, lambda t: sums.append(float(t.detach().sum(dtype=torch.float64))))
        total = math.fsum(sums)
        total = total if math.isfinite(total) else 0.0
        ends = torch.tensor([total, -total], dtype=torch.float64, device=self.root_device)
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._copy)
        if float(ends.sum()) != 0.0:
            raise DataError(
                f"rank {self.global_rank} was given another batch than the others (its numbers add up to {total:.6g}, elsewhere up to "
                f"{float(ends[0]):.6g}), but {type(self).__name__} needs the same batch everywhere. Take out samplers that share the data "
                "among ranks, and random transforms that are not seeded alike."
            )


def _never() -> bool:
    return False
