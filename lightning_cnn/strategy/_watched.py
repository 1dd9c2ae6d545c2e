"""Launch like Lightning, but notice a dead rank at once, name it, and leave neither a hang nor an orphan."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _get_default_process_group_backend_for_device, _init_dist_connection
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_cnn.errors import DistributedError
from lightning_cnn.strategy._stop import answered, listen, save_and_stop
from lightning_cnn.strategy._team import Team

log = logging.getLogger(__name__)
GRACE_S = 5.0  # from the loss of a rank until a process that is stuck in a collective is ended


class Watched(ParallelStrategy):
    """Mixin before a parallel strategy: adds `team`. `survives(rank)` says whether training goes on without a rank."""

    team: Team | None = None
    timeout_s: float = 1800.0
    default_group = True  # whether the strategy uses torch.distributed's default group

    def survives(self, rank: int) -> bool:
        return False

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = WatchedLauncher(self, len(self.parallel_devices or []), getattr(self, "_num_nodes", 1))

    def setup_environment(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        getattr(self, "set_world_ranks", lambda: None)()
        address = environment.main_address, environment.main_port
        launcher = self._launcher
        assert isinstance(launcher, WatchedLauncher)
        self.team = Team.join(self.global_rank, self.world_size, address, self.timeout_s, launcher.missing)
        self.team.watch(launcher.lost)
        if self.default_group and not dist.is_initialized():
            self._open_default_group(environment)
        super().setup_environment()

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.team is not None and self.lightning_module is not None
        if not (self.default_group and answered()):  # apart, no callback could make the others stop at the same place
            listen(self.team)  # not before: Lightning has installed its own handler by now
        if self.default_group:
            vars(self.lightning_module.trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = self._agree_to_stop

    def teardown(self) -> None:
        module = self.lightning_module
        if module is not None and module._trainer is not None:
            vars(module.trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)
        super().teardown()

    def settle_to_stop(self) -> None:
        """All ranks are here, and a checkpoint is about to be saved: make their weights equal."""

    def _agree_to_stop(self) -> None:
        """In the place of the broadcast with which Lightning begins every batch: rank 0's word is everybody's."""
        assert self.team is not None and self.lightning_module is not None
        trainer = self.lightning_module.trainer
        asked = torch.tensor([self.team.stopping], dtype=torch.int32, device=self.root_device)
        dist.broadcast(asked, 0)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if asked.item() and batches and batches % trainer.accumulate_grad_batches == 0:
            self.settle_to_stop()
            save_and_stop(trainer)

    def _open_default_group(self, environment: ClusterEnvironment) -> None:
        # Over a fresh prefix: a store that outlives a destroyed group would hand the next one the addresses of the last.
        device = self.root_device
        _init_dist_connection(
            environment,
            getattr(self, "_process_group_backend", None) or _get_default_process_group_backend_for_device(device),
            timeout=timedelta(seconds=self.timeout_s),
            device_id=device if device.type != "cpu" else None,
            store=self.team.under(self.team.fresh("default_group")) if self.team else None,
        )


class WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's subprocess launcher without its observer, which polls every 5 s and then kills everybody without a word."""

    def __init__(self, strategy: Watched, processes: int, nodes: int) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.cluster_environment, processes, nodes)
        self.strategy = strategy
        self._running = False

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ["LIGHTNING_CNN_LAUNCHER"] = str(os.getpid())
            try:
                self._call_children_scripts()
            finally:  # the children have their copies; what this process starts later is not its rank
                del os.environ["LIGHTNING_CNN_LAUNCHER"]
        self._running = True
        try:
            return function(*args, **kwargs)
        except (KeyboardInterrupt, SIGTERMException):  # an orderly end: Lightning forwards the signal to the children itself
            if team := self.strategy.team:
                team.leave()
            raise
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._running = False

    def missing(self) -> str | None:
        """Why a rank can never join: a child has ended already, or the parent has."""
        for local_rank, process in enumerate(self.procs, start=1):
            if process.poll() is not None:
                return f"the process of local rank {local_rank} ended with code {process.returncode} before it joined"
        parent = os.environ.get("LIGHTNING_CNN_LAUNCHER")
        if parent and not self.procs and int(parent) not in (os.getpid(), os.getppid()):
            return "the process that launched this one has ended"
        return None

    def lost(self, rank: int) -> None:
        """Called by the team's thread. Where training cannot go on, the main thread gets `GRACE_S` to raise by itself."""
        team = self.strategy.team
        if team is None or self.strategy.survives(rank):
            log.warning("rank %d was lost; training goes on without it", rank)
            return
        threading.Thread(target=self._end_when_stuck, args=(team,), daemon=True).start()

    def _end_when_stuck(self, team: Team) -> None:
        time.sleep(GRACE_S)
        if self._running:
            sys.stderr.write(f"{DistributedError.__name__}: {team.error('waiting in a collective')}\n")
            sys.stderr.flush()
            self._end_children(wait_s=0)
            os._exit(1)

    def _fail(self, error: BaseException) -> None:
        """Turn a transport's error into one that names the lost rank; then let nobody outlive this process."""
        team = self.strategy.team
        try:
            if team is not None and isinstance(error, RuntimeError) and not isinstance(error, DistributedError):
                _wait_for(lambda: self._fatal(team) or team.closed, seconds=1.0)  # the verdict may be milliseconds behind the transport
                if self._fatal(team):
                    raise team.error() from error
        finally:
            if team is not None:
                team.leave(in_order=False)
            self._end_children(wait_s=GRACE_S)

    def _fatal(self, team: Team) -> bool:
        return any(not self.strategy.survives(rank) for rank in team.lost)

    def _end_children(self, wait_s: float) -> None:
        _wait_for(lambda: all(process.poll() is not None for process in self.procs), seconds=wait_s)
        for process in self.procs:
            _end(process)


def _wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.wait()
