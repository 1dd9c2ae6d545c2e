"""Pipeline under every schedule: a real network in two processes takes the steps of one, and its checkpoints are those of one."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_job
from lightning.pytorch import LightningModule, Trainer
from pipeline_job import BF16, SCHEDULES, Net, digest, run
from torch import nn
from torchvision.models import densenet121, efficientnet_b0, googlenet, mobilenet_v3_small, resnet18, squeezenet1_1, vgg11_bn

from lightning_cnn.errors import ConfigurationError, UnsupportedLayerError
from lightning_cnn.strategy import Pipeline, diagnose
from lightning_cnn.strategy._cut import Chain

JOB = Path(__file__).with_name("pipeline_job.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(what one process found, {run: what each rank of two found}, folder)."""
    out = tmp_path_factory.mktemp("pipeline")
    before = torch.get_default_dtype()
    try:
        alone = run("auto", 1, out / "alone.ckpt")
        again = run("auto", 1, out / "again.ckpt", epochs=2, resume=out / "alone.ckpt")
        bf16 = run("auto", 1, out / "alone_bf16.ckpt", **BF16)
    finally:
        torch.set_default_dtype(before)
    done = subprocess.run([sys.executable, JOB, out], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return {"alone": alone, "again": again, "bf16": bf16}, {path.stem: torch.load(path) for path in out.glob("*.pt")}, out


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_processes_take_the_steps_of_one(found, schedule):
    """float64, AdamW, clipping by the norm of all stages, accumulation over 2 batches, a last batch smaller than the micro-batches."""
    alone, pipelined, _ = found
    for rank in (0, 1):
        facts = pipelined[f"{schedule}-{rank}"]
        equal(facts["weights"], alone["alone"]["weights"])
        assert facts["metrics"] == pytest.approx(alone["alone"]["metrics"], abs=1e-12)
        assert facts["test"] == pytest.approx(alone["alone"]["test"], abs=1e-12)
        equal(facts["predict"], alone["alone"]["predict"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_checkpoint_is_that_of_one_process(found, schedule):
    alone, _, out = found
    ours, theirs = (torch.load(out / f"{name}.ckpt", weights_only=True) for name in (schedule, "alone"))
    model = Net().double()
    model.load_state_dict(ours["state_dict"])
    equal(digest(model), alone["alone"]["weights"])
    mine, other = ours["optimizer_states"][0]["state"], theirs["optimizer_states"][0]["state"]
    assert mine.keys() == other.keys()
    for key in other:
        equal(mine[key]["exp_avg"], other[key]["exp_avg"])


def test_a_checkpoint_of_one_process_goes_on_in_two(found):
    alone, pipelined, _ = found
    for rank in (0, 1):
        equal(pipelined[f"resumed-{rank}"]["weights"], alone["again"]["weights"])


def test_mixed_precision_trains_as_in_one_process(found):
    """bfloat16 has 8 bits: numbers of one step agree to 2^-8 times a few roundings; weights stay float32."""
    alone, pipelined, out = found
    for rank in (0, 1):
        facts = pipelined[f"bf16-{rank}"]
        assert facts["metrics"]["train_loss"] == pytest.approx(alone["bf16"]["metrics"]["train_loss"], rel=8 * 2**-8)
        assert facts["test"] == pytest.approx(alone["bf16"]["test"], rel=8 * 2**-8)
    saved = torch.load(out / "bf16.ckpt", weights_only=True)["state_dict"]
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {torch.float32}


def test_two_copies_of_two_stages_take_the_steps_of_one_process(job, tmp_path):
    """float64, AdamW, clipping, accumulation; the best checkpoint is chosen alike, and holds the whole model."""
    trainer = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    common = {"loader": "lane", "shuffle": True, "optimizer": "adamw", "save_best": True, "trainer": trainer}
    try:
        _, alone = training_job.run(training_job.Options(ranks=1, batch=8, out=str(tmp_path / "alone"), **common), "auto")
    finally:
        torch.set_default_dtype(torch.float32)
    pipeline = {"strategy": "pipeline", "kwargs": {"data_parallel": 2, "schedule": "zb"}, "ranks": 4, "batch": 4}
    more = {"afterwards": True, "gather": True}
    done = job({**pipeline, **common, **more}, limit_s=120).wait(limit_s=150)  # four interpreters on two cores start slowly
    assert done.process.returncode == 0, done.output
    assert sorted(done[0]) == [0, 1, 2, 3]
    for rank, facts in done[0].items():
        if rank % 2 == 0:  # where no micro-batches' losses are found: one call a step, and it saw what one process sees
            assert facts["gathered"] == [sorted(batch) for batch in alone.seen]
        assert facts["weights"] == pytest.approx(training_job.digest(alone), abs=1e-12)
        for name in ("val_loss", "val_acc"):
            assert facts["metrics"][name] == pytest.approx(float(alone.trainer.callback_metrics[name]), abs=1e-12)
    ours, theirs = (torch.load(tmp_path / folder / "best" / "epoch=1.ckpt", weights_only=True) for folder in (".", "alone"))
    later = torch.load(tmp_path / "afterwards.ckpt", weights_only=True)
    for saved in (ours, later):
        equal(saved["state_dict"], theirs["state_dict"])
        mine, other = saved["optimizer_states"][0]["state"], theirs["optimizer_states"][0]["state"]
        assert mine.keys() == other.keys()
        for key in other:
            equal(mine[key]["exp_avg"], other[key]["exp_avg"])


def test_stages_are_cut_by_measured_time(found):
    _, pipelined, _ = found
    assert len(pipelined["gpipe-0"]["cuts"]) == 1
    assert len(pipelined["interleaved-0"]["cuts"]) == 3
    assert pipelined["zb-0"]["cuts"] == pipelined["zb-1"]["cuts"]


@pytest.mark.parametrize("make", [resnet18, squeezenet1_1, mobilenet_v3_small, vgg11_bn, densenet121, efficientnet_b0, googlenet])
def test_torchvision_networks_are_cut_and_stay_whole(make):
    """Four stages one after another are the network, in both modes, and hold its own weights."""
    net = make(num_classes=5, **({"init_weights": False, "aux_logits": False} if make is googlenet else {})).eval()
    x = torch.randn(1, 3, 64, 64)
    chain = Chain.of(net)
    cuts, seconds = chain.balanced(x, 4, repeats=1)
    ends = [None, *cuts, None]
    stages = [chain.stage(a, b) for a, b in itertools.pairwise(ends)]
    y = x
    for stage in stages:
        y = stage(y)
    torch.testing.assert_close(y, net(x))
    assert {id(p) for stage in stages for p in stage.parameters()} == {id(p) for p in net.parameters()}
    assert len(seconds) == 4
    assert [len(Chain.of(net.train()).places)] == [len(chain.places)]


def test_named_stages_begin_where_they_are_said_to():
    chain = Chain.of(resnet18())
    (cut,) = chain.before(["layer3"])
    assert cut == "layer2_1_relu_1"
    with pytest.raises(UnsupportedLayerError, match="no layer 'layer9'"):
        chain.before(["layer9"])
    with pytest.raises(UnsupportedLayerError, match=r"more than one tensor is alive before 'layer1\.0\.conv2'"):
        chain.before(["layer1.0.conv2"])


def test_wrong_arguments_are_named_at_once():
    with pytest.raises(ConfigurationError, match=r"(?s)3 problems.*schedule.*micro_batches.*stages"):
        Pipeline(schedule="2f2b", micro_batches=0, stages="layer2")


def test_the_doctor_says_what_cannot_be_pipelined():
    class Bad(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.body, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)

    trainer = Trainer(accelerator="cpu", devices=2, strategy=Pipeline(schedule="1f1b", micro_batches=1, stages=["a", "b"]))
    problems = " | ".join(diagnose(trainer, Bad()).problems)
    for word in ("body, head", "at least as many micro_batches", "2 beginnings", "automatic_optimization"):
        assert word in problems
    trainer = Trainer(accelerator="cpu", devices=2, strategy=Pipeline(data_parallel=2))
    assert "data_parallel=2 needs a multiple of 2 processes" in diagnose(trainer, Bad()).problems[0]
    model = Bad()
    model.head, model.automatic_optimization = nn.Identity(), True
    trainer = Trainer(accelerator="cpu", devices=2, strategy=Pipeline())
    (problem,) = diagnose(trainer, model).problems
    assert "batch_norm='micro'" in problem
    assert diagnose(Trainer(accelerator="cpu", devices=2, strategy=Pipeline(batch_norm="micro")), model).problems == []
