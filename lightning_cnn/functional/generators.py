"""The global generators of torch, numpy and Python, which third parties draw from: seeded together, taken together, put back together."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_generators(key: int) -> None:
    """Seed torch's CPU generator, numpy's and Python's global ones by a key of `functional.counter`."""
    torch.default_generator.manual_seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)


def states() -> dict[str, Any]:
    """The states of the generators in plain types, accelerators' included."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "accelerators": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_states(given: dict[str, Any]) -> None:
    """Put `states()` back."""
    kind, keys, *rest = given["numpy"]
    torch.set_rng_state(given["torch"])
    for device, state in enumerate(given["accelerators"]):
        torch.cuda.set_rng_state(state, device)
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(given["python"])


@contextmanager
def generators_restored() -> Iterator[None]:
    """Leave the CPU's global generators as they were found."""
    found = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(found[0])
        np.random.set_state(found[1])
        random.setstate(found[2])
