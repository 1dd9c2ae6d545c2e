"""Noise inside the network, kept in testing: `MCDropout(K)`, `MCDropConnect(K)`, and where the batch is repeated for it.

Late expansion: only what lies behind the first random layer is computed K times. A skip connection around that layer would join
rows that are repeated with rows that are not; so before the first batch one picture is followed through the network, operation by
operation, and where such a join is met the batch is repeated at the input instead.

Source: Gal & Ghahramani 2016, "Dropout as a Bayesian approximation", arXiv:1506.02142.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_cnn.callbacks._views import Place, View
from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.functional import counter
from lightning_cnn.nn import noise

log = logging.getLogger(__name__)

Expand = Literal["late", "input", "loop"]
Forward = Callable[[Tensor], Any]
WHOLE = (nn.Dropout,)  # every element has a mask of its own; the others drop whole channels
CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class _NetworkView(View):
    kinds: tuple[type, ...]
    what: str

    def __init__(self, k: int = 10) -> None:
        self.count = k

    def layers(self, target: nn.Module) -> dict[str, nn.Module]:
        found: dict[str, Any] = {name: layer for name, layer in target.named_modules() if isinstance(layer, self.kinds)}
        return {name: layer for name, layer in found.items() if layer.p > 0}

    def problems(self, place: Place) -> list[str]:
        if self.layers(place.target):
            return []
        return [
            f"{type(self).__name__} found no {self.what} with p > 0 in {type(place.target).__name__} (F.dropout is not a "
            "module). Add some with lightning_cnn.nn.inject, or leave this view out."
        ]


class MCDropout(_NetworkView):
    """`k` members with dropout on, each with masks that depend on (seed, sample, member, element) alone."""

    kinds = (*WHOLE, *CHANNELS, noise.Dropout)
    what = "dropout layer"

    def problems(self, place: Place) -> list[str]:
        strange = [
            f"MCDropout cannot key {type(layer).__name__} '{name}' by sample. Replace it with nn.Dropout."
            for name, layer in place.target.named_modules()
            if isinstance(layer, _DropoutNd) and not isinstance(layer, self.kinds)
        ]
        return strange or super().problems(place)


class MCDropConnect(_NetworkView):
    """`k` members with DropConnect on (`lightning_cnn.nn.inject(model, dropconnect=...)`)."""

    kinds = (noise.DropConnectLinear, noise.DropConnectConv2d)
    what = "DropConnect layer"


class NetworkNoise:
    """Runs a network once with random layers for k members: `expand` late, at the input, or member by member in a loop."""

    def __init__(self, layers: Mapping[str, nn.Module], seed: int = 0, expand: Expand = "late") -> None:
        self.layers, self.seed, self.expand = dict(layers), seed, expand
        self.why_not_late: str | None = None
        self._checked = False
        self._trace: _Following | None = None
        self._rows: Tensor = torch.empty(0, 0)

    def members(self, forward: Forward, image: Tensor, rows: Tensor) -> Any:
        """Outputs (k, b, ...) of `forward` for `rows` (k, b): the number each member's and sample's masks are drawn from."""
        k, b = rows.shape
        if k == 1 or self.expand == "loop":
            return torch.stack([self._run(forward, image, row[None]) for row in rows])
        if self.expand == "late" and not self._checked:
            self.why_not_late = self._why_not_late(forward, image[:1], rows[:2, :1])
            self._checked = True
            log.info("Members part %s.", f"at the input: {self.why_not_late}" if self.why_not_late else "at the first random layer")
        late = self.expand == "late" and self.why_not_late is None
        output = self._run(forward, image if late else torch.cat([image] * k), rows)
        if len(output) == b:  # no random layer was met on the way
            output = torch.cat([output] * k)
        return output.view(k, b, *output.shape[1:])

    def _run(self, forward: Forward, image: Tensor, rows: Tensor) -> Any:
        self._rows = rows
        with ExitStack() as stack:
            for place, (name, layer) in enumerate(self.layers.items()):
                # Keyed by the layer's place, as names change with torch.compile and with the part of the model that is marginalised.
                key = counter.key(self.seed, "marginalize", place)
                stack.enter_context(_replaced(layer, self._noisy(name, layer, layer.forward, key)))
            return forward(image)

    def _noisy(self, name: str, layer: nn.Module, plain: Forward, key: int) -> Forward:
        def forward(x: Tensor, *args: Any) -> Tensor:
            k, b = self._rows.shape
            if k > 1 and len(x) == b:
                x = torch.cat([x] * k)
            if len(x) != k * b:
                raise UnsupportedLayerError(
                    f"Layer '{name}' sees {len(x)} rows for {b} pictures, so its noise cannot be keyed by sample. "
                    "Its input must have the batch as its first axis."
                )
            result = _with_noise(layer, plain, x, key, self._rows.flatten())
            if self._trace is not None:
                self._trace.mark(result)
            return result

        return forward

    def _why_not_late(self, forward: Forward, image: Tensor, rows: Tensor) -> str | None:
        self._trace = _Following(image)
        try:
            with self._trace:
                output = self._run(forward, image, rows)
        except _JoinError as joined:
            return f"a skip spans the first random layer and is joined by {joined}"
        except (RuntimeError, UnsupportedLayerError) as error:  # if it is the network's own fault it is raised again by the real pass
            return f"the network fixes its number of rows before the first random layer ({error})"
        finally:
            self._trace = None
        return None if len(output) == len(rows) else "the output does not have one row a member"


class _JoinError(Exception):
    """Rows that were repeated met rows that were not."""


class _Following(TorchDispatchMode):
    """Sorts every tensor that comes from the picture into repeated or not, and raises where both meet."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.repeated: dict[int, tuple[Tensor, bool]] = {id(image): (image, False)}  # holds the tensors, so that ids stay theirs

    def mark(self, result: Tensor) -> None:
        self.repeated[id(result)] = (result, True)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kinds = {self.repeated[id(leaf)][1] for leaf in inputs if id(leaf) in self.repeated}
        if len(kinds) == 2:
            raise _JoinError(str(func))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result) if kinds else ():
            if isinstance(leaf, Tensor):
                self.repeated[id(leaf)] = (leaf, True in kinds)
        return result


def _with_noise(layer: nn.Module, plain: Forward, x: Tensor, key: int, rows: Tensor) -> Tensor:
    if isinstance(layer, _DropoutNd):
        return _dropout(x, layer.p, key, rows, x.shape[1:] if isinstance(layer, WHOLE) else x.shape[1:2])
    source, training = layer.source, layer.training
    key_before, index_before = source.key, source.index  # type: ignore[union-attr]
    source.keyed(key, rows, x.device)  # type: ignore[operator,union-attr]
    layer.training = True
    try:
        return plain(x)
    finally:
        layer.training = training
        source.key, source.index = key_before, index_before  # type: ignore[union-attr]


def _dropout(x: Tensor, p: float, key: int, rows: Tensor, wide: torch.Size) -> Tensor:
    if p == 1:
        return torch.zeros_like(x)
    counters = (rows[:, None] << 32) + torch.arange(prod(wide), device=rows.device)
    keep = (counter.uniform(key, counters) >= p).view(len(rows), *wide, *[1] * (x.ndim - 1 - len(wide)))
    return x * (keep / (1 - p)).to(x.dtype)


@contextmanager
def _replaced(layer: nn.Module, forward: Forward) -> Iterator[None]:
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if before is not None:
            layer.__dict__["forward"] = before
