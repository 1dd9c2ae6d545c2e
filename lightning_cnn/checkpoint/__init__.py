"""Checkpoint files that are complete, verified and plain: `CheckpointIO` plugins and the functions under them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
