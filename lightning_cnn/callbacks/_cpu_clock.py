"""Does a loader wait or work? CPU seconds, and those spent ready to compute while another process had the CPU.

Linux says both in /proc; elsewhere the second is zero, and of worker processes nothing is known.
"""

import os
import time
from multiprocessing import active_children
from pathlib import Path


class OwnClock:
    """Seconds in which this process computed (all its threads) or would have (the calling one)."""

    def __init__(self) -> None:
        try:
            self._file = Path("/proc/thread-self/schedstat").open("rb", buffering=0)  # noqa: SIM115  # open for the whole fit: a microsecond a look
        except OSError:
            self._file = None

    def seconds(self) -> float:
        delay = int(os.pread(self._file.fileno(), 64, 0).split()[1]) / 1e9 if self._file else 0.0
        return time.process_time() + delay

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


class WorkerClock:
    """The same for this process's children: the workers of its loaders."""

    def __init__(self) -> None:
        self._began, self._before = time.perf_counter(), _children()
        self.workers = len(self._before)

    def share(self) -> float | None:
        """Of the time since, in which a worker worked on average; None where there are none or nothing is known."""
        now, elapsed = _children(), time.perf_counter() - self._began
        worked = [after - self._before[pid] for pid, after in now.items() if pid in self._before and after]
        return sum(worked) / len(worked) / elapsed if worked and elapsed else None


def _children() -> dict[int, float]:
    found = {}
    for child in active_children():
        try:
            computed, delayed, _ = Path(f"/proc/{child.pid}/schedstat").read_text().split()
            found[child.pid] = (int(computed) + int(delayed)) / 1e9
        except OSError:
            found[child.pid] = 0.0
    return found
