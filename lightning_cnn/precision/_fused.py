"""Adam and AdamW on the CPU in one pass over memory; every other optimizer steps on shadows.

Widening, stepping and rounding one after the other move a parameter's numbers four times. The arithmetic is torch.optim's, to the last
bits of float32.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, optim
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_cnn.functional import counter
from lightning_cnn.kernels import adamw
from lightning_cnn.precision import _states
from lightning_cnn.precision._shadow import splits

EMPTY = {
    "wide": np.empty(0, np.float32),
    "half": np.empty(0, np.uint16),
    "codes": np.empty((0, _states.BLOCK), np.uint8),
    "exponents": np.empty(0, np.int8),
    "unsigned": np.empty(0, np.bool_),
}


def accepts(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> bool:
    """Whether `step` can stand in for the optimizer's own."""
    if type(optimizer) not in (optim.Adam, optim.AdamW) or not splits(optimizer):
        return False
    if any(group.get(option) for option in ("amsgrad", "differentiable", "capturable")):
        return False
    plain = not isinstance(parameter, DTensor) and parameter.device.type == "cpu" and parameter.is_contiguous()
    return plain and parameter.grad is not None and parameter.grad.layout == torch.strided


@torch.no_grad()
def step(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, storage: str, *, seed: int, step: int, stream: str) -> None:
    """Step a bfloat16 parameter that has a gradient, and its moments, in place."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state |= {name: _states.empty(parameter, storage) for name in ("exp_avg", "exp_avg_sq")}
    state["step"] += 1

    def key(stream: str) -> int:
        return counter.key(seed, "rounding", stream, step)

    mean, square = (_moment(state, name, key(f"{stream}/{name}")) for name in ("exp_avg", "exp_avg_sq"))
    adamw.step(
        _words(parameter.detach()),
        _words(parameter.grad.to(torch.bfloat16).contiguous()),  # pyright: ignore[reportOptionalMemberAccess]
        mean,
        square,
        key(stream),
        _rule(group, float(state["step"])),
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(parameter)


def _rule(group: dict[str, Any], step: float) -> adamw.Rule:
    (beta1, beta2), lr, decay = map(float, group["betas"]), float(group["lr"]), float(group["weight_decay"])
    decoupled = group.get("decoupled_weight_decay", False)
    numbers = {
        "shrink": 1 - lr * decay if decoupled else 1.0,
        "pull": 0.0 if decoupled else decay,
        "sign": -1.0 if group["maximize"] else 1.0,
        "keep_mean": 1 - beta1,
        "keep_square": beta2,
        "new_square": 1 - beta2,
        "rate": lr / (1 - beta1**step),
        "square_rate": (1 - beta2**step) ** -0.5,
        "eps": float(group["eps"]),
    }
    return adamw.Rule(**{name: np.float32(value) for name, value in numbers.items()})


def _moment(state: dict[str, Any], name: str, key: int) -> adamw.Moment:
    value = state[name]
    if isinstance(value, _states.Packed):
        arrays = {"codes": value.codes.numpy(), "exponents": value.exponents.numpy(), "unsigned": value.unsigned.numpy()}
    else:
        value = state[name] = value.contiguous()
        arrays = {"half": _words(value)} if value.dtype == torch.bfloat16 else {"wide": value.numpy().reshape(-1)}
    return adamw.Moment(**EMPTY | arrays, key=np.uint64(key))


def _words(x: Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy().reshape(-1)
