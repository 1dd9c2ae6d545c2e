"""Parameters that a plugin adds to a model, left out of the optimizer's checkpoint: it stays that of a plain run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_cnn.precision._shadow import parameters


def leave_out(optimizer: Optimizer, added: Mapping[Tensor, str], moments: Mapping[str, dict[str, Any]]) -> None:
    """Hide the `added` parameters (with their names) from `optimizer.state_dict()`; loading gives them their `moments`, where known.

    Shards are left alone: torch.distributed numbers the parameters of their checkpoints itself.
    """
    names = {parameter: added[parameter] for parameter in parameters(optimizer) if parameter in added}
    if not names or any(isinstance(parameter, DTensor) for parameter in parameters(optimizer)):
        return

    def save(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        numbers: dict[int, int] = {}
        for group, live in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
            plain = [place for place, parameter in enumerate(live["params"]) if parameter not in names]
            for place in plain:
                numbers[group["params"][place]] = len(numbers)
            group |= {key: [group[key][place] for place in plain] for key in ("params", "param_names") if key in group}
            group["params"] = [numbers[number] for number in group["params"]]
        state_dict["state"] = {numbers[number]: state for number, state in state_dict["state"].items() if number in numbers}

    def load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = state_dict["param_groups"]
        groups = [_with(names, *pair) for pair in zip(saved, optimizer.param_groups, strict=False)] + saved[
            len(optimizer.param_groups) :
        ]
        known = {name: moments[name] for name in names.values() if name in moments}
        return state_dict | {"param_groups": groups, "state": state_dict["state"] | known}

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)


def _with(names: Mapping[Tensor, str], saved: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    """A saved group with the added parameters in their places, their names for numbers; torch says what else does not fit."""
    numbers = list(saved["params"])
    for place, parameter in enumerate(live["params"]):
        if parameter in names:
            numbers.insert(place, names[parameter])
    return {key: value for key, value in saved.items() if key != "param_names"} | {"params": numbers}
