"""Files that appear under their name complete and on the disk, or not at all."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightning_cnn.errors import DataError, LightningCNNError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, error: type[LightningCNNError] = DataError, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write into that takes the name `path` when the block ends, after it has reached the disk.

    It grows under one temporary name beside it (never in TMPDIR, which may be another file system), locked: a killed writer leaves
    that behind and the next one reuses it. What had the name before is left at `previous` if that is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("ab") as lock:
        _lock(lock, path, error)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if previous is not None:
                _keep(path, previous)
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException as cause:
            with suppress(FileNotFoundError):
                partial.unlink()
            if isinstance(cause, OSError) and cause.errno in FULL:
                raise error(f"{path}: the disk is full; nothing was written. Free some space or choose another folder.") from cause
            raise


def check_space(folder: Path, needed: int, error: type[LightningCNNError] = DataError) -> None:
    """Refuse to begin what cannot be finished; a disk that fills up in spite of it is reported by `replacing`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise error(f"{folder}: about {needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free; the disk is full.")


def sync_folder(folder: Path) -> None:
    """Until its folder is on the disk, so is no new name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep(path: Path, previous: Path) -> None:
    """Give the file at `path` the second name `previous`; a link is not kept, what it points to stands by itself."""
    if not path.is_file() or path.is_symlink():
        return
    second = path.with_name(f".{path.name}.second")
    with suppress(FileNotFoundError):
        second.unlink()
    try:
        second.hardlink_to(path)
    except OSError:  # a file system without hard links: for a moment only `previous` exists, and readers know to look there
        path.replace(previous)
    else:
        second.replace(previous)


def _lock(file: BinaryIO, path: Path, error: type[LightningCNNError]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as cause:
        raise error(f"{path}: another process is writing it. Wait for it, or choose another name.") from cause
