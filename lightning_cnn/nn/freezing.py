"""Freeze modules so that they are constants, and undo it exactly.

A frozen part is a fixed function: no gradients, batch norm normalises by its stored statistics and does not move them, dropout is off.
Clearing `requires_grad` alone does only the first of these.
"""

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


class Freezer:
    """Freezes modules and remembers what they were; `hold` repeats what other code undoes between steps (`model.train()`).

    A module that is already in evaluation mode is somebody else's to wake: it is kept still, but not remembered.
    """

    def __init__(self) -> None:
        self._asked_gradient: dict[nn.Parameter, bool] = {}
        self._still: dict[nn.Module, None] = {}
        self._woken: dict[nn.Module, None] = {}

    def freeze(self, modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            self._asked_gradient.setdefault(parameter, parameter.requires_grad)
            parameter.requires_grad_(False)
            parameter.grad = None
        self.still(modules)

    def still(self, modules: Iterable[nn.Module]) -> None:
        """Only put `modules` into evaluation mode; their parameters may go on learning."""
        self._still.update((inner, None) for module in modules for inner in module.modules())
        self.hold()

    def thaw(self, modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.requires_grad_(self._asked_gradient.pop(parameter, parameter.requires_grad))
        for inner in [inner for module in modules for inner in module.modules()]:
            self._still.pop(inner, None)
            if inner in self._woken:
                del self._woken[inner]
                inner.training = True

    def hold(self) -> None:
        for module in self._still:
            if module.training:
                self._woken[module] = None
                module.training = False

    def undo(self) -> None:
        self.thaw(list(self._still), list(self._asked_gradient))


def norm_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that keeps running statistics (BatchNorm of any dimension or library, SyncBatchNorm, tracking InstanceNorm)."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield name, module
