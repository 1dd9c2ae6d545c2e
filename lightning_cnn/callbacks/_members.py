"""All members of a product of views, and their log probabilities: what `Marginalize` runs for a batch, usable in any loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.func import functional_call, vmap

from lightning_cnn.callbacks._forward import unwrap, wrap
from lightning_cnn.callbacks._network_views import Expand, NetworkNoise
from lightning_cnn.callbacks._views import Place, View
from lightning_cnn.callbacks._weight_views import Ensemble
from lightning_cnn.errors import ConfigurationError, raise_all
from lightning_cnn.functional import counter
from lightning_cnn.functional.marginalize import content_index, log_mean_prob, row_index


class Members:
    """The product of `views` at one place."""

    def __init__(self, place: Place, views: Sequence[View], seed: int = 0, expand: Expand = "late") -> None:
        self.place, self.views, self.seed = place, list(views), seed
        layers = {name: layer for view in views for name, layer in view.layers(place.target).items()}
        self.draws = prod(view.count for view in views if view.layers(place.target))
        self.noise = NetworkNoise(layers, seed, expand) if layers else None
        self.batched = next((view for view in views if isinstance(view, Ensemble) and view.batched), None)
        self.sequential = [view for view in views if type(view).weights is not View.weights and view is not self.batched]
        self._inside = False
        compiled = any(isinstance(module, OptimizedModule) for module in place.target.modules())
        # A compiled graph does not look whether a layer inside it has become random.
        self._stance: Callable[[], Any] = _eager if compiled and (layers or self.batched) else nullcontext

    def __len__(self) -> int:
        return prod(view.count for view in self.views)

    def problems(self) -> list[str]:
        """Everything that keeps these views from working together here."""
        found = [problem for view in self.views for problem in view.problems(self.place)]
        found += [f"{view!r} has {view.count} members; at least 1 is needed." for view in self.views if view.count < 1]
        if self.batched is not None and self.noise is not None:
            found.append("Ensemble(batched=True) cannot have noise inside the network. Leave batched out.")
        return found

    def attach(self) -> None:
        for view in self.views:
            view.attach(self.place)

    def log_probs(self, forward: Callable[..., Any], image: Tensor, index: Tensor | None = None) -> Tensor:
        """Log probabilities (k, b, c) of all members, in float32 or better; `index` says which samples these are."""
        self._inside = True
        try:
            with self._stance(), torch.no_grad():
                outputs = list(self._outputs(lambda picture: logits_of(forward(picture), self.place.target), image, index))
        finally:
            self._inside = False
        return torch.cat([_log_prob(output) for output in outputs])

    def _outputs(self, forward: Callable[..., Any], image: Tensor, index: Tensor | None) -> Iterator[Tensor]:
        sample = self._samples(image, index)
        for w, weights in enumerate(product(*(range(view.count) for view in self.sequential))):
            with ExitStack() as stack:
                for view, member in zip(self.sequential, weights, strict=True):
                    stack.enter_context(view.weights(self.place.target, member))
                for p, picture in enumerate(_pictures(self.views, image, sample)):
                    yield self._network(forward, picture, sample, (w, p))

    def _network(self, forward: Callable[..., Any], picture: Tensor, sample: Tensor, place: tuple[int, int]) -> Tensor:
        if self.batched is not None:
            target = self.place.target
            return vmap(lambda state: functional_call(target, state, (picture,)))(self.batched.stacked())
        if self.noise is None:
            return forward(picture)[None]
        rows = [row_index(counter.key(self.seed, "member", *place, k), sample) for k in range(self.draws)]
        return self.noise.members(forward, picture, torch.stack(rows))

    def _samples(self, image: Tensor, index: Tensor | None) -> Tensor:
        if index is not None and len(index) == len(image):
            return index.to(image.device) & 0x7FFFFFFF
        random = self.noise is not None or any(view.random for view in self.views)
        return content_index(image) if random else torch.empty(0, dtype=torch.int64)

    def around(self, forward: Callable[..., Any], result: Callable[[Tensor], Tensor], index: Callable[[], Tensor | None]) -> Any:
        """`forward` with every picture replaced by the `result` of its members."""

        def marginal(image: Any = None, *args: Any, **kwargs: Any) -> Any:
            if self._inside or self.place.target.training:
                return forward(image, *args, **kwargs)
            if not isinstance(image, Tensor):
                raise ConfigurationError(
                    f"{type(self.place.target).__name__}.forward must get the pictures as its first positional argument; "
                    f"it got a {type(image).__name__}. Give module= another part of the model."
                )
            return result(self.log_probs(lambda picture: forward(picture, *args, **kwargs), image, index()))

        return marginal


@contextmanager
def marginalized(module: nn.Module, views: Sequence[View], seed: int = 0, expand: Expand = "late") -> Iterator[Members]:
    """Inside, `module(pictures)` in evaluation mode returns the log of the mean probability; for loops without a Trainer."""
    members = Members(Place(module), views, seed, expand)
    raise_all(members.problems())
    members.attach()
    wrap(module, members, lambda forward, *a, **k: members.around(forward, log_mean_prob, lambda: None)(*a, **k))
    try:
        yield members
    finally:
        unwrap(module, members)


def _pictures(views: Sequence[View], image: Tensor, sample: Tensor) -> Iterator[Tensor]:
    if not views:
        yield image
        return
    for picture in views[0].pictures(image, sample):
        yield from _pictures(views[1:], picture, sample)


def logits_of(output: Any, target: nn.Module) -> Tensor:
    """`output`, when it is what a forward must give here: logits (pictures, classes)."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ConfigurationError(
        f"Needed are logits (pictures, classes); the forward of {type(target).__name__} gives {found}. "
        "Give module= the part of the model that gives logits."
    )


def _log_prob(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _eager() -> Any:
    return torch.compiler.set_stance("force_eager")
