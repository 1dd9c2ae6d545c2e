"""Add noise to an existing network, and take it out again: `with inject(model, dropout=0.5, stochastic_depth=0.2): ...`.

Parameters, their names and the state dict stay as they are; evaluation is the plain network. Layers change their class (DropConnect) or
get a hook and a noise module without weights (dropout, stochastic depth), which `model.modules()` shows.
"""

import logging
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any
from warnings import warn

from torch import nn

from lightning_cnn.errors import NoEffectWarning, UnsupportedLayerError, raise_all
from lightning_cnn.nn.noise import DROPCONNECT, Dropout, NoiseSource, StochasticDepth, problems_of
from lightning_cnn.nn.residual import residual_branches

log = logging.getLogger(__name__)

Rates = float | Mapping[str, float]
DROPOUT, DEPTH = "injected_dropout", "injected_stochastic_depth"


class Injection:
    """What `inject` did: `sites` says where, `source` where the noise comes from, `remove()` undoes it."""

    def __init__(self) -> None:
        self.sites: dict[str, dict[str, float]] = {}
        self.source = NoiseSource()
        self._undo: list[Callable[[], Any]] = []

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Injection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def inject(model: nn.Module, *, dropout: Rates = 0.0, dropconnect: Rates = 0.0, stochastic_depth: Rates = 0.0) -> Injection:
    """Add noise for training to `model`, in place; `Injection.remove()` or the end of a `with` takes it out.

    Args:
        dropout: Probability for the input of every `nn.Linear`; or by name, `{"layer4.*.conv2": 0.1}`, for the input of any layer
            (whole channels of a map).
        dropconnect: Probability for the weights of every `nn.Linear`; or by name for any `nn.Linear` and `nn.Conv2d`.
        stochastic_depth: Probability for the last of the residual branches `torch.fx` finds, rising linearly to it from the first (the
            paper's rule); or by the name of the module that ends each branch.
    """
    layers = dict(model.named_modules())
    linear = [name for name, layer in layers.items() if type(layer) is nn.Linear]
    sites = {
        "dropout": _rates(dropout, linear, layers),
        "dropconnect": _rates(dropconnect, linear, layers),
        "stochastic_depth": _depths(stochastic_depth, model, layers),
    }
    rates = {"dropout": dropout, "dropconnect": dropconnect, "stochastic_depth": stochastic_depth}
    raise_all(_problems(rates, sites, layers), UnsupportedLayerError)
    injection = Injection()
    injection.sites = {kind: at for kind, at in sites.items() if at}
    if not injection.sites:
        warn(
            "inject() was asked for no noise and changed nothing. Give dropout=, dropconnect= or stochastic_depth=.", NoEffectWarning, 2
        )
    for kind, add in (("dropout", _add_dropout), ("dropconnect", _add_dropconnect), ("stochastic_depth", _add_depth)):
        for name, p in sites[kind].items():
            injection._undo.append(add(layers[name], name, p, injection.source))
    log.info("Injected %s.", ", ".join(f"{kind} at {len(at)} layers" for kind, at in injection.sites.items()) or "nothing")
    return injection


def _rates(wanted: Rates, default: list[str], layers: Mapping[str, nn.Module]) -> dict[str, float]:
    if not isinstance(wanted, Mapping):
        return dict.fromkeys(default, wanted) if wanted else {}
    return {name: p for pattern, p in wanted.items() for name in layers if name and fnmatchcase(name, pattern)}


def _depths(wanted: Rates, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    if isinstance(wanted, Mapping) or not wanted:
        return _rates(wanted, [], layers)
    branches = residual_branches(model)
    return {name: wanted * (place + 1) / len(branches) for place, name in enumerate(branches)}


def _problems(rates: Mapping[str, Rates], sites: Mapping[str, Mapping[str, float]], layers: Mapping[str, nn.Module]) -> list[str]:
    found = []
    for kind, wanted in rates.items():
        for pattern, p in wanted.items() if isinstance(wanted, Mapping) else [("", wanted)]:
            found += problems_of(p, f"{kind}{f' at {pattern!r}' if pattern else ''}")
            if pattern and not any(fnmatchcase(name, pattern) for name in layers):
                found.append(f"{kind}: no layer is called {pattern!r}. The layers are {', '.join(name for name in layers if name)}.")
        if wanted and not isinstance(wanted, Mapping) and not sites[kind]:
            found.append(f"{kind}={wanted}: {_NOWHERE[kind]}")
    taken = {"dropout": DROPOUT, "stochastic_depth": DEPTH}
    for kind, at in sites.items():
        found += [
            f"{kind}: layer {name!r} has it already. Remove the first injection."
            for name in at
            if hasattr(layers[name], taken.get(kind, " "))
        ]
    return found + [
        f"DropConnect is for nn.Linear and nn.Conv2d; layer {name!r} is {type(layers[name]).__name__}. Leave it out."
        for name in sites["dropconnect"]
        if type(layers[name]) not in DROPCONNECT
    ]


_NOWHERE = {
    "dropout": "the model has no nn.Linear. Name the layers: dropout={'features.*': 0.1}.",
    "dropconnect": "the model has no plain nn.Linear. Name the layers: dropconnect={'features.0': 0.1}.",
    "stochastic_depth": "torch.fx found no residual branch that ends in a module. Name the ends: stochastic_depth={'block*.bn2': 0.1}.",
}


def _add_dropout(layer: nn.Module, name: str, p: float, source: NoiseSource) -> Callable[[], Any]:
    noise = Dropout(p, source=source, name=f"{name} dropout").train(layer.training)
    layer.add_module(DROPOUT, noise)
    handle = layer.register_forward_pre_hook(_drop_input)
    return partial(_remove_hook, layer, DROPOUT, handle)


def _add_depth(layer: nn.Module, name: str, p: float, source: NoiseSource) -> Callable[[], Any]:
    noise = StochasticDepth(p, source=source, name=f"{name} depth").train(layer.training)
    layer.add_module(DEPTH, noise)
    handle = layer.register_forward_hook(_drop_output)
    return partial(_remove_hook, layer, DEPTH, handle)


def _add_dropconnect(layer: nn.Module, name: str, p: float, source: NoiseSource) -> Callable[[], Any]:
    plain = type(layer)
    layer.__class__ = DROPCONNECT[plain]
    layer.make_noisy(p, source, f"{name} dropconnect")  # pyright: ignore[reportCallIssue]

    def undo() -> None:
        layer.__class__ = plain
        for attribute in ("p", "stream", "source"):
            layer.__dict__.pop(attribute, None)

    return undo


def _drop_input(layer: Any, inputs: tuple) -> tuple:
    return (layer.injected_dropout(inputs[0]), *inputs[1:])


def _drop_output(layer: Any, inputs: tuple, output: Any) -> Any:
    return layer.injected_stochastic_depth(output)


def _remove_hook(layer: nn.Module, child: str, handle: Any) -> None:
    handle.remove()
    delattr(layer, child)
