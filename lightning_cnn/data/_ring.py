"""Batch buffers that are used again as soon as, and not before, nobody holds a tensor over them.

A fresh 77 MB batch costs more in page faults than in arithmetic; a ring that is simply reused overwrites batches that somebody kept.
"""

import weakref

import numpy as np
import torch
from torch import Tensor


class Ring:
    """Buffers of one shape and dtype. With `pinned` torch's own page-locked cache is used, which also waits for copies in flight."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> None:
        self._shape, self._dtype, self._pinned = shape, dtype, pinned
        self._free: list[np.ndarray] = []

    def take(self, length: int) -> Tensor:
        """A tensor of `length` entries with arbitrary contents."""
        if self._pinned:
            return torch.empty((length, *self._shape[1:]), dtype=self._dtype, pin_memory=True)
        buffer = self._free.pop() if self._free else torch.empty(self._shape, dtype=self._dtype).numpy()
        # The tensor's storage keeps this view alive, whatever is sliced or saved from it; when the view goes, the buffer is free.
        view = buffer[:length]
        weakref.finalize(view, self._free.append, buffer).atexit = False
        return torch.from_numpy(view)
