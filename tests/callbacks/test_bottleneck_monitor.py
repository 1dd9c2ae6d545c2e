"""Six bottlenecks are planted in a run that has none; the monitor names each.

A copy of pageable memory needs a GPU: here its events are played, and the rest of the monitor is as it is.
"""

import io
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_cnn.callbacks import BottleneckMonitor, _account, _stopwatch, bottleneck_monitor
from lightning_cnn.callbacks._account import _pinned
from lightning_cnn.callbacks._device_clock import DeviceClock
from lightning_cnn.callbacks._timeline import Timeline
from lightning_cnn.functional import roofline, step_probe

STEPS = 10
wait = time.sleep


@pytest.fixture
def own_time(monkeypatch):
    """Time is what this thread computes and the planted waits: what other programs take of the machine is in no stage."""
    waited = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.thread_time() + waited[0])
    for module in (_stopwatch, step_probe, roofline):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(sys.modules[__name__], "wait", lambda seconds: waited.__setitem__(0, waited[0] + seconds))


class Pictures(Dataset):
    """Real decoding of a PNG of `px` pixels, after a wait as of a disk."""

    def __init__(self, length, px=8, wait_s=0.0):
        file = io.BytesIO()
        Image.effect_noise((px, px), 80).convert("RGB").save(file, "png")
        self.length, self.px, self.wait_s, self.file = length, px, wait_s, file.getvalue()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.wait_s:
            wait(self.wait_s)
        if self.px > 8:
            Image.open(io.BytesIO(self.file)).load()
        return torch.full((16, 24, 24), 0.5), index % 3


class Net(LightningModule):
    """Its forward and backward take some ten milliseconds, so that a plain run has no bottleneck. Metrics by `reading`."""

    def __init__(self, reading=False):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(16, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5), nn.Flatten(2))
        self.reading = reading

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        if self.reading:
            values = loss.detach().expand(8000)
            loss = loss + 0 * sum(v.item() for v in values)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class SlowLogger(Logger):
    name, version = "slow", 0

    def log_metrics(self, metrics, step=None):
        wait(0.03)

    def log_hyperparams(self, *args, **kwargs):
        pass


def fitted(dataset=None, *, batch_size=8, model=None, logger=False, steps=STEPS, **options):
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    monitor = BottleneckMonitor(**options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=steps // 2,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[monitor],
        **quiet,
    )
    trainer.fit(model or Net(), DataLoader(dataset or Pictures(64), batch_size=batch_size))
    return monitor, trainer


PLANTED = {
    "slow_disk": lambda: fitted(Pictures(64, wait_s=0.005)),
    "slow_decode": lambda: fitted(Pictures(64, px=400)),
    "small_batch": lambda: fitted(batch_size=1, model=Small()),
    "synchronising_metric": lambda: fitted(model=Net(reading=True)),
    "slow_logger": lambda: fitted(logger=SlowLogger()),
}


class Small(Net):
    """A deep stack of narrow layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(16, 4, 1), *(nn.Conv2d(4, 4, 1) for _ in range(100)))


@pytest.mark.parametrize("name", PLANTED)
def test_it_names_the_planted_bottleneck_first(name, own_time):
    monitor, _ = PLANTED[name]()
    found = [finding.name for finding in monitor.report.findings]
    assert found[:1] == [name] and set(found) & set(PLANTED) == {name}, str(monitor.report)


def test_nothing_planted_nothing_named(own_time):
    monitor, _ = fitted()
    assert not {finding.name for finding in monitor.report.findings} & {*PLANTED, "unpinned_copy"}, str(monitor.report)


class Event:
    """A CUDA event of a GPU that never lags behind: it passes when it is recorded."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = _stopwatch.time.perf_counter()

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Copied(Net):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        wait(0.05)
        return batch


@pytest.mark.parametrize(("pinned", "name"), [(False, "unpinned_copy"), (True, "copy")])
def test_a_slow_copy_is_named_from_the_gpu_s_events_and_blamed_on_pageable_memory_where_it_is(monkeypatch, own_time, pinned, name):
    for attribute, value in {"Event": Event, "synchronize": lambda device: None, "max_memory_allocated": lambda device: 2**20}.items():
        monkeypatch.setattr(torch.cuda, attribute, value)
    monkeypatch.setattr(_account, "roofline", lambda device, dtype: roofline.Roofline(1e12, 1e11, 0.0))
    on_a_gpu, made = SimpleNamespace(device=torch.device("cuda")), _account.Account
    monkeypatch.setattr(bottleneck_monitor, "Account", lambda trainer, module, steps: made(trainer, on_a_gpu, steps))
    monkeypatch.setattr(
        _account, "_pinned", lambda trainer: _pinned(SimpleNamespace(train_dataloader=SimpleNamespace(pin_memory=pinned)))
    )
    monitor, _ = fitted(Pictures(96), model=Copied(), steps=24)
    assert [finding.name for finding in monitor.report.findings][:1] == [name], str(monitor.report)
    assert monitor.report.measured["copy"] == pytest.approx(0.05, rel=0.2)
    assert "GPU idle" in str(monitor.report)


def test_whether_memory_is_pinned_is_read_off_the_loader():
    assert _pinned(SimpleNamespace(train_dataloader=DataLoader([1, 2], pin_memory=False))) is False
    assert _pinned(SimpleNamespace(train_dataloader=None)) is None


def test_the_stages_add_up_to_the_clock_and_validation_is_not_among_them(own_time):
    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            wait(0.2)

    class Loaders:
        pass

    monitor = BottleneckMonitor()
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        accelerator="cpu", max_steps=8, val_check_interval=4, limit_val_batches=1, num_sanity_val_steps=0, callbacks=[monitor], **quiet
    )
    loader = DataLoader(Pictures(64), batch_size=8)
    trainer.fit(Validated(), loader, loader)
    assert monitor.report.steps == 6
    assert monitor.report.measured.images == 8
    assert monitor.report.measured.step_s < 0.2
    assert monitor.report.measured["forward"] > monitor.report.measured["other"]


def test_the_page_the_picture_and_the_trace_are_in_the_folder(tmp_path):
    monitor, _ = fitted(logger=CSVLogger(tmp_path, name="", version=""), trace_steps=2)
    assert (tmp_path / "bottlenecks.txt").read_text() == f"{monitor.report}\n"
    assert (tmp_path / "bottlenecks.png").read_bytes()[:4] == b"\x89PNG"
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "[Strategy]SingleDeviceStrategy.backward" for event in events) == 2 * 2
    assert "MFU" in str(monitor.report) and 0 < monitor.report.measured.mfu < 2


def test_a_fit_too_short_to_judge_has_no_report():
    monitor, trainer = fitted(steps=1 * 2 // 2 + 1)
    assert monitor.report is None
    assert not {"profile", "start", "stop"} & set(vars(trainer.profiler))


def test_another_profiler_goes_on_working():
    from lightning.pytorch.profilers import SimpleProfiler

    profiler, monitor = SimpleProfiler(), BottleneckMonitor()
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    Trainer(accelerator="cpu", max_steps=5, callbacks=[monitor], profiler=profiler, **quiet).fit(
        Net(), DataLoader(Pictures(64), batch_size=8)
    )
    assert len(profiler.recorded_durations["[Strategy]SingleDeviceStrategy.backward"]) == 5
    assert monitor.report.measured["backward"] > 0


def test_the_history_keeps_its_mean_and_its_bound():
    timeline = Timeline(rows=8)
    for step in range(64):
        timeline.add([float(step)])
    assert len(timeline.rows) < 8 and timeline.width == 16
    assert timeline.rows[0] == [7.5]


def test_the_device_s_account_never_waits_for_an_event_that_has_not_passed():
    now, passed = [0.0], [0.0]

    class Event:
        def record(self):
            self.at = now[0]

        def query(self):
            return self.at <= passed[0]

        def elapsed_time(self, other):
            return other.at - self.at

    clock = DeviceClock(Event, every=1)
    for _ in range(3):
        clock.step()
        for stage, milliseconds in (("data", 4), ("forward", 10), ("forward", 5), ("backward", 20)):
            clock.mark(stage)
            now[0] += milliseconds
    assert clock.steps == 0
    passed[0] = 40.0
    clock.step()
    assert clock.steps == 1
    passed[0] = now[0]
    clock.harvest()
    assert clock.steps == 3
    assert clock.seconds == pytest.approx({"other": 0.0, "data": 0.012, "forward": 0.045, "backward": 0.060})


def test_wrong_arguments_are_named_together():
    with pytest.raises(ValueError, match=r"2 problems:\n.*trace_steps.*\n.*every_s"):
        BottleneckMonitor(trace_steps=-1, every_s=0)
