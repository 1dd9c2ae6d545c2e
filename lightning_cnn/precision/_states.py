"""Optimizer states kept in float32, in bfloat16, or in 8 bits with a power-of-two scale a block; rounded stochastically.

In 8 bits a state is e4m3 where it has two signs and e5m2 where it is never negative: a second moment spans squares, and its steps are
divisions, so a positive one is never rounded to zero. As the scales are powers of two, values that came from 8 bits return to them
exactly: a checkpoint holds plain float32 and resumes bit for bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_cnn.functional.rounding import round_stochastic
from lightning_cnn.precision._shadow import parameters

STORAGES = ("fp32", "bf16", "8bit")
BLOCK = 256
SMALLEST = 2.0**-16  # the smallest positive e5m2


@dataclass
class Packed:
    """A float32 tensor in 8 bits: `codes` times two to the `exponents`, one a block."""

    codes: Tensor
    exponents: Tensor

    def unpack(self, like: Tensor) -> Tensor:
        return (self.codes.float() * _power_of_two(self.exponents)[:, None]).reshape(-1)[: like.numel()].view(like.shape)

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + self.exponents.numel()


def pack(value: Tensor, *, seed: int, step: int, stream: str) -> Packed:
    flat = torch.nn.functional.pad(value.detach().reshape(-1), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
    signed = bool(flat.min() < 0)
    # the largest of a block lands in (64, 128] (e4m3 ends at 448) or in (2**13, 2**14] (e5m2 ends at 57344)
    exponents = torch.frexp(flat.abs().amax(1)).exponent - (7 if signed else 14)
    exponents = exponents.clamp(-120, 120)
    scaled = flat * _power_of_two(-exponents)[:, None]
    if not signed:
        scaled = torch.where(flat > 0, scaled.clamp(min=SMALLEST), scaled)
    codes = round_stochastic(scaled, "e4m3" if signed else "e5m2", seed=seed, step=step, stream=stream)
    return Packed(codes, exponents.to(torch.int8))


def _power_of_two(exponents: Tensor) -> Tensor:
    return ((exponents.int() + 127) << 23).view(torch.float32)  # exact, which exp2 need not be


def entries(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor | Packed]]:
    """The states of a parameter that have its shape (a moment), not its scalars (a step count)."""
    for name, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Packed) or (isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape):
            yield name, value


def widen(optimizer: Optimizer, parameter: Tensor) -> None:
    for name, value in list(entries(optimizer, parameter)):
        optimizer.state[parameter][name] = value.unpack(parameter) if isinstance(value, Packed) else value.float().contiguous()


def narrow(optimizer: Optimizer, parameter: Tensor, storage: str, *, seed: int, step: int, stream: str) -> None:
    if storage == "fp32":
        return
    for name, value in list(entries(optimizer, parameter)):
        if isinstance(value, Packed) or (storage == "bf16" and value.dtype == torch.bfloat16):
            continue
        key = {"seed": seed, "step": step, "stream": f"{stream}/{name}"}
        optimizer.state[parameter][name] = round_stochastic(value, "bf16", **key) if storage == "bf16" else pack(value, **key)


def portable(optimizer: Optimizer, store: Callable[[Tensor], None]) -> None:
    """Let checkpoints hold plain tensors, and let loading keep them as they are before `store` puts them away.

    `Optimizer.load_state_dict` casts every state to its parameter's dtype, which would round float32 moments to bfloat16.
    """
    loading: dict[str, Any] = {}

    def save(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        owners = dict(zip(_ids(state_dict), parameters(optimizer), strict=True))
        state_dict["state"] = {
            number: {name: value.unpack(owners[number]) if isinstance(value, Packed) else value for name, value in state.items()}
            for number, state in state_dict["state"].items()
        }

    def before(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        loading.update(state_dict)

    def after(optimizer: Optimizer) -> None:
        for number, parameter in zip(_ids(loading), parameters(optimizer), strict=True):
            for name, value in loading["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    optimizer.state[parameter][name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            store(parameter)
        loading.clear()

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


def _ids(state_dict: dict[str, Any]) -> list[Any]:
    return [number for group in state_dict["param_groups"] for number in group["params"]]
