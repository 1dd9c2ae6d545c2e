"""Where the first infinite or undefined number of a forward pass comes from."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number in `tensors` is finite; one pass over them and one answer from the device."""
    given = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not given:
        return True
    norms = torch._foreach_norm(given, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
    return bool(torch.stack([norm.float().to(given[0].device) for norm in norms]).isfinite().all())


def bad_rows(value: Any) -> list[int] | None:
    """Rows (of the first axis) that hold a non-finite number, or None where all is finite."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all()):
        return None
    bad = ~value.detach().isfinite()
    return bad.flatten(1).any(1).nonzero().flatten().tolist() if bad.ndim > 1 else bad.reshape(-1).nonzero().flatten().tolist()


def first_nonfinite(model: nn.Module, run: Callable[[], Any]) -> tuple[str, list[int]] | None:
    """Name of the first layer, in the order of execution during `run()`, whose output is not finite, and the rows where it is not.

    >>> net = nn.Sequential(nn.Linear(1, 1), nn.Identity())
    >>> first_nonfinite(net, lambda: net(torch.tensor([[1.0], [float("nan")]])))
    ('0', [1])
    """
    found: list[tuple[str, list[int]]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            rows = bad_rows(output) if not found else None
            if rows is not None:
                found.append((name, rows))

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
