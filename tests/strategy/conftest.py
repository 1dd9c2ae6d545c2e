"""Start jobs of two processes; every test of a strategy that needs more than one process goes through `job` or `launch`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for training_job, which is a script and a module
JOB = Path(__file__).with_name("training_job.py")


class Job:
    """Runs of `training_job.py` in one set of processes, and what each rank saw: `job[n][rank]`."""

    def __init__(self, out: Path, *runs: dict, command: tuple[str, ...] = (), limit_s: float = 60) -> None:
        self.out = out
        runs = [{**run, "out": str(out)} for run in runs]
        environment = {
            k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
        }
        environment |= {"OMP_NUM_THREADS": "1", "JOB_LIMIT_S": str(limit_s)}
        self.process = subprocess.Popen(
            [*(command or (sys.executable,)), str(JOB), json.dumps(runs)],
            env=environment,
            stdout=(out / "log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, limit_s: float = 80) -> "Job":
        try:
            self.process.wait(timeout=limit_s)
        finally:
            self.kill()
        return self

    @property
    def output(self) -> str:
        return (self.out / "log").read_text()[-8000:]

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __getitem__(self, run: int) -> dict[int, dict]:
        found = {int(p.stem.split("-")[1]): json.loads(p.read_text()) for p in self.out.glob(f"{run}-*.json")}
        assert found, f"no rank finished run {run}:\n{self.output}"
        return found

    def finished(self, rank: int) -> bool:
        """Whether the rank had trained to the end."""
        path = self.out / f"0-{rank}.json"
        return path.exists() and "weights" in json.loads(path.read_text())

    def gone(self, within_s: float = 10) -> bool:
        """Whether every process of the job has ended, after at most a while."""
        deadline = time.monotonic() + within_s
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.alive()

    def alive(self) -> list[int]:
        """Processes of the job that still run."""
        return [
            pid for pid in (int(p.read_text()) for p in self.out.glob("pid*")) if Path(f"/proc/{pid}/cmdline").exists() and _runs(pid)
        ]


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture(scope="module")
def launch():
    """Start a job in a folder; what is left of it at the end of the module is killed."""
    jobs = []

    def start(out: Path, *runs: dict, **kwargs) -> Job:
        jobs.append(Job(out, *runs, **kwargs))
        return jobs[-1]

    yield start
    for one in jobs:
        one.kill()


@pytest.fixture
def job(launch, tmp_path):
    """Start a job in this test's own folder."""
    return lambda *runs, **kwargs: launch(tmp_path, *runs, **kwargs)
