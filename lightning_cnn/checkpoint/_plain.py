"""A checkpoint as plain types in memory of its own: what `weights_only=True` can read, and what training can no longer change.

A path, enum, numpy value, OmegaConf node or namespace becomes the string, number, list, dict or tensor that it stands for. What has no
plain form (a function, a partial, an object) is refused by name, except among hyper-parameters: there it is left out with a warning,
because it can be given again when the model is loaded.
"""

import argparse
import logging
import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cnn.errors import CheckpointError, raise_all

log = logging.getLogger(__name__)
HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")
SCALARS = (str, bool, int, float, complex, bytes, type(None))
AS_THEY_ARE = (torch.dtype, torch.device, torch.Size, Counter)  # `weights_only=True` knows them


def plain(checkpoint: Mapping[str, Any], *, copied: bool = True) -> dict[str, Any]:
    """`checkpoint` in plain types; with `copied`, tensors are on the CPU and share nothing with the given ones.

    Raises:
        CheckpointError: listing everything that has no plain form.
    """
    state = {key: value for key, value in checkpoint.items() if not isinstance(value, type)}  # Lightning names hparams' class
    left_out: list[str] = []
    result = {}
    for key, value in state.items():
        walk = _Walk(copied, left_out if key in HYPER_PARAMETERS else None)
        result[key] = walk(value, key)
        raise_all(walk.problems, CheckpointError)
    if left_out:
        log.warning("Hyper-parameters left out of the checkpoint, give them again to load_from_checkpoint: %s", ", ".join(left_out))
    return result


def size_of(value: Any) -> int:
    """Bytes of the tensors in a plain checkpoint."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0


class _AbsentError(Exception):
    """A value without a plain form, where that is no problem."""


class _Walk:
    def __init__(self, copied: bool, left_out: list[str] | None) -> None:
        self.copied, self.left_out, self.problems = copied, left_out, []
        self._tensors: dict[tuple, Tensor] = {}

    def __call__(self, value: Any, at: str) -> Any:
        value = _meant(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in SCALARS or isinstance(value, AS_THEY_ARE):
            return value
        for kind in (str, bool, int, float):
            if isinstance(value, kind):
                return kind(value)
        if isinstance(value, Mapping):
            return self._mapping(value, at)
        if isinstance(value, list | tuple | set | frozenset):
            kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
            return (set if kind is frozenset else kind)(self._each(enumerate(value), at).values())
        return self._without_plain_form(value, at)

    def _mapping(self, value: Mapping, at: str) -> dict:
        each = self._each(value.items(), at)
        if not isinstance(value, OrderedDict):
            return each
        ordered = OrderedDict(each)
        ordered.__dict__.update(self._each(vars(value).items(), at))  # a state dict's `_metadata`
        return ordered

    def _each(self, items: Any, at: str) -> dict:
        result = {}
        for key, value in items:
            try:
                result[_meant(key)] = self(value, f"{at}.{key}")
            except _AbsentError:
                continue
        return result

    def _tensor(self, value: Tensor) -> Tensor:
        """Tied tensors stay tied; a view is stored without the rest of what it looks at."""
        if not self.copied:
            return value.detach()
        if value.layout != torch.strided:
            return value.detach().to("cpu", copy=True)
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else (id(value),)
        if place not in self._tensors:
            self._tensors[place] = value.detach().to("cpu", copy=True)
        return self._tensors[place]

    def _without_plain_form(self, value: Any, at: str) -> None:
        if self.left_out is not None:
            self.left_out.append(at.split(".", 1)[1])
            raise _AbsentError
        self.problems.append(
            f"{at} is a {type(value).__module__}.{type(value).__qualname__}, which weights_only=True cannot load; "
            "store numbers, strings, lists, dicts and tensors in its place."
        )


def _meant(value: Any) -> Any:
    """The plain value that a path, enum, numpy value, namespace or OmegaConf node stands for; anything else as it is."""
    if isinstance(value, Enum):
        return _meant(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind not in "biufc" else torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if type(value).__module__.startswith("omegaconf.") and "omegaconf" in sys.modules:
        return sys.modules["omegaconf"].OmegaConf.to_container(value, resolve=True)
    return value
