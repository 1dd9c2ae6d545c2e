"""Transformed filters, kept as long as the filters live and do not change.

A version counter tells in-place updates; a write through `.data` moves no counter, so a sample of the values is compared as well.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

SAMPLE = 256
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def transformed(weight: Tensor, kind: Hashable, compute: Callable[[], Tensor], keep: bool) -> Tensor:
    """`compute()`, remembered for `weight` and `kind` when `keep`; forgotten when the weight is updated, moved or cast.

    A write through `.data` that misses all of 256 evenly spaced values goes unnoticed.
    """
    if not keep or weight.is_inference():
        return compute()
    stamp = (weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
    sample = _sample(weight.detach())
    entry = _kept.get(weight)
    if entry is None or entry[0] != stamp or not torch.equal(entry[1], sample):
        entry = (stamp, sample.clone(), {})
        _kept[weight] = entry
    if kind not in entry[2]:
        entry[2][kind] = compute()
    return entry[2][kind]


def _sample(weight: Tensor) -> Tensor:
    step = max(1, weight.numel() // SAMPLE)
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return weight.as_strided((-(-weight.numel() // step),), (step,))  # flatten() would copy channels-last filters
    return weight.flatten()[::step]


def kept_bytes(weight: Tensor) -> int:
    """The memory held for `weight`."""
    entry = _kept.get(weight)
    return 0 if entry is None else sum(value.numel() * value.element_size() for value in entry[2].values())


def forget(weight: Tensor) -> None:
    """Free what is held for `weight`."""
    if weight in _kept:
        del _kept[weight]
