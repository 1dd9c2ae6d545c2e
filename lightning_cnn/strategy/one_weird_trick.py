"""Data parallelism for the convolutions, model parallelism for the fully connected layers."""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import Optimizer

from lightning_cnn.errors import DataError, raise_all
from lightning_cnn.strategy._average import average
from lightning_cnn.strategy._doctor import Diagnosis, batch_norms, check
from lightning_cnn.strategy._owners import Scattered
from lightning_cnn.strategy._watched import Watched

log = logging.getLogger(__name__)


class OneWeirdTrick(Scattered, Watched, ModelParallelStrategy):
    """Each process has its share of the batch in the convolutions, and its share of the outputs in every fully connected layer.

    Convolutions have few weights and many activations, fully connected layers the reverse: so the gradients of the former are averaged,
    and of the latter each process keeps some columns and asks for everybody's activations. n processes with batch b take the steps of one
    with batch n * b.

    Source: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997, scheme (a). Runs
    torch's DTensor under Lightning's ModelParallelStrategy.
    """

    def __init__(self, *, timeout_s: float = 1800.0, process_group_backend: str | None = None) -> None:
        raise_all([f"timeout_s must be positive, got {timeout_s}"] * (timeout_s <= 0))
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size="auto",
            save_distributed_checkpoint=False,  # one file with the whole model, which one process can load
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
        )
        self.timeout_s = timeout_s
        self._hooks: list[tuple[dict, int]] = []  # those that divide the layers
        self._samples = self._most = self._least = 0  # in the batch at hand: here, and on the ranks with the most and the least

    @property
    def _num_nodes(self) -> int:
        return self.num_nodes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        self._tensor_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        check(trainer, module)
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if self.world_size > 1 and not any(isinstance(p, DTensor) for p in module.parameters()):
            _sync_module_states(module)
            self._divide(module)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["foreach"] = False  # its kernels refuse lists in which some tensors are divided and some are not
        self.precision_plugin.clip_grad_by_norm = self._clip  # type: ignore[method-assign]

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        found = Diagnosis([], [])
        if not model.automatic_optimization:
            found.problems.append(
                "automatic_optimization=False: gradients are averaged after each backward pass; use automatic optimisation"
            )
        if self._layer_sync is not None:
            found.problems.append("sync_batchnorm=True is not applied by this strategy; convert the layers yourself or use sync_ddp")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            found.problems.append(
                "precision='16-mixed': processes hold different weights and would disagree on an overflow; use 'bf16-mixed'"
            )
        if trainer.world_size > 1 and not shared_layers(model, trainer.world_size):
            found.problems.append(
                f"the model has no nn.Linear with outputs for {trainer.world_size} processes, so nothing would be divided; use sync_ddp"
            )
        if norms := batch_norms(model):
            found.advice.append(f"BatchNorm ({norms[0]}, ...) uses each process's own batch, so n processes differ from one")
        return found

    def _divide(self, module: LightningModule) -> None:
        names, mesh = shared_layers(module, self.world_size), self.device_mesh["tensor_parallel"]
        layers = [module.get_submodule(name) for name in names]
        tables: list[dict] = [table for layer in layers for table in (layer._forward_pre_hooks, layer._forward_hooks)]
        before, old = [set(table) for table in tables], _parameters(layers)
        plan: Any = {name: ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)) for name in names}
        for layer in layers:
            layer.register_forward_pre_hook(self._fill)
        parallelize_module(module, mesh, plan)
        for layer in layers:
            layer.register_forward_hook(self._cut)
        self._hooks = [(table, key) for table, keys in zip(tables, before, strict=True) for key in table if key not in keys]
        self._replaced(old, _parameters(layers), lambda t: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None))
        log.info("OneWeirdTrick: %d processes share the outputs of %s", self.world_size, ", ".join(names))

    def _unite(self) -> None:
        """Plain layers with all their weights on every rank again, for whoever uses the model after the Trainer."""
        assert self.lightning_module is not None
        for table, key in self._hooks:
            table.pop(key, None)
        self._hooks.clear()
        layers = [m for m in self.lightning_module.modules() if any(isinstance(p, DTensor) for p in m.parameters(recurse=False))]
        old = _parameters(layers)
        for layer in layers:
            vars(layer).pop("_distribute_module_applied", None)
            for name, p in list(layer.named_parameters(recurse=False)):
                layer.register_parameter(name, nn.Parameter(_whole(p.detach()), p.requires_grad))
        self._replaced(old, _parameters(layers), _whole)

    def _replaced(self, old: list[nn.Parameter], new: list[nn.Parameter], change: Callable[[Tensor], Tensor]) -> None:
        """Optimizers go on with the new parameters, and with what they have kept about the old ones."""
        others = dict(zip(old, new, strict=True))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [others.get(p, p) for p in group["params"]]
            for p in [p for p in old if p in optimizer.state]:
                kept = optimizer.state.pop(p).items()
                optimizer.state[others[p]] = {k: change(v) if isinstance(v, Tensor) and v.shape == p.shape else v for k, v in kept}

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        batch = super().batch_to_device(batch, device, dataloader_idx)
        sizes: list[int] = []
        apply_to_collection(batch, Tensor, lambda t: sizes.append(len(t)) if t.dim() else None)
        if self.world_size > 1 and sizes:
            ends = torch.tensor([sizes[0], -sizes[0]], device=self.root_device)
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            self._samples, self._most, self._least = sizes[0], int(ends[0]), -int(ends[1])
        return batch

    def _fill(self, layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before a divided layer: zeros up to the largest batch. DTensor wants equal parts, and zeros add nothing to a gradient."""
        x = given[0]
        if self._least == self._most:
            return None
        if len(x) != self._samples:
            raise DataError(
                f"rank {self.global_rank} was given {self._samples} samples, and the ranks' batches have {self._least} to {self._most}, but a "
                f"fully connected layer has {len(x)} rows. Only rows that are samples can be evened out: use drop_last=True."
            )
        return (nn.functional.pad(x, (*[0, 0] * (x.dim() - 1), 0, self._most - len(x))), *given[1:])

    def _cut(self, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if self._least == self._most else output[: self._samples]

    def post_backward(self, closure_loss: Tensor) -> None:
        """Sum or average over the processes once all batches of a step are in."""
        assert self.lightning_module is not None
        if self.world_size == 1 or self.lightning_module.trainer.fit_loop._should_accumulate():
            return
        gradients = [p.grad for p in self.lightning_module.parameters() if p.grad is not None]
        for gradient in gradients:
            if isinstance(gradient, DTensor):  # the sum over everybody's samples already
                gradient.to_local().div_(self.world_size)
        average([g for g in gradients if not isinstance(g, DTensor)])

    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        """By the norm of the whole gradient: of what is divided, every process's part counts."""
        gradients = [p.grad for p in self.precision_plugin.main_params(optimizer) if p.grad is not None]
        divided = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        common = [g for g in gradients if not isinstance(g, DTensor)]
        square = _squares(divided, self.root_device)
        dist.all_reduce(square)
        norm = (square + _squares(common, self.root_device)).sqrt()
        factor = (clip_val / (norm + 1e-6)).clamp(max=1.0)
        for gradient in [*divided, *common]:
            gradient.mul_(factor.to(gradient.dtype))

    def teardown(self) -> None:
        self.precision_plugin.__dict__.pop("clip_grad_by_norm", None)
        super().teardown()


def shared_layers(model: nn.Module, processes: int) -> list[str]:
    """Names of the fully connected layers with at least one output for each process."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features >= processes]


def _parameters(layers: list[nn.Module]) -> list[nn.Parameter]:
    return [p for layer in layers for p in layer.parameters(recurse=False)]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    return sum((t.double().square().sum() for t in tensors), start=torch.zeros((), dtype=torch.float64, device=device))
