"""The verdict names what costs most; what a CPU cannot show (pinned memory, an idle GPU) is shown with a GPU's figures."""

import pytest

from lightning_cnn.functional.bottleneck import Measurement, diagnose
from lightning_cnn.functional.step_probe import Reads

COMPUTE = {"forward": 0.010, "backward": 0.020}


def names(**found):
    stages = {**COMPUTE, **found.pop("stages", {})}
    return [finding.name for finding in diagnose(Measurement(stages, **found))]


@pytest.mark.parametrize(
    ("cpu_share", "name"), [(0.02, "slow_disk"), (0.95, "slow_decode"), (None, "slow_data")], ids=["waits", "computes", "unknown"]
)
def test_a_wait_for_data_is_the_disk_s_unless_the_cpus_compute(cpu_share, name):
    assert names(stages={"data": 0.03}, cpu_share=cpu_share) == [name]


@pytest.mark.parametrize(("pinned", "name"), [(False, "unpinned_copy"), (True, "copy"), (None, "copy")])
def test_a_slow_copy_is_blamed_on_pageable_memory_where_it_is_pageable(pinned, name):
    assert names(stages={"copy": 0.01}, pinned=pinned, device="cuda") == [name]


def test_findings_are_ranked_by_what_they_could_gain():
    assert names(stages={"logging": 0.004, "callbacks": 0.005, "augment": 0.006}) == ["augmentation", "slow_callback", "slow_logger"]


def test_a_step_made_of_small_operations_wants_more_pictures():
    assert names(operations=9000, operation_s=3e-6, images=2.0) == ["small_batch"]
    assert names(operations=200, operation_s=3e-6, images=64.0) == []


def test_on_a_gpu_a_read_costs_what_the_gpu_idles_after_it():
    reads = {"train.py:12": Reads(values=1, operations=1, seconds=0.030)}
    busy = Measurement({**COMPUTE, "data": 0.0005}, reads=reads, device="cuda")
    idle = Measurement({**COMPUTE, "other": 0.006}, reads=reads, device="cuda")
    assert [f.name for f in diagnose(busy)] == []
    assert next(f for f in diagnose(idle) if f.name == "synchronising_metric").gain_s == pytest.approx(0.006)
    assert "train.py:12" in diagnose(idle)[0].what


def test_nothing_is_found_where_nothing_is_lost():
    assert names() == []
    assert diagnose(Measurement({})) == []


def test_utilisation_is_flops_over_what_a_matrix_product_reaches():
    found = Measurement(COMPUTE, images=6.0, flops=3_000_000_000, peak_flops_per_s=1e12)
    assert found.mfu == pytest.approx(0.1)
    assert found.images_per_s == pytest.approx(200)
    assert Measurement(COMPUTE).mfu is None
