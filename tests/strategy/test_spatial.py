"""Spatial divides a picture exactly: every window, every padding, both axes, and what cannot be divided is put together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.strategy import Spatial, diagnose
from lightning_cnn.strategy._band import whole
from lightning_cnn.strategy._grid import Grid
from lightning_cnn.strategy.spatial import divide

JOB = Path(__file__).with_name("spatial_job.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of each grid found: {(grid, rank): {case: {quantity: largest relative difference from one process}}}."""
    out = tmp_path_factory.mktemp("spatial")
    done = subprocess.run([sys.executable, JOB, out], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


@pytest.mark.parametrize("grid", ["2x1", "2x2", "3x1"])
def test_a_divided_picture_equals_a_whole_one(found, grid):
    """float64, two steps of SGD: outputs, the picture's gradient, the weights' gradients, weights and running statistics."""
    facts = {name: case for name, case in found.items() if name.startswith(grid)}
    assert facts
    for rank, cases in facts.items():
        assert len(cases) >= 45
        for case, numbers in cases.items():
            for quantity in ("forward", "picture's gradient", "gradients", "weights and statistics"):
                assert numbers[quantity] < 1e-12, f"{rank}: {case}: {quantity}"


@pytest.mark.parametrize(
    "case", ["resnet18", "resnet20 with sliced shortcuts", "squeezenet", "mobilenet_v3", "conv reflect", "slices", "pads", "its length"]
)
def test_whole_networks_stay_divided(found, case):
    assert found["2x1-0"][case]["put together"] == []


def test_what_is_not_known_is_put_together_and_named(found):
    assert found["2x1-0"]["layer norm (put together)"]["put together"] == ["layer_norm"]
    assert found["2x1-0"]["shrinks to less than a row each"]["put together"] == ["conv2d"]


@pytest.mark.forks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_computed_again_is_computed_in_the_same_type(dtype, tmp_path):
    """Autocast on a CPU, also to float32, in which StochasticRounding computes where bfloat16 would be emulated."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    layer, pictures, autocast = nn.Conv2d(2, 3, 3).bfloat16(), torch.randn(1, 2, 5, 5), torch.autocast("cpu")
    autocast.fast_dtype = dtype
    gradients = []
    for x in (pictures, divide(pictures, Grid(1, 1, 0))):
        with autocast:
            y = whole(layer(x))
        (gradient,) = torch.autograd.grad(y.float().square().sum(), layer.weight)
        gradients.append(gradient)
    torch.distributed.destroy_process_group()
    assert y.dtype == dtype
    assert torch.equal(*gradients)


def test_wrong_arguments_are_named_at_once():
    with pytest.raises(ConfigurationError, match=r"(?s)2 problems.*height.*width"):
        Spatial(height=0, width=-1)


def test_the_doctor_knows_the_number_of_processes_and_sync_batchnorm():
    from training_job import Classifier, Options

    module = Classifier(Options())
    module.norm = nn.BatchNorm2d(4)
    found = diagnose(Trainer(accelerator="cpu", devices=2, strategy=Spatial(height=2, width=2), sync_batchnorm=True), module)
    assert "the Trainer has 2" in " ".join(found.problems)
    assert "sync_batchnorm=True" in " ".join(found.problems)
    assert "counts the whole pictures" in found.advice[0]


def test_ranks_with_different_batches_are_told(job):
    """The job's own loader shares the data among the ranks, which Spatial must refuse."""
    done = job({"strategy": "spatial", "loader": "own"}).wait()
    assert done[0][0]["error"] == "DataError"
    assert "another batch than the others" in done[0][0]["message"]
    assert done.gone()
