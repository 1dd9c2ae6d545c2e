"""Point the metrics of a model at the processes that have counted something else, for as long as a strategy lasts."""

from typing import Any

from torch import nn
from torchmetrics import Metric


class Redirected:
    """Sets attributes of every metric in the module until `undo`, after which the model may serve another strategy."""

    def __init__(self, module: nn.Module, **attributes: Any) -> None:
        metrics = [m for m in module.modules() if isinstance(m, Metric)]
        self._before = [(metric, name, getattr(metric, name)) for metric in metrics for name in attributes]
        for metric, name, _ in self._before:
            setattr(metric, name, attributes[name])

    def undo(self) -> None:
        while self._before:
            setattr(*self._before.pop())
