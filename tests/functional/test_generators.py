"""The three global generators move together."""

import random

import numpy as np
import torch

from lightning_cnn.functional.generators import generators_restored, seed_generators, set_states, states


def drawn():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.randn(), random.gauss(0, 1)


def test_one_key_seeds_all_three():
    seed_generators(1 << 62)
    first = drawn()
    seed_generators(1 << 62)
    assert drawn() == first
    seed_generators(1)
    assert all(one != other for one, other in zip(drawn(), first, strict=True))


def test_states_are_plain_and_come_back(tmp_path):
    drawn()  # leaves a spare normal number in numpy and Python
    torch.save(states(), tmp_path / "states.pt")
    first = drawn()
    set_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert drawn() == first


def test_a_block_leaves_them_as_they_were():
    with generators_restored():
        first = drawn()
    assert drawn() == first
