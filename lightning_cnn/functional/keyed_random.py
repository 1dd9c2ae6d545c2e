"""Code written for torch's generator, drawing from the counter instead: `with KeyedRandom(key, index): pipeline(images)`.

A draw whose first axis is the batch gives each sample numbers that depend on (key, number of the draw, sample) alone, so a pipeline
that asks for one row a sample (Kornia's do) repeats itself for any batch size, order or world size, and global generators stay
untouched. A draw of any other shape is the batch's: it depends on the smallest sample index in it.

Uniform, integer and Bernoulli numbers are the same bits in any batch; normal and gamma numbers within the last bits, because torch's
vectorised logarithm differs from its scalar one.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional import counter

GAMMA_ROUNDS = 16  # one round of Marsaglia and Tsang is refused with probability < 0.05: 16 are with 1e-21


class KeyedRandom(TorchDispatchMode):
    """Inside this context torch's random operations are functions of `key`, the number of the draw, and the sample's `index`.

    It sees every operation torch marks as random, also those of compiled C++ code paths, and refuses by name the few it does not know
    rather than let a global generator in. Costs some microseconds for every operation inside.
    """

    def __init__(self, key: int, index: Int64[Tensor, " b"]) -> None:
        super().__init__()
        self.key = key
        self.index = index
        self.draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        draw = _DRAWS.get(func)
        if draw is None:
            raise ConfigurationError(
                f"{func} draws random numbers in a way that cannot be keyed by sample. Use an operation that draws uniform, normal, "
                "integer, Bernoulli, exponential, gamma or beta numbers."
            )
        result = draw(self, *args, **kwargs)
        self.draws += 1
        return result

    def uniform(self, shape: Sequence[int], device: torch.device | None, part: str = "") -> Tensor:
        """Float32 in [0, 1) of `shape` for the current draw."""
        return counter.uniform(*self._counters(tuple(shape), device, part))

    def normal(self, shape: Sequence[int], device: torch.device | None, part: str = "") -> Tensor:
        return counter.normal(*self._counters(tuple(shape), device, part))

    def _counters(self, shape: tuple[int, ...], device: torch.device | None, part: str) -> tuple[int, Tensor]:
        of_samples = bool(shape) and shape[0] == len(self.index)
        rows = self.index if of_samples else self.index.min().reshape(1)
        each = torch.arange(prod(shape[1:] if of_samples else shape), device=device)
        counters = (rows.to(each.device)[:, None] << 32) + each
        return counter.key(self.key, "sample" if of_samples else "batch", self.draws, part), counters.reshape(shape)


def gamma(noise: KeyedRandom, shape: Tensor) -> Tensor:
    """Standard gamma numbers of the given `shape` parameters, without a loop of unknown length.

    Source: Marsaglia & Tsang 2000, "A simple method for generating gamma variables", with their boost for shapes below one.
    """
    d = torch.where(shape < 1, shape + 1, shape).float()[..., None] - 1 / 3
    rounds = (*shape.shape, GAMMA_ROUNDS)
    x = noise.normal(rounds, shape.device, "normal")
    v = (1 + x / (9 * d).sqrt()) ** 3
    log_u = torch.log1p(-noise.uniform(rounds, shape.device, "uniform"))
    accept = (v > 0) & (log_u < 0.5 * x * x + d - d * v + d * v.clamp(min=1e-30).log())
    first = accept.byte().argmax(-1, keepdim=True)
    result = (d * v.gather(-1, first)).squeeze(-1)
    boost = (1 - noise.uniform(shape.shape, shape.device, "boost")) ** (1 / shape.float())
    return torch.where(shape < 1, result * boost, result).clamp(min=torch.finfo(torch.float32).tiny).to(shape.dtype)


def _rand(noise: KeyedRandom, size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return noise.uniform(size, device).to(dtype or torch.get_default_dtype())


def _randn(noise: KeyedRandom, size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return noise.normal(size, device).to(dtype or torch.get_default_dtype())


def _rand_like(noise: KeyedRandom, like: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return noise.uniform(like.shape, device or like.device).to(dtype or like.dtype)


def _randn_like(noise: KeyedRandom, like: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return noise.normal(like.shape, device or like.device).to(dtype or like.dtype)


def _integers(noise: KeyedRandom, low: int, high: int, size: Sequence[int], device: Any, dtype: Any) -> Tensor:
    return (low + (noise.uniform(size, device).double() * (high - low)).floor()).to(dtype or torch.int64)


def _randint(noise: KeyedRandom, high: int, size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return _integers(noise, 0, high, size, device, dtype)


def _randint_low(
    noise: KeyedRandom, low: int, high: int, size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return _integers(noise, low, high, size, device, dtype)


def _randperm(noise: KeyedRandom, n: int, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return noise.uniform((n,), device).argsort(stable=True).to(dtype or torch.int64)


def _uniform_(noise: KeyedRandom, out: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return out.copy_(low + noise.uniform(out.shape, out.device) * (high - low))


def _normal_(noise: KeyedRandom, out: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return out.copy_(mean + noise.normal(out.shape, out.device) * std)


def _normal(noise: KeyedRandom, mean: Any, std: Any = 1.0, **_: Any) -> Tensor:
    like = mean if isinstance(mean, Tensor) else std
    shape = torch.broadcast_shapes(*(value.shape for value in (mean, std) if isinstance(value, Tensor)))
    return (mean + noise.normal(shape, like.device) * std).to(like.dtype)


def _normal_size(
    noise: KeyedRandom, mean: float, std: float, size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return (mean + noise.normal(size, device) * std).to(dtype or torch.get_default_dtype())


def _bernoulli(noise: KeyedRandom, p: Tensor, **_: Any) -> Tensor:
    return (noise.uniform(p.shape, p.device) < p).to(p.dtype)


def _bernoulli_p(noise: KeyedRandom, like: Tensor, p: float = 0.5, **_: Any) -> Tensor:
    return (noise.uniform(like.shape, like.device) < p).to(like.dtype)


def _bernoulli_(noise: KeyedRandom, out: Tensor, p: float | Tensor = 0.5, **_: Any) -> Tensor:
    return out.copy_(noise.uniform(out.shape, out.device) < p)


def _exponential_(noise: KeyedRandom, out: Tensor, rate: float = 1.0, **_: Any) -> Tensor:
    return out.copy_(-torch.log1p(-noise.uniform(out.shape, out.device)) / rate)


def _gamma(noise: KeyedRandom, shape: Tensor, **_: Any) -> Tensor:
    return gamma(noise, shape)


def _dirichlet(noise: KeyedRandom, concentration: Tensor, **_: Any) -> Tensor:
    parts = gamma(noise, concentration)
    return parts / parts.sum(-1, keepdim=True)


aten = torch.ops.aten
_DRAWS: dict[Any, Callable[..., Tensor]] = {
    aten.rand.default: _rand,
    aten.randn.default: _randn,
    aten.rand_like.default: _rand_like,
    aten.randn_like.default: _randn_like,
    aten.randint.default: _randint,
    aten.randint.low: _randint_low,
    aten.randperm.default: _randperm,
    aten.uniform_.default: _uniform_,
    aten.normal_.default: _normal_,
    aten.normal.Tensor_float: _normal,
    aten.normal.float_Tensor: _normal,
    aten.normal.Tensor_Tensor: _normal,
    aten.normal.float_float: _normal_size,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli_p,
    aten.bernoulli_.float: _bernoulli_,
    aten.bernoulli_.Tensor: _bernoulli_,
    aten.exponential_.default: _exponential_,
    aten._standard_gamma.default: _gamma,
    aten._sample_dirichlet.default: _dirichlet,
}
