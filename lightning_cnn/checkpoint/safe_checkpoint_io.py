"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into wrong weights, written while training goes on."""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from lightning_cnn.checkpoint import _file
from lightning_cnn.checkpoint._plain import plain
from lightning_cnn.errors import CheckpointError

log = logging.getLogger(__name__)
WAITING = 2  # checkpoints in memory at most, besides the one being written


class SafeCheckpointIO(CheckpointIO):
    """Write, read and remove checkpoints for a Trainer: `plugins=[SafeCheckpointIO()]`.

    Writing: plain types, a temporary file beside the final one, fsync, rename, fsync of the folder; the file that had the name stays
    as `NAME.previous`. Reading: checksum first, `weights_only=True` always, else the previous file with a warning. A checkpoint is
    removed only after everything before it in line has been written.

    Args:
        background: Write in a thread; a step waits for the copy of its state only. An error is raised by the next call.
        previous: Keep what a new file replaces.

    Raises:
        CheckpointError: the disk is full (before or while writing), a part of the state has no plain form, or a file is damaged and
            the one before it is too.
    """

    def __init__(self, *, background: bool = True, previous: bool = True) -> None:
        self.background, self.previous = background, previous
        self._thread: ThreadPoolExecutor | None = None
        self._line: deque[Future] = deque()
        self._error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise CheckpointError("SafeCheckpointIO takes no storage_options; put them into fsspec's configuration.")
        self._raise()
        state = plain(checkpoint, copied=self.background)
        _file.refuse_full_disk(state, path)
        self._do(_file.write, state, str(path), self.previous)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if weights_only is False:
            raise CheckpointError(f"{path}: SafeCheckpointIO loads plain types only; leave out weights_only=False, or this plugin.")
        self._settle()
        return _file.load(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        self._do(_file.remove, str(path))

    def teardown(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._thread = None
        self._settle()

    def _do(self, task: Callable[..., None], *arguments: Any) -> None:
        if not self.background:
            task(*arguments)
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._line.append(self._thread.submit(self._in_line, task, *arguments))
        while len(self._line) > WAITING + 1:
            self._line.popleft().result()

    def _in_line(self, task: Callable[..., None], *arguments: Any) -> None:
        if self._error is not None:  # after a failed write nothing is removed or replaced until somebody has been told
            return
        try:
            task(*arguments)
        except BaseException as error:
            self._error = error

    def _settle(self) -> None:
        """Wait until everything in line is written."""
        while self._line:
            self._line.popleft().result()
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
