"""What holds this run back: seconds a step by stage, and a verdict with what to do, ranked by what it could gain.

Source: CS231n 2016, lecture 11, "Bottlenecks to be aware of"; Williams et al. 2009, "Roofline"; Chowdhery et al. 2022, arXiv:2204.02311,
appendix B (model FLOPs utilisation).
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_cnn.callbacks._account import WARM_UP, Account
from lightning_cnn.errors import raise_all
from lightning_cnn.functional.bottleneck import STAGES, Finding, Measurement, diagnose

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BottleneckReport:
    """What a fit was made of. `str` is the page that the run folder keeps."""

    measured: Measurement
    findings: list[Finding]
    steps: int
    memory_bytes: int

    def __str__(self) -> str:
        m = self.measured
        mfu = "not counted" if m.mfu is None else f"{m.mfu:.1%} of the {m.peak_flops_per_s / 1e9:,.0f} GFLOP/s of a matrix product here"
        head = [f"{self.steps} steps of {m.step_s * 1e3:.2f} ms, {m.images_per_s:,.1f} images/s, MFU {mfu}"]
        head += [f"GPU idle {m.idle_s / m.step_s:.1%} of the time"] if m.device != "cpu" else []
        head += [f"peak memory {self.memory_bytes / 2**20:,.0f} MiB", ""]
        shares = [f"{name:<10}{m[name] * 1e3:10.3f} ms{m[name] / m.step_s:8.1%}" for name in STAGES if m[name]]
        verdict = [f"{i}. {f.name}, gain at most {f.gain_s / m.step_s:.0%}: {f.what} {f.do}" for i, f in enumerate(self.findings, 1)]
        return "\n".join([*head, *shares, "", *(verdict or ["Nothing outside of the network's own work costs 5 % of a step."])])


class BottleneckMonitor(Callback):
    """Account for every moment of training; on a GPU by its own events, which nothing waits for.

    The second step is looked at operation by operation, and is slower for it; from the third on steps are counted. A compiled model
    is spared that look, so its operations stay uncounted. Nothing that is computed changes.

    Args:
        folder: Where `bottlenecks.txt` and `bottlenecks.png` go; by default the logger's folder. Without either, only `report` is filled.
        trace_steps: Write `trace.json` of so many steps, for Perfetto or chrome://tracing.
        every_s: Seconds between two lines in the log while training runs.

    Attributes:
        report: The `BottleneckReport`, after a fit of three steps or more.
    """

    def __init__(self, *, folder: str | None = None, trace_steps: int = 0, every_s: float = 60.0) -> None:
        problems = [f"trace_steps must be at least 0, got {trace_steps}"] if trace_steps < 0 else []
        problems += [f"every_s must be positive, got {every_s}"] if every_s <= 0 else []
        raise_all(problems)
        self.folder, self.trace_steps, self.every_s = folder, trace_steps, every_s
        self.report: BottleneckReport | None = None
        self._account: Account | None = None
        self._said = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report, self._said = None, time.perf_counter()
        self._account = Account(trainer, pl_module, self.trace_steps)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._account is not None:
            self._account.batch_begins(pl_module, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._account is None:
            return
        self._account.batch_ends()
        if self._account.steps and time.perf_counter() - self._said > self.every_s:
            self._said = time.perf_counter()
            _say(trainer, _reported(self._account))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._account is not None:
            self._account.watch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._account is not None:
            self._account.watch.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        account = self._account
        self._remove()
        if account is None or not account.steps:
            log.info("BottleneckMonitor says nothing: it needs %d steps, this fit had fewer.", WARM_UP + 2)
            return
        self.report = _reported(account)
        _say(trainer, self.report)
        folder = self.folder or (trainer.log_dir if trainer.logger else None)
        if folder and trainer.is_global_zero:
            write(self.report, account, Path(folder))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._account is not None:
            self._account.close()
            self._account = None


def write(report: BottleneckReport, account: Account, folder: Path) -> None:
    """`bottlenecks.txt`, `bottlenecks.png`, and `trace.json` where one was asked for."""
    from lightning_cnn.plot import step_timeline

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bottlenecks.txt").write_text(f"{report}\n")
    columns = dict(zip(STAGES, zip(*account.timeline.rows, strict=True), strict=True))
    verdict = report.findings[0].what if report.findings else "No bottleneck outside of the network's own work."
    step_timeline(columns, width=account.timeline.width, title=verdict).savefig(folder / "bottlenecks.png")
    if account.trace:
        events = [{"ph": ph, "name": name, "ts": at * 1e6, "pid": 0, "tid": 0} for ph, name, at in account.trace]
        (folder / "trace.json").write_text(json.dumps({"traceEvents": events}))


def _reported(account: Account) -> BottleneckReport:
    measured = account.measured()
    return BottleneckReport(measured, diagnose(measured), account.steps, account.memory_bytes())


def _say(trainer: Trainer, report: BottleneckReport) -> None:
    if trainer.is_global_zero:
        worst = f"{report.findings[0].name}: {report.findings[0].what} {report.findings[0].do}" if report.findings else "no bottleneck."
        log.info("%.2f ms a step, %.1f images/s; %s", report.measured.step_s * 1e3, report.measured.images_per_s, worst)
