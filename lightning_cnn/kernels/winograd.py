"""Winograd convolution in one pass over the picture: transform, multiply and transform back a block of tiles while it is in cache.

A thread takes a block of output tiles, writes their transformed inputs V (one matrix of tiles x channels a frequency), multiplies
them with the transformed filters U in registers, and transforms the products M into pixels; V and M of a block stay in its cache. The
filters' gradient is the same backwards: V times the transformed gradients of the tiles, summed over tiles, is the gradient of U.

Source: Lavin & Gray 2015, arXiv:1509.09308, section 4; Jia et al. 2018, "Optimizing N-dimensional, Winograd-based convolution for
manycore CPUs" (blocking for the cache).
"""

import numpy as np
from numba import njit, prange

from lightning_cnn.kernels.microkernel import COLUMNS, LANES, ROWS, multiply_4x16, multiply_6x16, sandwich

# B^T, A^T and G^T of `functional.conv.winograd.cook_toom`, the test compares them.
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
TAPS_2 = ((1, 1 / 2, 1 / 2, 0), (0, 1 / 2, -1 / 2, 0), (0, 1 / 2, 1 / 2, 1))
TAPS_4 = (
    (1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24, 0),
    (0, -1 / 6, 1 / 6, 1 / 12, -1 / 12, 0),
    (0, -1 / 6, -1 / 6, 1 / 6, 1 / 6, 1),
)
_input_2, _output_2, _taps_2 = sandwich(INPUT_2), sandwich(OUTPUT_2), sandwich(TAPS_2)
_input_4, _output_4, _taps_4 = sandwich(INPUT_4), sandwich(OUTPUT_4), sandwich(TAPS_4)
_gradient_2, _gradient_4 = (sandwich(tuple(zip(*matrix, strict=True))) for matrix in (OUTPUT_2, OUTPUT_4))
FILTERS = 32  # whose products with sixteen channels stay in the cache together


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
    # A tile's values are written one a frequency: a cache line more between two of them, or all would fall on a few sets of the cache.
    apart_v, apart_m = block * C + COLUMNS, block * width * COLUMNS + COLUMNS
    for worker in prange(workers):
        V, M = np.empty(P * apart_v, np.float32), np.empty(P * apart_m, np.float32)
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
                    _input_4(source, at, row, C, V, t * C, alpha * apart_v, apart_v, C)
                else:
                    _input_2(source, at, row, C, V, t * C, alpha * apart_v, apart_v, C)
            for p in range(P):
                for panel in range(K // COLUMNS):
                    for t in range(0, here, ROWS):
                        multiply_6x16(
                            V, p * apart_v + t * C, C, flat_u, (p * panels + low + panel) * C * COLUMNS,
                            M, p * apart_m + t * K + panel * COLUMNS, K, C,
                        )  # fmt: skip
            for t in range(here):
                n, i, j = _place(first + t, down, across, m)
                # Frequency (1, 1) reaches every pixel of the tile with weight one: the bias enters there.
                for k in range(K):
                    M[(alpha + 1) * apart_m + t * K + k] += bias[low * COLUMNS + k]
                whole = i + m <= Ho and j + m <= Wo and low * COLUMNS + K <= Kout
                target, at, row, column = pixels, 0, m * K, K
                if whole:
                    target, at, row, column = flat_y, ((n * Ho + i) * Wo + j) * Kout + low * COLUMNS, Wo * Kout, Kout
                if m == 4:
                    _output_4(M, t * K, alpha * apart_m, apart_m, target, at, row, column, K)
                else:
                    _output_2(M, t * K, alpha * apart_m, apart_m, target, at, row, column, K)
                if not whole:
                    _scatter(pixels, y, n, i, j, low * COLUMNS, K, m)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def winograd_weight(x, g, gw, m, top, left, workers, block):
    """Write the filters' gradient `gw` (k, c, 3, 3), in any layout, from `x` (n, h, w, c) and the output's gradient `g` (n, ho, wo, k).

    All float32; `x` and `g` are contiguous, with zeros behind their channels up to a multiple of 16 and of 8. `block` tiles are
    transformed before they are multiplied.
    """
    N, H, W, C = x.shape
    _, Ho, Wo, K = g.shape
    alpha, down, across = m + 2, (Ho + m - 1) // m, (Wo + m - 1) // m
    P, total, groups = alpha * alpha, N * down * across, (K + FILTERS - 1) // FILTERS
    flat_x, flat_g = x.reshape(-1), g.reshape(-1)
    # A panel of 16 channels, or 8 filters, has all its tiles of one frequency in a row.
    apart, apart_g = C * block + COLUMNS, K * block + COLUMNS
    V, D = np.empty(P * apart, np.float32), np.empty(P * apart_g, np.float32)
    for first in range(0, total, block):
        here = min(block, total - first)
        for worker in prange(workers):
            patch = np.empty(P * max(C, K), np.float32)
            for t in range(worker * here // workers, (worker + 1) * here // workers):
                n, i, j = _place(first + t, down, across, m)
                source, at, row = flat_g, ((n * Ho + i) * Wo + j) * K, Wo * K
                if i + m > Ho or j + m > Wo:
                    _gather(g, n, i, j, m, patch)
                    source, at, row = patch, 0, m * K
                for k in range(0, K, LANES):
                    to = k * block + t * LANES
                    if m == 4:
                        _gradient_4(source, at + k, row, K, D, to, alpha * apart_g, apart_g, LANES)
                    else:
                        _gradient_2(source, at + k, row, K, D, to, alpha * apart_g, apart_g, LANES)
                i, j = i - top, j - left
                source, at, row = flat_x, ((n * H + i) * W + j) * C, W * C
                if i < 0 or j < 0 or i + alpha > H or j + alpha > W:
                    _gather(x, n, i, j, alpha, patch)
                    source, at, row = patch, 0, alpha * C
                for c in range(0, C, LANES):
                    to = (c - c % COLUMNS) * block + t * COLUMNS + c % COLUMNS
                    if m == 4:
                        _input_4(source, at + c, row, C, V, to, alpha * apart, apart, LANES)
                    else:
                        _input_2(source, at + c, row, C, V, to, alpha * apart, apart, LANES)
        for worker in prange(workers):
            M, taps = np.empty(P * FILTERS * COLUMNS, np.float32), np.empty(9 * LANES, np.float32)
            for group in range(worker * groups // workers, (worker + 1) * groups // workers):
                low = group * FILTERS
                many = min(FILTERS, K - low)
                for c in range(0, C, COLUMNS):
                    for p in range(P):
                        for k in range(0, many, 4):
                            of_filters = p * apart_g + (low + k - k % LANES) * block + k % LANES
                            multiply_4x16(D, of_filters, V, p * apart + c * block, M, (p * FILTERS + k) * COLUMNS, here)
                    for k in range(min(many, gw.shape[0] - low)):
                        for half in range(0, COLUMNS, LANES):
                            products = k * COLUMNS + half
                            if m == 4:
                                _taps_4(M, products, alpha * FILTERS * COLUMNS, FILTERS * COLUMNS, taps, 0, 3 * LANES, LANES, LANES)
                            else:
                                _taps_2(M, products, alpha * FILTERS * COLUMNS, FILTERS * COLUMNS, taps, 0, 3 * LANES, LANES, LANES)
                            for lane in range(min(LANES, gw.shape[1] - c - half)):
                                for tap in range(9):
                                    before = gw[low + k, c + half + lane, tap // 3, tap % 3] if first else np.float32(0)
                                    gw[low + k, c + half + lane, tap // 3, tap % 3] = before + taps[tap * LANES + lane]
