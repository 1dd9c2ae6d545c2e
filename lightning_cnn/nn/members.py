"""Several sets of weights answering as one network."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def log_mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """log of the mean probability over members: itself a valid logit, so losses, argmax and metrics work unchanged."""
    stacked = torch.stack([torch.log_softmax(one, dim=-1) for one in logits])
    return torch.logsumexp(stacked, 0) - torch.log(torch.tensor(float(len(logits)))).to(stacked)


@contextmanager
def answering_together(model: nn.Module, members: Sequence[Mapping[str, Tensor]]):
    """Inside, `model(x)` is the log mean probability of `members` (state dicts on the model's device); yields a count of its calls."""
    calls, inside = [0], [False]
    own: Callable[..., Any] = model.forward
    had = "forward" in vars(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if inside[0]:
            return own(*args, **kwargs)
        inside[0], calls[0] = True, calls[0] + 1
        try:
            return log_mean_probability([torch.func.functional_call(model, dict(member), args, kwargs) for member in members])
        finally:
            inside[0] = False

    vars(model)["forward"] = forward
    try:
        yield calls
    finally:
        if had:
            vars(model)["forward"] = own
        else:
            del vars(model)["forward"]
