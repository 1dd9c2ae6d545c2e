"""What `-m` ends with: a table of the jobs, best first, and its picture."""

import csv
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table


class SweepReport(Callback):
    """Collects what each job returns; writes `results.csv` and `sweep.png` into the sweep's folder when all have ended."""

    def __init__(self) -> None:
        self._results: list[tuple[str, float]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        value = job_return.return_value if job_return.status is JobStatus.COMPLETED else None
        said = [word for word in job_return.overrides or [] if not word.startswith("hydra")]
        self._results.append((" ".join(said) or "default", float("nan") if value is None else float(value)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        ranked = sorted(self._results, key=lambda r: (r[1] != r[1], -r[1]))
        with (folder / "results.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("job", "result"), *ranked])
        table = Table("job", "result", title=f"{len(ranked)} jobs, best first")
        for name, value in ranked:
            table.add_row(name, "failed" if value != value else f"{value:.4f}")
        from lightning_cnn.plot import sweep

        names, values = zip(*ranked, strict=True) if ranked else ((), ())
        sweep(names, values, xlabel="what a job returned").savefig(folder / "sweep.png")
        console = Console()
        console.print(table)
        console.print(str(folder.resolve()), soft_wrap=True, highlight=False)
