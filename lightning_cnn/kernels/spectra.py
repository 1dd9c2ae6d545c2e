"""Products of spectra summed over channels: one complex matrix product a frequency, with the frequencies in the lanes of a vector.

A library's matrix product wants the channels next to each other; a Fourier transform leaves the frequencies next to each other, and to
turn one into the other costs more than the product. Here neither operand is turned: a block of frequencies is copied into the cache,
interleaved real and imaginary parts as they are, and every vector step serves four of them.

Source: Zlateski et al. 2018, "FFT convolutions are faster than Winograd on modern CPUs, here is why", arXiv:1809.07851 (the count of
memory and arithmetic); the vectors over frequencies are ours.
"""

import numpy as np
from numba import float32, int64, njit, prange, void

from lightning_cnn.kernels.microkernel import LANES, copy_8, multiply_spectra

PANEL = 4  # rows of b that share a load of a
SPECTRA = float32[:, :, :, :, :]


@njit(cache=True, nogil=True, error_model="numpy")
def _offset(array, g, row, column, block):
    return (g * array.strides[0] + row * array.strides[1] + column * array.strides[2] + block * array.strides[3]) // 4


@njit(void(SPECTRA, SPECTRA, SPECTRA, float32, float32, int64), cache=True, nogil=True, parallel=True, error_model="numpy")
def contract(a, b, out, sign_a, sign_b, workers):
    """out[g, i, j] = sum over r of a[g, i, r] * b[g, j, r] at every frequency; a factor whose sign is -1 is conjugated.

    All float32 (group, row, row, block, entries): complex numbers as pairs, with any strides but neighbouring entries, whose number is
    a multiple of eight.
    """
    groups, rows, terms, blocks, entries = a.shape
    columns, vectors = b.shape[1], entries // LANES
    # A vector more than needed between planes of frequencies: at distances of 2048 bytes they would push each other out of the cache
    left_plane, right_plane = (rows * terms + 1) * LANES, (PANEL * terms + 1) * LANES
    for worker in prange(workers):
        left, right = np.empty(vectors * left_plane, np.float32), np.empty(vectors * right_plane, np.float32)
        spare = np.empty(PANEL * LANES, np.float32)
        for piece in range(worker * groups * blocks // workers, (worker + 1) * groups * blocks // workers):
            g, block = piece // blocks, piece % blocks
            for i in range(rows):
                for r in range(terms):
                    start = _offset(a, g, i, r, block)
                    for v in range(vectors):
                        copy_8(a, start + v * LANES, left, v * left_plane + (i * terms + r) * LANES)
            for first in range(0, columns, PANEL):
                here = min(PANEL, columns - first)
                for j in range(PANEL):
                    for r in range(terms):
                        # A panel that hangs over the edge reads the last row again, and keeps nothing of it
                        start = _offset(b, g, min(first + j, columns - 1), r, block)
                        for v in range(vectors):
                            copy_8(b, start + v * LANES, right, v * right_plane + (r * PANEL + j) * LANES)
                for v in range(vectors):
                    for i in range(rows):
                        at, column = _offset(out, g, i, first, block) + v * LANES, out.strides[2] // 4
                        a_at, b_at = v * left_plane + i * terms * LANES, v * right_plane
                        if here == PANEL:
                            multiply_spectra(left, a_at, right, b_at, out, at, column, terms, sign_a, sign_b)
                        else:
                            multiply_spectra(left, a_at, right, b_at, spare, 0, LANES, terms, sign_a, sign_b)
                            for j in range(here):
                                copy_8(spare, j * LANES, out, at + j * column)
