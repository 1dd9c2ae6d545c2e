"""The product of spectra that `fft` and `fft_tiled` share: the compiled one on the CPU, the torch reference for everything else."""

import numpy as np
import torch
from torch import Tensor

from lightning_cnn.conv._call import Call, nbytes
from lightning_cnn.functional.conv import fft
from lightning_cnn.functional.conv.geometry import Pair

IN_CACHE = 2**14  # floats of both factors that a thread holds at a time
SHORTEST, LANES, PANEL = 128, 8, 4


def contract(a: Tensor, b: Tensor, conjugate: str = "") -> Tensor:
    """`functional.conv.fft.contract`."""
    entries = 2 * a.shape[3] * a.shape[4]
    if a.device.type != "cpu" or a.dtype != torch.complex64 or entries % LANES:
        return fft.contract(a, b, conjugate)
    from lightning_cnn.kernels import threads
    from lightning_cnn.kernels.spectra import contract as kernel

    # Rows of the result are outermost: the callers join the groups of a row
    out = a.new_empty(a.shape[1], a.shape[0], b.shape[1], *a.shape[3:]).transpose(0, 1)
    block = _block(entries, (a.shape[1] + PANEL) * a.shape[2])
    sign_a, sign_b = (np.float32(-1 if conjugate == factor else 1) for factor in "ab")
    left, right, product = (_blocks(each, block) for each in (a, b, out))
    kernel(left, right, product, sign_a, sign_b, threads.use(torch.get_num_threads()))
    return out


def workspace(call: Call, pictures: int, frequencies: Pair) -> int:
    """Bytes at the peak of a call: spectra of `pictures` planes and of the filters, which may be kept, and what they are made of.

    The filters' planes are filled with zeros some at a time; of their gradient, all taps come back at once.
    """
    (high, wide), filters = frequencies, call.weight[0] * call.weight[1]
    at_once = min(call.weight[0], fft.filters_at_once(call.weight[1], frequencies)) * call.weight[1]
    filled, spectra = pictures + (filters if call.role == "weight" else at_once), pictures + filters
    if call.role != "weight" and at_once < filters:
        spectra += at_once  # They are copied to their place
    double = torch.float64 if call.dtype == torch.float64 else torch.float32
    return nbytes((spectra, high, wide // 2 + 1, 2), (filled, high, wide), dtype=double)


def _blocks(spectra: Tensor, block: int) -> np.ndarray:
    return torch.view_as_real(spectra).flatten(3).unflatten(3, (-1, block)).numpy()


def _block(entries: int, rows: int) -> int:
    """The longest run of frequencies of which `rows` stay in cache; short runs make the memory jump."""
    limit = max(SHORTEST, IN_CACHE // rows)
    fitting = [n for n in range(LANES, min(limit, entries) + 1, LANES) if entries % n == 0]
    return fitting[-1]
