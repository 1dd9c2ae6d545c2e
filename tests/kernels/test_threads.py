"""Numba's threads are torch's."""

import subprocess
import sys
import textwrap


def test_parallel_kernels_run_in_the_pool_of_torch():
    """In a process of its own: one OpenMP library is loaded, and the kernels leave torch's number of threads as it was."""
    source = """
        from pathlib import Path
        import numpy as np
        import torch
        torch.set_num_threads(2)
        from lightning_cnn.kernels.bits import LAST, pack

        x = -torch.ones(1, 4, 4, 64)
        assert (pack(x.data_ptr(), LAST, (1, 4, 4), 64, threads=2) == 2**64 - 1).all()
        assert torch.get_num_threads() == 2
        import numba
        if numba.threading_layer() == "omp":
            libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}
            assert len(libraries) <= 1, libraries
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(source)], check=True, timeout=120)
