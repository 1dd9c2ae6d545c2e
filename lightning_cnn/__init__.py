"""Plugins for PyTorch Lightning: the lecture "CNNs in Practice" as working parts.

Training adds random noise, testing marginalises over it, and neither may wait for data, for arithmetic it could avoid, or for a
neighbour. Importing this package loads nothing heavy; each name is loaded when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
