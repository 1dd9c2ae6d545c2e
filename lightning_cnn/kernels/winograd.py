"""Winograd convolution in one pass over the picture: transform, multiply and transform back a block of tiles while it is in cache.

A thread takes a block of output tiles, writes their transformed inputs V (one matrix of tiles x channels a frequency), multiplies
them with the transformed filters U in registers, and transforms the products M into pixels; V and M of a block stay in its cache.

Source: Lavin & Gray 2015, arXiv:1509.09308, section 4; Jia et al. 2018, "Optimizing N-dimensional, Winograd-based convolution for
manycore CPUs" (blocking for the cache).
"""

import numpy as np
from numba import njit, prange

from lightning_cnn.kernels.microkernel import COLUMNS, ROWS, multiply_6x16, sandwich

# B^T and A^T of `functional.conv.winograd.cook_toom`, the test compares them.
INPUT_2 = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1))
OUTPUT_2 = ((1, 1, 1, 0), (0, 1, -1, 1))
INPUT_4 = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
OUTPUT_4 = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_input_2, _output_2, _input_4, _output_4 = (sandwich(matrix) for matrix in (INPUT_2, OUTPUT_2, INPUT_4, OUTPUT_4))


@njit(cache=True, nogil=True, error_model="numpy")
def _place(tile, down, across, m):
    return tile // (down * across), tile // across % down * m, tile % across * m


@njit(cache=True, nogil=True, error_model="numpy")
def _gather(x, n, top, left, alpha, patch):
    # The tile's pixels with zeros where it hangs over the border
    _, H, W, C = x.shape
    for a in range(alpha):
        for b in range(alpha):
            i, j, inside = top + a, left + b, 0 <= top + a < H and 0 <= left + b < W
            for c in range(C):
                patch[(a * alpha + b) * C + c] = x[n, i, j, c] if inside else 0


@njit(cache=True, nogil=True, error_model="numpy")
def _scatter(pixels, y, n, i, j, low, K, m):
    _, Ho, Wo, Kout = y.shape
    for a in range(min(m, Ho - i)):
        for b in range(min(m, Wo - j)):
            for k in range(min(K, Kout - low)):
                y[n, i + a, j + b, low + k] = pixels[(a * m + b) * K + k]


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def winograd(x, U, bias, y, m, top, left, workers, block, splits):
    """Write `y` (n, ho, wo, k) from `x` (n, h, w, c) and packed filters `U` ((m+2)^2, panels, c, 16).

    All float32 and contiguous; c is a multiple of 8, `bias` has panels * 16 entries, `top` and `left` are the zero padding. `block`
    tiles (a multiple of 6) are kept in cache together; `splits` parts of the filters are separate pieces of work, for pictures with
    too few tiles to share among `workers` threads.
    """
    N, H, W, C = x.shape
    _, Ho, Wo, Kout = y.shape
    P, panels = U.shape[0], U.shape[1]
    alpha, down, across = m + 2, (Ho + m - 1) // m, (Wo + m - 1) // m
    total, width = N * down * across, (panels + splits - 1) // splits
    pieces = ((total + block - 1) // block) * splits
    flat_x, flat_u, flat_y = x.reshape(-1), U.reshape(-1), y.reshape(-1)
    for worker in prange(workers):
        V, M = np.empty(P * block * C, np.float32), np.empty(P * block * width * COLUMNS, np.float32)
        patch, pixels = np.empty(P * C, np.float32), np.empty(m * m * width * COLUMNS, np.float32)
        for piece in range(worker * pieces // workers, (worker + 1) * pieces // workers):
            first, low = piece // splits * block, piece % splits * width
            here, K = min(block, total - first), (min(panels, low + width) - low) * COLUMNS
            for t in range(here):
                n, i, j = _place(first + t, down, across, m)
                i, j = i - top, j - left
                source, at, row = flat_x, ((n * H + i) * W + j) * C, W * C
                if i < 0 or j < 0 or i + alpha > H or j + alpha > W:
                    _gather(x, n, i, j, alpha, patch)
                    source, at, row = patch, 0, alpha * C
                if m == 4:
                    _input_4(source, at, row, C, V, t * C, alpha * block * C, block * C, C)
                else:
                    _input_2(source, at, row, C, V, t * C, alpha * block * C, block * C, C)
            for p in range(P):
                for panel in range(K // COLUMNS):
                    for t in range(0, here, ROWS):
                        multiply_6x16(
                            V, (p * block + t) * C, C, flat_u, (p * panels + low + panel) * C * COLUMNS,
                            M, (p * block + t) * K + panel * COLUMNS, K, C,
                        )  # fmt: skip
            for t in range(here):
                n, i, j = _place(first + t, down, across, m)
                # Frequency (1, 1) reaches every pixel of the tile with weight one: the bias enters there.
                for k in range(K):
                    M[((alpha + 1) * block + t) * K + k] += bias[low * COLUMNS + k]
                whole = i + m <= Ho and j + m <= Wo and low * COLUMNS + K <= Kout
                target, at, row, column = pixels, 0, m * K, K
                if whole:
                    target, at, row, column = flat_y, ((n * Ho + i) * Wo + j) * Kout + low * COLUMNS, Wo * Kout, Kout
                if m == 4:
                    _output_4(M, t * K, alpha * block * K, block * K, target, at, row, column, K)
                else:
                    _output_2(M, t * K, alpha * block * K, block * K, target, at, row, column, K)
                if not whole:
                    _scatter(pixels, y, n, i, j, low * COLUMNS, K, m)
