"""All processes together hold one copy of the model: they see the same batches, draw the same noise and log the same numbers."""

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
from torchmetrics import Metric

from lightning_cnn.errors import DataError
from lightning_cnn.strategy._doctor import Diagnosis, check
from lightning_cnn.strategy._watched import Watched


class OneReplica(Watched, DDPStrategy):
    """Base of the strategies that divide the model or the picture instead of the batch."""

    def __init__(self, *, timeout_s: float = 1800.0, **kwargs: Any) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_s), **kwargs)
        self.timeout_s = timeout_s

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}

    def process_dataloader(self, dataloader: object) -> object:
        own: Any = getattr(getattr(dataloader, "batch_sampler", None), "sampler", None)
        if getattr(own, "num_replicas", 0) is None:  # it shares by itself and would ask the process group
            own.num_replicas, own.rank = 1, 0
        return dataloader

    def setup(self, trainer: Trainer) -> None:
        check(trainer, trainer.lightning_module)
        super().setup(trainer)
        for metric in self._metrics():
            metric.distributed_available_fn = _never  # everybody has counted everything
        torch.set_rng_state(self.broadcast(torch.get_rng_state()))
        if self.root_device.type == "cuda":
            torch.cuda.set_rng_state(self.broadcast(torch.cuda.get_rng_state()))

    def teardown(self) -> None:
        for metric in self._metrics():
            metric.distributed_available_fn = None
        super().teardown()

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        problems = []
        if self._layer_sync is not None:
            problems.append("sync_batchnorm=True is for processes with different batches; here all see the same one. Leave it out")
        if compiled := [name or "the model" for name, m in model.named_modules() if isinstance(m, OptimizedModule)]:
            problems.append(f"{compiled[0]} is compiled, and a compiled graph cannot be divided; hand over the model as it was before")
        return Diagnosis(problems, [])

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        _sync_module_states(self.lightning_module)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Every process has the number of the whole batch already."""
        return tensor

    def check_same_batch(self, batch: Any) -> None:
        """Raise where the processes were given different batches: the sum of all numbers in it must agree."""
        sums: list[float] = []
        apply_to_collection(batch, Tensor, lambda t: sums.append(float(t.detach().sum(dtype=torch.float64))))
        total = math.fsum(sums)
        total = total if math.isfinite(total) else 0.0
        ends = torch.tensor([total, -total], dtype=torch.float64, device=self.root_device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if float(ends.sum()) != 0.0:
            raise DataError(
                f"rank {self.global_rank} was given another batch than the others (its numbers add up to {total:.6g}, elsewhere up to "
                f"{float(ends[0]):.6g}), but {type(self).__name__} needs the same batch everywhere. Take out samplers that share the data "
                "among ranks, and random transforms that are not seeded alike."
            )

    def _metrics(self) -> list[Metric]:
        module = self.lightning_module
        return [m for m in module.modules() if isinstance(m, Metric)] if module is not None else []


def _never() -> bool:
    return False
