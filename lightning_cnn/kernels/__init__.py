"""Loops that need a compiler: numba on the CPU, Triton on the GPU. Arrays in, arrays out."""
