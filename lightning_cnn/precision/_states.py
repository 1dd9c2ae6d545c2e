"""Optimizer states kept in float32, in bfloat16, or in 8 bits with a power-of-two scale a block; rounded stochastically.

In 8 bits a block is e4m3 where it has two signs and e5m2 where it is never negative: a second moment spans squares, and its steps are
divisions, so a positive one is never rounded to zero. As the scales are powers of two, values that came from 8 bits return to them
exactly: a checkpoint holds plain float32 and resumes bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_cnn.functional import counter
from lightning_cnn.functional.rounding import as_format, round_stochastic
from lightning_cnn.kernels import eight_bits
from lightning_cnn.precision._shadow import Piece, parameters
from lightning_cnn.precision._shard import as_shard, global_index, local, write_back

STORAGES = ("fp32", "bf16", "8bit")
BLOCK = eight_bits.BLOCK
SMALLEST = 2.0**-16  # the smallest positive e5m2


@dataclass
class Packed:
    """A float32 tensor in 8 bits: `codes` times two to the `exponents`, one a block; e5m2 in blocks that are `unsigned`, else e4m3."""

    codes: Tensor
    exponents: Tensor
    unsigned: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> "Packed":
        blocks, device = -(-local(like).numel() // BLOCK), like.device
        codes = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device)
        return cls(codes, *(torch.zeros(blocks, dtype=dtype, device=device) for dtype in (torch.int8, torch.bool)))

    def blocks(self, first: int, numbers: int) -> "Packed":
        rows = slice(first // BLOCK, -(-(first + numbers) // BLOCK))
        return Packed(self.codes[rows], self.exponents[rows], self.unsigned[rows])

    def unpack(self, like: Tensor) -> Tensor:
        """As float32 in the shape of `like`, of which this is the local part."""
        shape = local(like).shape
        if self.codes.device.type == "cpu":
            out = torch.empty(shape)
            eight_bits.unpack(self.codes.numpy(), self.exponents.numpy(), self.unsigned.numpy(), out.numpy().reshape(-1))
            return as_shard(out, like)
        signed, unsigned = (self.codes.view(kind).float() for kind in (torch.float8_e4m3fn, torch.float8_e5m2))
        value = torch.where(self.unsigned[:, None], unsigned, signed) * _power_of_two(self.exponents)[:, None]
        return as_shard(value.reshape(-1)[: shape.numel()].view(shape), like)

    def pack(self, value: Tensor, *, seed: int, step: int, stream: str, index: int = 0) -> "Packed":
        """Put float32 `value` here, rounded stochastically; its first element is number `index`.

        Blocks are a rank's own, and so is the order of their noise; copies of a shard agree.
        """
        if isinstance(value, DTensor):
            place, value = global_index(value), local(value)
            index = place if isinstance(place, int) else int(place.flatten()[0])
        if value.device.type == "cpu":
            key = counter.key(seed, "rounding", stream, step)
            arrays = (t.numpy() for t in (self.codes, self.exponents, self.unsigned))
            eight_bits.pack(value.detach().contiguous().numpy().reshape(-1), key, index, *arrays)
        else:
            self._pack_anywhere(value, seed=seed, step=step, stream=stream, index=index)
        return self

    def _pack_anywhere(self, value: Tensor, **noise: Any) -> None:
        """The kernel's bits in torch operations; what is not finite becomes NaN, and spoils its block."""
        flat = torch.nn.functional.pad(value.detach().reshape(-1), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
        unsigned = ~(flat < 0).any(1)
        # the largest of a block lands in (64, 128] (e4m3 ends at 448) or in (2**13, 2**14] (e5m2 ends at 57344)
        exponents = (torch.frexp(flat.abs().amax(1)).exponent - torch.where(unsigned, 14, 7)).clamp(-120, 120)
        scaled = flat * _power_of_two(-exponents)[:, None]
        signed = round_stochastic(scaled, "e4m3", **noise).view(torch.uint8)
        positive = round_stochastic(torch.where(flat > 0, scaled.clamp(min=SMALLEST), scaled), "e5m2", **noise).view(torch.uint8)
        self.codes.copy_(torch.where(unsigned[:, None], positive, signed))
        self.exponents.copy_(exponents)
        self.unsigned.copy_(unsigned)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.exponents.nbytes + self.unsigned.nbytes


def _power_of_two(exponents: Tensor) -> Tensor:
    return ((exponents.int() + 127) << 23).view(torch.float32)  # exact, which exp2 need not be


def is_moment(value: Any, parameter: Tensor) -> bool:
    """Whether a state has a number for each element (a moment), and is not a scalar (a step count)."""
    if isinstance(value, Packed):
        return True
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape and value.dim() > 0


def empty(parameter: Tensor, storage: str) -> Any:
    """A moment of zeros, as stored."""
    if storage == "8bit":
        return Packed.empty(parameter)
    dtype = torch.bfloat16 if storage == "bf16" else torch.float32
    return torch.zeros_like(parameter.detach(), dtype=dtype, memory_format=torch.contiguous_format)


def widened(state: dict[str, Any], piece: Piece) -> dict[str, Any]:
    """The state of a piece, its moments in float32: of float32 memory itself, of what is stored in less a copy."""
    return {name: _wide(value, piece) for name, value in state.items()}


def _wide(value: Any, piece: Piece) -> Any:
    if isinstance(value, Packed):
        like = piece.of(piece.parameter)
        return value.blocks(piece.first, like.numel()).unpack(like)
    if is_moment(value, piece.parameter):
        return piece.of(value).float().contiguous()
    return value if piece.stop is None or not isinstance(value, Tensor) else value.clone()  # every piece counts the same step


def put_away(whole: dict[str, Any], state: dict[str, Any], piece: Piece, storage: str, **noise: Any) -> None:
    """Store the state that a step left of a piece in that of the `whole` parameter; moments as `storage`, rounded stochastically."""
    for name, value in state.items():
        if not is_moment(value, piece.of(piece.parameter)) or (storage == "fp32" and piece.stop is None):
            whole[name] = value
        else:
            key = noise | {"stream": f"{noise['stream']}/{name}", "index": piece.first}
            whole[name] = _stored(whole.get(name), value, piece, storage, key)


def _stored(place: Any, value: Tensor, piece: Piece, storage: str, key: dict[str, Any]) -> Any:
    kind: Any = Packed if storage == "8bit" else Tensor
    if not isinstance(place, kind) or (storage == "bf16" and place.dtype != torch.bfloat16):
        place = empty(piece.parameter, storage)
    if isinstance(place, Packed):
        place.blocks(piece.first, value.numel()).pack(value, **key)
        return place
    part = piece.of(place)
    if storage == "bf16":
        write_back(part, value, as_format("bf16"), **key)
    elif part.data_ptr() != value.data_ptr():
        part.copy_(value)
    return place


def portable(optimizer: Optimizer, storage: str, store: Callable[[Tensor], None]) -> None:
    """Let checkpoints hold plain tensors, and let loading keep them as they are before `store` puts them away.

    `Optimizer.load_state_dict` casts every state to its parameter's dtype, which would round float32 moments to bfloat16.
    """
    loading: dict[str, Any] = {}

    def save(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        owners = dict(zip(_ids(state_dict), parameters(optimizer), strict=True))
        state_dict["state"] = {
            number: {name: _plain(value, owners[number], storage) for name, value in state.items()}
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


def _plain(value: Any, owner: Tensor, storage: str) -> Any:
    if isinstance(value, Packed):
        return value.unpack(owner)
    # torch.distributed makes empty moments in the parameter's type before it loads those of a checkpoint into them
    return value.float() if storage != "bf16" and is_moment(value, owner) and value.itemsize < 4 else value


def _ids(state_dict: dict[str, Any]) -> list[Any]:
    return [number for group in state_dict["param_groups"] for number in group["params"]]
