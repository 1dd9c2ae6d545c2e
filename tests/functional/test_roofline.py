"""What the device can do, and what that means for a layer."""

import pytest
import torch

from lightning_cnn.functional.roofline import Roofline, roofline


def test_left_of_the_ridge_memory_bounds_and_right_of_it_arithmetic():
    best = Roofline(flops_per_s=100.0, bytes_per_s=10.0, operation_s=0.0)
    assert [best.bound(flops, 1) for flops in (9, 11)] == ["memory", "compute"]
    assert [best.attainable_s(flops, 1) for flops in (5, 20)] == pytest.approx([0.1, 0.2])


def test_it_is_measured_without_a_random_number():
    before = torch.get_rng_state()
    found = roofline("cpu", torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.flops_per_s > 1e6
    assert found.bytes_per_s > 1e6
