"""A model whose weights lie in different processes, and how it becomes whole again."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cnn.errors import UnsupportedLayerError


class Scattered(ParallelStrategy):
    """Mixin of strategies that scatter the weights: says when the Trainer is done and the model must be whole (`_unite`)."""

    def _unite(self) -> None:
        raise NotImplementedError

    def on_train_end(self) -> None:
        self._unite()

    def on_validation_end(self) -> None:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.VALIDATING:
            self._unite()

    def on_test_end(self) -> None:
        self._unite()

    def on_predict_end(self) -> None:
        self._unite()


class Owners:
    """Which process of a group has which parameter or buffer of the module; the others keep the shape only."""

    def __init__(self, module: nn.Module, place: int, group: Any) -> None:
        self.module, self.place, self.group = module, place, group
        self._of: dict[int, int] = {}  # id of a tensor -> number of its process in the group

    def __bool__(self) -> bool:
        return bool(self._of)

    def divide(self, stages: list[nn.Module], places: list[int], optimizers: list[Optimizer]) -> None:
        """Give each tensor to the process of its stage."""
        for stage, owner in zip(stages, places, strict=True):
            for tensor in (*stage.parameters(), *stage.buffers()):
                if self._of.setdefault(id(tensor), owner) != owner:
                    raise UnsupportedLayerError("stages of different processes share a weight; cut elsewhere with stages=[...]")
        for parameter in self.module.parameters():
            if self._of.get(id(parameter), self.place) != self.place:
                parameter.grad, parameter.data = None, parameter.data.new_zeros(()).expand(parameter.shape)
                for optimizer in optimizers:
                    optimizer.state.pop(parameter, None)

    def mine(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if self._of.get(id(p)) == self.place]

    def my_statistics(self) -> list[Tensor]:
        return [b for b in self.module.buffers() if self._of.get(id(b)) == self.place and b.is_floating_point()]

    def collect(self, state: dict[str, Any]) -> None:
        """Fill the first process's `state_dict` of the module with what the others have."""
        named: dict[str, Tensor] = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for name, tensor in state.items():
            owner = self._of.get(id(named.get(name)), 0)
            if owner and self.place == owner:
                dist.send(tensor.contiguous(), group=self.group, group_dst=0)
            elif owner and self.place == 0:
                state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                dist.recv(state[name], group=self.group, group_src=owner)

    def collect_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """On the first process, an optimizer's `state_dict` with what the others have."""
        parts: list[Any] = [None] * dist.get_world_size(self.group)
        on_cpu = apply_to_collection(state["state"], Tensor, lambda t: t.detach().cpu())
        dist.gather_object(on_cpu, None if self.place else parts, group=self.group, group_dst=0)
        return {**state, "state": {k: v for part in reversed(parts) if part for k, v in part.items()}}

    def unite(self) -> None:
        """Everybody has everything again."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            owner = self._of.get(id(tensor))
            if owner is not None:
                mine = owner == self.place
                value = tensor.data.contiguous() if mine else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                dist.broadcast(value, group=self.group, group_src=owner)
                if not mine:
                    tensor.data = value
        self._of.clear()
