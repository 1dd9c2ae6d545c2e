"""The mean of tensors over processes."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def average(tensors: Iterable[Tensor], group: Any = None) -> None:
    """Put into each tensor its mean over the group's processes: one message for all tensors of a type."""
    alike: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.dtype].append(tensor)
    for same in alike.values():
        flat = _flatten_dense_tensors(same)
        dist.all_reduce(flat, group=group)
        for tensor, mean in zip(same, _unflatten_dense_tensors(flat.div_(dist.get_world_size(group)), same), strict=True):
            tensor.copy_(mean)
