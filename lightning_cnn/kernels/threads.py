"""One pool of threads for torch and numba: two pools on the same cores spin against each other, measured at half the speed.

Both use OpenMP; as torch is loaded first, numba's layer of that name binds to torch's own library. Numba would prefer its other layers,
so the preference is set before a parallel kernel runs for the first time. `NUMBA_THREADING_LAYER` still overrides it.
"""

import numba
import torch
from numba.core import config

config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # pyright: ignore[reportAttributeAccessIssue]


def use(threads: int) -> int:
    """Let the kernels called next from this thread run on `threads` threads; returns how many they get."""
    of_torch = torch.get_num_threads()
    available = min(threads, config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]
    numba.set_num_threads(available)
    if torch.get_num_threads() != of_torch:  # Numba's first start resizes the pool that they share
        torch.set_num_threads(of_torch)
    return available
