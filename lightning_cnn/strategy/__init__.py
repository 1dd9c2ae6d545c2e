"""Strategies: strategy=.... Importing this package registers their names, so that Trainer(strategy="async_sgd") works."""

import lazy_loader

from lightning_cnn.strategy._names import register

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
register()
