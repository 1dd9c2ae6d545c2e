"""What the device can do, and what that means for a layer."""

import pytest
import torch

from lightning_cnn.functional.roofline import Roofline, bf16_units, fp16_units, roofline


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


@pytest.mark.parametrize(("unit", "bf16", "fp16"), [("", 0, 0), ("avx512_bf16", 1, 0), ("amx_tile", 1, 0), ("amx_fp16", 0, 1)])
def test_units_of_a_cpu_are_those_that_it_names(unit, bf16, fp16, monkeypatch):
    for name in ("avx512_bf16", "amx_tile", "amx_fp16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda found=name == unit: found, raising=False)
    assert [bf16_units(torch.device("cpu")), fp16_units(torch.device("cpu"))] == [bf16, fp16]
