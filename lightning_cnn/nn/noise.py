"""Layers with noise in training: `DropConnectLinear`, `DropConnectConv2d`, `Dropout`, `StochasticDepth`.

In evaluation each is the plain layer. Where the noise comes from is a `NoiseSource`, shared by the layers of a network.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_cnn.errors import raise_all
from lightning_cnn.functional import counter, network_noise


class NoiseSource:
    """Noise as a function of (key, sample) while `keyed` holds one, else from torch's generator, like any dropout.

    Drawn from the generator it is one number a layer and pass, so activation checkpointing and seeding work as usual.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.index: Tensor | None = None

    def keyed(self, key: int, index: Tensor, device: torch.device) -> None:
        """Let the next passes depend on `key` and on the sample numbers `index` alone."""
        self.key = torch.tensor(key, dtype=torch.int64, device=device)
        self.index = index.to(device, torch.int64, non_blocking=True)

    def free(self) -> None:
        self.key = self.index = None

    def draw(self, x: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """The key of one layer (its `stream`) and the sample number of each row of `x`."""
        if self.key is None or self.index is None or len(self.index) != len(x):
            return torch.randint(2**62, (), device=x.device), torch.arange(len(x), device=x.device)
        return self.key ^ stream, self.index


class _Noisy(nn.Module):
    """What a noisy layer knows besides its weights: the probability `p`, its stream of noise, and where noise comes from."""

    p: float
    stream: int = 0
    source: NoiseSource

    def make_noisy(self, p: float, source: NoiseSource | None = None, name: str = "") -> None:
        raise_all(problems_of(p, f"{type(self).__name__}{f' {name!r}' if name else ''}"))
        self.p, self.source, self.stream = p, source or NoiseSource(), counter.key(0, name)

    def is_on(self) -> bool:
        return self.training and self.p > 0

    def extra_repr(self) -> str:
        return ", ".join(part for part in (super().extra_repr(), f"p={self.p}") if part)


class Dropout(_Noisy):
    """`functional.network_noise.dropout`: features of vectors, whole channels of maps."""

    def __init__(self, p: float = 0.5, **noise: Any) -> None:
        super().__init__()
        self.make_noisy(p, **noise)

    def forward(self, x: Tensor) -> Tensor:
        return network_noise.dropout(x, self.p, *self.source.draw(x, self.stream)) if self.is_on() else x


class StochasticDepth(_Noisy):
    """`functional.network_noise.stochastic_depth` for the end of a residual branch."""

    def __init__(self, p: float = 0.5, **noise: Any) -> None:
        super().__init__()
        self.make_noisy(p, **noise)

    def forward(self, x: Tensor) -> Tensor:
        return network_noise.stochastic_depth(x, self.p, *self.source.draw(x, self.stream)) if self.is_on() else x


class DropConnectLinear(_Noisy, nn.Linear):
    """`nn.Linear` whose weights are dropped in training, each sample with a mask of its own."""

    def __init__(self, *args: Any, p: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.make_noisy(p)

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_on() or input.ndim < 2:
            return nn.Linear.forward(self, input)
        key, rows = self.source.draw(input, self.stream)
        return network_noise.dropconnect(
            network_noise.linear, input, self.weight, self.bias, self.p, key, rows, channel_axis=input.ndim - 1
        )


class DropConnectConv2d(_Noisy, nn.Conv2d):
    """`nn.Conv2d` whose weights are dropped in training, each sample with a mask of its own."""

    def __init__(self, *args: Any, p: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.make_noisy(p)

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_on() or input.ndim < 4:
            return nn.Conv2d.forward(self, input)
        key, rows = self.source.draw(input, self.stream)
        return network_noise.dropconnect(self._conv_forward, input, self.weight, self.bias, self.p, key, rows, channel_axis=1)


DROPCONNECT: dict[type[nn.Module], type[_Noisy]] = {nn.Linear: DropConnectLinear, nn.Conv2d: DropConnectConv2d}


def problems_of(p: Any, where: str) -> list[str]:
    if isinstance(p, (int, float)) and 0 <= p <= 1:
        return []
    return [f"{where} needs a probability between 0 and 1; got p={p!r}."]
