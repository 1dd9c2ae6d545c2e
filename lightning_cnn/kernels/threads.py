"""One pool of threads for torch and numba: two pools on the same cores spin against each other.

Both use OpenMP; as torch is loaded first, numba's layer of that name would bind to torch's own library, if it asked for it by name.
Numba's wheel for Linux asks for the file `libgomp.so.1.0.0`, which is the system's copy and a second pool, so the layer is loaded with
the name put right. Numba would prefer its other layers, so the preference is set before a parallel kernel runs for the first time.
`NUMBA_THREADING_LAYER` still overrides it.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import numba
import torch
from numba.core import config
from numba.np import ufunc
from numba.np.ufunc import parallel

config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # pyright: ignore[reportAttributeAccessIssue]

LAYER = "numba.np.ufunc.omppool"
FILE, NAME = b"libgomp.so.1.0.0\0", b"libgomp.so.1\0".ljust(17, b"\0")


def _bind_to_torch() -> None:
    """Load numba's OpenMP layer from memory, asking for the library by the name under which torch has loaded its own."""
    found = importlib.util.find_spec(LAYER)
    if LAYER in sys.modules or found is None or found.origin is None or not sys.platform.startswith("linux"):
        return
    code = Path(found.origin).read_bytes()
    if FILE not in code or not (Path(torch.__file__).parent / "lib/libgomp.so.1").exists():
        return
    try:
        memory = os.memfd_create(LAYER)
    except OSError:  # a sandbox may forbid it: numba's own copy then works too, if more slowly
        return
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(code.replace(FILE, NAME))
        loader = ExtensionFileLoader(LAYER, f"/proc/self/fd/{memory}")
        spec = importlib.util.spec_from_file_location(LAYER, loader.path, loader=loader)
        assert spec is not None
        sys.modules[LAYER] = ufunc.omppool = importlib.util.module_from_spec(spec)  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return
    finally:
        os.close(memory)


def _launch_in_torchs_number(launch: Callable[[], None] = parallel._launch_threads) -> None:
    """Numba starts its layer with all cores, when it first loads or runs a parallel kernel; the pool is torch's, whose number stays."""
    of_torch = torch.get_num_threads()
    launch()
    if torch.get_num_threads() != of_torch:
        torch.set_num_threads(of_torch)


_bind_to_torch()
parallel._launch_threads = _launch_in_torchs_number


def use(threads: int) -> int:
    """Let the kernels called next from this thread run on `threads` threads; returns how many they get."""
    available = min(threads, config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]
    numba.set_num_threads(available)
    return available
