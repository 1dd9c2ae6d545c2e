"""Kill training jobs at random moments and count how they end: `python kills.py local_sgd --kills 100 --out FOLDER`.

A job is two processes with the real launcher between them, but both are forked from this one, which has imported everything: a kill
costs the seconds that it waits. A quarter of the kills fall on the start (meeting, first weights), a fifth near the end, the others
anywhere up to 9 s, well beyond the 5 s after which Lightning's own observer would look; an epoch is 0.1 s, so every seventh falls on an
epoch's end. One line of FOLDER/kills.jsonl a kill; a second run goes on where that ends.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch.strategies.launchers.subprocess_script as launcher
from training_job import Options, attempt

import lightning_cnn.strategy
from lightning_cnn.strategy._names import NAMES
from lightning_cnn.strategy._team import Team

SURVIVES = {("async_sgd", 1)}  # strategy and lost rank: training goes on
WINDOWS = {(60, 0, 0.4): 25, (15, 1.2, 2.8): 20, (120, 0.8, 9): 55}  # epochs, and from when to when to kill: how often
OVER = "over before the kill"
GONE_S = 15  # 10 s for the error, which the tests check on its own, and a while for the processes to leave on a busy machine


class Forked:
    """As much of `subprocess.Popen` as launchers use: a fork of this process instead of a fresh interpreter."""

    def __init__(self, command: object, env: dict[str, str], cwd: object = None) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            job(env)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        deadline = time.monotonic() + (timeout or 1e9)
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def job(env: dict[str, str]) -> None:
    """One rank, in a process that was just forked; it never returns."""
    os.environ.clear()
    os.environ.update(env)
    options, code = Options(**json.loads(env["JOB_OPTIONS"])), 1
    rank = int(env.get("LOCAL_RANK", 0))
    Path(options.out, f"pid{rank}").write_text(str(os.getpid()))
    try:
        attempt(options, f"0-{rank}")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    if Team._current is not None:
        Team._current.leave()  # what atexit does in an interpreter of its own
    sys.stderr.flush()
    os._exit(code)


def start(options: dict) -> int:
    """A job's first rank, forked; the launcher forks the others."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "LOCAL_", "NODE_", "WORLD_"))}
        for stream in (1, 2):
            os.dup2(os.open(Path(options["out"], "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        job({**env, "JOB_OPTIONS": json.dumps(options)})
    return pid


def fork_instead() -> None:
    """Import what jobs need, and make Lightning's launcher fork."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for attribute in NAMES.values():
        getattr(lightning_cnn.strategy, attribute)
    launcher.subprocess = SimpleNamespace(Popen=Forked)


class Kill:
    """A job, and the moment at which one of its ranks is killed."""

    def __init__(self, name: str, number: int, out: Path) -> None:
        draw = random.Random(f"{name} {number}")
        self.name, self.number, self.out, self.ended = name, number, out, False
        self.victim, (self.epochs, *window) = draw.randrange(2), draw.choices(list(WINDOWS), list(WINDOWS.values()))[0]
        self.moment_s = draw.uniform(*window)
        out.mkdir(parents=True)
        loader = "same" if name in ("spatial", "pipeline") else "torch"  # these see the same batches everywhere
        self.parent = start(dict(strategy=name, epochs=self.epochs, sleep_s=0.04, batch=16, samples=64, out=str(out), loader=loader))
        self.began, self.killed = time.monotonic(), 0.0

    def look(self) -> dict | None:
        """Kill when it is time, and say how it ended when it has."""
        now, pids = time.monotonic(), self.pids()
        if len(pids) < 2 and self.alive():
            self.began = now  # the moment counts from when there is somebody to survive
        elif not self.killed and now - self.began >= self.moment_s:
            self.ended, self.killed = self.victim not in self.alive(), now
            if not self.ended:
                os.kill(pids[self.victim], signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # already reaped
            os.waitpid(self.parent, os.WNOHANG)
        if self.killed and (not self.alive() or now - self.killed > 60):
            return self.verdict(now - self.killed)
        return None

    def pids(self) -> dict[int, int]:
        texts = {int(p.name[3:]): p.read_text() for p in self.out.glob("pid*")}
        return {rank: int(text) for rank, text in texts.items() if text}

    def alive(self) -> dict[int, int]:
        return {rank: pid for rank, pid in {-1: self.parent, **self.pids()}.items() if runs(pid)}

    def verdict(self, seconds: float) -> dict:
        survivor, log = 1 - self.victim, (self.out / "log").read_text(errors="replace")
        facts = self.out / f"0-{survivor}.json"
        finished = facts.exists() and "weights" in json.loads(facts.read_text())
        left = self.alive()
        for pid in left.values():
            os.kill(pid, signal.SIGKILL)
        survives = (self.name, self.victim) in SURVIVES
        if self.ended:
            how = OVER if finished and not left else "failed before the kill"
        elif left:
            how = "hang or orphan"
        elif finished:
            how = "survived" if survives else "finished"  # the victim had nothing left to do for anybody
        elif f"rank {self.victim} of 2" in log:  # also of AsyncSGD: a job that never began cannot go on
            how = "named" if seconds < GONE_S else "named too late"
        else:
            how = "not named"
        return {"strategy": self.name, "kill": self.number, "victim": self.victim, "moment_s": round(self.moment_s, 2),
                "epochs": self.epochs, "how": how, "seconds": round(seconds, 2)}  # fmt: skip


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def counts(lines: list[dict]) -> dict[str, dict[str, int]]:
    return {
        name: dict(Counter(line["how"] for line in lines if line["strategy"] == name)) for name in {x["strategy"]: 0 for x in lines}
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategies", nargs="+", choices=list(NAMES))
    parser.add_argument("--kills", type=int, default=100, help="of each strategy")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", type=int, default=3, help="jobs at the same time")
    parser.add_argument("--limit-s", type=float, default=1e9, help="start no job after this")
    options = parser.parse_args()
    fork_instead()
    options.out.mkdir(parents=True, exist_ok=True)
    ledger = options.out / "kills.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    deadline, running = time.monotonic() + options.limit_s, []
    while True:
        while len(running) < options.beside and time.monotonic() < deadline:
            hits = Counter(line["strategy"] for line in lines if line["how"] != OVER) + Counter(kill.name for kill in running)
            name = next((n for n in options.strategies if hits[n] < options.kills), None)
            if name is None:
                break
            number = sum(x["strategy"] == name for x in lines) + sum(kill.name == name for kill in running)
            running.append(Kill(name, number, options.out / f"{name}-{number}-{time.time():.0f}"))
        if not running:
            break
        for kill in list(running):
            if line := kill.look():
                running.remove(kill)
                lines.append(line)
                with ledger.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        time.sleep(0.02)
    for name, count in counts(lines).items():
        print(f"{name:<18}", ", ".join(f"{n} {how}" for how, n in sorted(count.items())))


if __name__ == "__main__":
    main()
