"""Numba's threads are torch's."""

import os
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


def test_loading_and_running_parallel_kernels_leaves_torchs_number_of_threads():
    """The number is one here and numba has two: its first start, which comes with the first parallel kernel it loads, would set two."""
    source = """
        import torch
        torch.set_num_threads(1)
        from torch import nn
        from lightning_cnn.conv import swap
        for algorithm, kernel in (("winograd4", 3), ("fft", 9), ("depthwise", 7)):
            layer = nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=8 if algorithm == "depthwise" else 1)
            swap(layer, algorithm)(torch.rand(1, 8, 32, 32)).sum().backward()
            assert torch.get_num_threads() == 1, algorithm
    """
    env = {**os.environ, "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(source)], check=True, timeout=120, env=env)
