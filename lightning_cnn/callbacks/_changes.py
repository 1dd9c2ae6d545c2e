"""The changes themselves: each is a function that applies one and returns how to take it back."""

import copy
import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

Undo = Callable[[], None]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


def channels_last(module: nn.Module) -> Undo:
    """Weights of convolutions in NHWC; convolutions hand that layout on from the first one. The values stay."""
    given = [(p, p.data) for p in module.parameters() if p.dim() == 4]
    for parameter, data in given:
        parameter.data = data.contiguous(memory_format=torch.channels_last)

    def undo() -> None:
        for parameter, _ in given:
            parameter.data = parameter.data.contiguous()

    return undo


def keeps_memory() -> bool:
    """Whether the C library is one that can be told to keep freed memory: glibc."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def keep_memory() -> Undo:
    """What a step frees stays with the process: glibc would hand much of it back, and the next step faults it in page by page.

    Taken back, its thresholds stand where glibc's own adjustment ends (mallopt(3)), because it does not tell where they stood.
    """
    if not keeps_memory():
        return lambda: None
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)

    def undo() -> None:
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        libc.malloc_trim(0)

    return undo


def layout_is_fixed(trainer: Trainer) -> bool:
    """Whether DDP has laid out buckets for the gradients: those of weights whose strides change afterwards are scrambled in one step."""
    return isinstance(trainer.strategy.model, DistributedDataParallel)


def autocast(trainer: Trainer, dtype: torch.dtype) -> Undo:
    """Lightning's own mixed precision in the place of plain float32."""
    strategy, before = trainer.strategy, trainer.precision_plugin
    word: Any = "bf16-mixed" if dtype == torch.bfloat16 else "16-mixed"
    strategy.precision_plugin = MixedPrecision(word, strategy.root_device.type)
    return lambda: setattr(strategy, "precision_plugin", before)


def plain_precision(trainer: Trainer) -> bool:
    return type(trainer.precision_plugin) is Precision


def fused(optimizers: Sequence[torch.optim.Optimizer]) -> Undo:
    """All weights in one kernel a step."""
    before = [(group, group.get("fused"), group.get("foreach")) for optimizer in optimizers for group in optimizer.param_groups]
    for group, _, _ in before:
        group.update(fused=True, foreach=False)

    def undo() -> None:
        for group, was_fused, foreach in before:
            group.update(fused=was_fused, foreach=foreach)

    return undo


def can_be_fused(optimizer: torch.optim.Optimizer) -> bool:
    unset = all(not g.get(word) for g in optimizer.param_groups for word in ("fused", "foreach", "capturable", "differentiable"))
    floats = all(p.is_floating_point() for g in optimizer.param_groups for p in g["params"])
    return type(optimizer) in FUSED and unset and floats and not optimizer.state


def flag(owner: Any, name: str, value: Any) -> Undo:
    """A setting of torch's."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def compiled(modules: Sequence[nn.Module], mode: str | None = None) -> Undo:
    """`torch.compile` in place: names, keys and types of the modules stay."""
    for module in modules:
        module.compile(mode=mode)

    def undo() -> None:
        for module in modules:
            module._compiled_call_impl = None

    return undo


def parts(pl_module: LightningModule) -> list[nn.Module]:
    """The children that hold weights; the LightningModule itself is not compiled, because it logs."""
    return [child for child in pl_module.children() if next(child.parameters(), None) is not None]


def training_step(trainer: Trainer, pl_module: LightningModule, image: Tensor) -> Callable[[], object]:
    """A forward and a backward pass of the model on one batch that leave nothing behind: no gradient, statistic or random draw."""
    weights = [p for p in pl_module.parameters() if p.requires_grad]

    def step() -> None:
        with _undisturbed(pl_module), torch.enable_grad():
            with trainer.precision_plugin.train_step_context():
                outputs = [leaf for leaf in tree_leaves(pl_module(image)) if isinstance(leaf, Tensor) and leaf.requires_grad]
                loss = torch.stack([leaf.float().square().mean() for leaf in outputs]).sum()
            torch.autograd.grad(loss, weights, allow_unused=True)

    return step


def optimizer_step(optimizers: Sequence[torch.optim.Optimizer]) -> Callable[[], object]:
    """The optimizers' step on copies of their weights, with the settings they have when it is called."""
    groups = [[[p.detach().clone().requires_grad_() for p in group["params"]] for group in opt.param_groups] for opt in optimizers]
    twins: dict[tuple[bool, ...], list[Any]] = {}

    def step() -> None:
        key = tuple(bool(group.get("fused")) for opt in optimizers for group in opt.param_groups)
        if key not in twins:
            twins[key] = [_twin(opt, weights) for opt, weights in zip(optimizers, groups, strict=True)]
        for twin in twins[key]:
            twin.step()

    return step


def _twin(optimizer: torch.optim.Optimizer, weights: list[list[Tensor]]) -> Any:
    kind: Any = type(optimizer)
    options = [{key: copy.copy(value) for key, value in g.items() if key in optimizer.defaults} for g in optimizer.param_groups]
    for tensors in weights:
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
    return kind([{"params": tensors, **option} for tensors, option in zip(weights, options, strict=True)])


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
