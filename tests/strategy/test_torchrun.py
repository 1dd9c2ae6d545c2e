"""Several machines, stood in for by several torchrun agents on the loopback: each has its own launcher and knows only an address."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("training_job.py")
PREFIXES = ("MASTER_", "LOCAL_", "NODE_", "GROUP_", "WORLD_", "RANK")


def agents(out, *runs, nodes=2):
    """One agent a machine, one process an agent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = [f"--nnodes={nodes}", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    runs = [{**run, "out": str(out), "ranks": nodes, "trainer": {"devices": 1, "num_nodes": nodes}} for run in runs]
    env = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES)} | {"OMP_NUM_THREADS": "1"}
    started = []
    for node in range(nodes):
        command = [sys.executable, "-m", "torch.distributed.run", *where, f"--node-rank={node}", str(JOB), json.dumps(runs)]
        with (out / f"log{node}").open("w") as log:
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    return started


def facts(out, run):
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"{run}-*.json"))]


def test_in_step_and_apart_under_two_agents(tmp_path):
    sync = {"strategy": "sync_ddp", "samples": 32, "epochs": 1}
    apart = {"strategy": "async_sgd", "kwargs": {"servers": 2}, "samples": 64, "batch": 2, "shuffle": True, "optimizer": "momentum"}
    codes = [agent.wait(timeout=150) for agent in agents(tmp_path, sync, apart)]
    assert codes == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    for run in (0, 1):
        first, second = facts(tmp_path, run)
        assert first["weights"] == second["weights"]
    seen = [sample for rank in facts(tmp_path, 1) for batch in rank["seen"] for sample in batch]
    assert sorted(seen) == sorted(list(range(64)) * 2)


@pytest.mark.soak
def test_a_machine_that_is_lost_does_not_stop_async_sgd(tmp_path):
    """Three agents; the worker of the last kills itself, and its agent ends with it."""
    run = {"strategy": "async_sgd", "samples": 96, "batch": 2, "epochs": 4, "sleep_s": 0.02, "kill_rank": 2, "kill_step": 5}
    codes = [agent.wait(timeout=200) for agent in agents(tmp_path, run, nodes=3)]
    assert codes[:2] == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    assert codes[2] != 0
    assert facts(tmp_path, 0)[0]["report"]["lost"] == [2]
