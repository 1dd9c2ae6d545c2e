"""Wrappers around one module's forward that may be added and removed in any order, and leave nothing behind."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Around = Callable[..., Any]  # (forward, *args, **kwargs) -> what forward gives


class Wrapped:
    """Stands in for `module.forward`; the wrapper added first is the innermost."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before: Callable[..., Any] | None = module.__dict__.get("forward")
        self.original: Callable[..., Any] = module.forward
        self.around: list[tuple[object, Around]] = []

    @torch.compiler.disable  # a compiled step breaks its graph here instead of tracing into averages and masks
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.original
        for _, around in self.around:
            forward = _bind(around, forward)
        return forward(*args, **kwargs)


def wrap(module: nn.Module, owner: object, around: Around, *, innermost: bool = False) -> None:
    """Let calls of `module` go through `around(forward, *args)` until `unwrap`."""
    installed = module.__dict__.get("forward")
    if not isinstance(installed, Wrapped):
        installed = Wrapped(module)
        module.__dict__["forward"] = installed
    if not any(other is owner for other, _ in installed.around):
        installed.around.insert(0 if innermost else len(installed.around), (owner, around))


def unwrap(module: nn.Module, owner: object) -> None:
    """Take `owner`'s wrapper out; the last one to leave restores the module as it was."""
    installed = module.__dict__.get("forward")
    if not isinstance(installed, Wrapped):
        return
    installed.around = [(other, around) for other, around in installed.around if other is not owner]
    if not installed.around:
        del module.__dict__["forward"]
        if installed.before is not None:
            module.__dict__["forward"] = installed.before


def _bind(around: Around, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: around(forward, *args, **kwargs)
