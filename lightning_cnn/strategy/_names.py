"""The names that `Trainer(strategy=...)` knows after this package is imported."""

from importlib import import_module
from typing import Any

NAMES = {
    "async_sgd": "AsyncSGD",
    "delayed_averaging": "DelayedAveraging",
    "elastic": "Elastic",
    "local_sgd": "LocalSGD",
    "one_weird_trick": "OneWeirdTrick",
    "pipeline": "Pipeline",
    "spatial": "Spatial",
    "sync_ddp": "SyncDDP",
}


def register() -> None:
    """Put every name into Lightning's registry; the module of a strategy is loaded when its name is used."""
    from lightning.pytorch.strategies import StrategyRegistry

    for name, attribute in NAMES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, _maker(name, attribute), description=f"lightning_cnn.strategy.{attribute}")


def _maker(name: str, attribute: str) -> Any:
    def make(**kwargs: Any) -> Any:
        return getattr(import_module(f"lightning_cnn.strategy.{name}"), attribute)(**kwargs)

    return make
