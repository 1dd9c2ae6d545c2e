"""Loops that need a compiler: numba on the CPU, Triton on the GPU. Arrays in, arrays out."""

from lightning_cnn.kernels import threads as threads  # before any parallel kernel: numba takes the layer that it sets
