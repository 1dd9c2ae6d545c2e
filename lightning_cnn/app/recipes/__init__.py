"""Recipes that need more than one training: each is built by Hydra and called with the run's folder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
