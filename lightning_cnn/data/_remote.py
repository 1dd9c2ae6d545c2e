"""Shards that live behind a URL: fetched ahead of their use into a bounded local cache, and believed only when their checksums agree.

Each shard has a local file of its full size from the start, holding header, metadata and index; its payload is a hole in the file
(which takes no space) until it is fetched, and again after it has been dropped. So everything else reads shards as it reads files.
"""

import ctypes
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from xxhash import xxh3_64_hexdigest

from lightning_cnn.data._format import PAGE, Packed, check_payload, map_file, read_header
from lightning_cnn.errors import ConfigurationError, DataError

CHUNK = 8 << 20
TRIES, PAUSE_S = 5, 0.2
MANY = 1024
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate


class DiskFullError(DataError):
    """Trying again does not help."""


def is_url(path: Any) -> bool:
    return "://" in str(path)


class RemoteShards:
    """The shards at some URLs, and which of them are here; at most `limit` bytes of payload at once.

    A folder serves one process at a time: the first one gets `folder/0`, a second one beside it `folder/1`; what a run leaves behind,
    the next one finds.
    """

    def __init__(self, urls: Sequence[str], folder: Path, limit: int) -> None:
        self.urls, self.limit, self.process = list(urls), limit, os.getpid()
        self._folder, self._lock = _own_folder(folder)
        self.paths = [self._open(url) for url in self.urls]
        self.files = [Packed(path) for path in self.paths]
        self.here: set[int] = set()
        self._found = {k for k, path in enumerate(self.paths) if _mark(path).exists()}  # by an earlier run; to be checked
        self._passing, self._one = threading.Lock(), threading.Lock()

    def size(self, shard: int) -> int:
        return self.files[shard].header.payload_bytes

    def fetch(self, shard: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Read the payload of a shard into its file and check every sample; again where the connection or the bytes are bad."""
        file, problem, attempt = self.files[shard], "", 0
        if shard in self._found and self._still_good(shard):
            return
        for attempt in range(TRIES):
            time.sleep(PAUSE_S * (2**attempt - 1))
            try:
                self._download(self.urls[shard], file.path, PAGE, PAGE + file.header.payload_bytes, stopped)
                if stopped():
                    break
                check_payload(file)
            except DataError as error:
                problem = str(error)
                if isinstance(error, DiskFullError):
                    break
                continue
            _mark(file.path).touch()
            self.here.add(shard)
            return
        self.drop(shard)
        if not stopped():
            raise DataError(f"{self.urls[shard]}: could not be fetched ({attempt + 1} of {TRIES} attempts made): {problem}")

    def _still_good(self, shard: int) -> bool:
        self._found.discard(shard)
        try:
            check_payload(self.files[shard])
        except DataError:
            return False
        self.here.add(shard)
        return True

    def drop(self, shard: int) -> None:
        """Give the space of a shard back."""
        self.here.discard(shard)
        self._found.discard(shard)
        _mark(self.paths[shard]).unlink(missing_ok=True)
        _punch(self.paths[shard], PAGE, self.size(shard))

    def make_room(self, shard: int, kept: set[int]) -> bool:
        """Drop shards that are not `kept` until `shard` fits beside the others; whether it does."""
        for other in sorted((self.here | self._found) - kept - {shard}):
            if self._used(shard) <= self.limit:
                break
            self.drop(other)
        return self._used(shard) <= self.limit

    def require(self, shard: int) -> None:
        """Fetch a shard now if it is not here; nothing is dropped for it."""
        with self._one:
            if shard in self.here:
                return
            if not self.make_room(shard, self.here):
                total, limit = sum(map(self.size, range(len(self.urls)))) / 1e9, self.limit / 1e9
                raise DataError(
                    f"{self.urls[shard]}: {total:.3g} GB of shards do not fit into a cache of {limit:.3g} GB. Raise cache_gb, or read "
                    "them through PackedDataModule(order='windowed'), which drops what it has read."
                )
            self.fetch(shard)

    def check_room(self, most: int) -> None:
        """Refuse an order that needs `most` bytes of shards at a time if they do not fit."""
        if most > self.limit:
            raise ConfigurationError(
                f"This order reads shards of {most / 1e9:.3g} GB at a time, and the cache holds {self.limit / 1e9:.3g} GB. Raise "
                "cache_gb, use order='windowed' with a smaller window, or pack smaller shards."
            )

    @contextmanager
    def passing(self, needs: Sequence[np.ndarray], parts: Sequence[int]) -> "Iterator[Ahead]":
        """Fetch ahead for batches that need the shards `needs[b]`, in this order, and are read in `parts[b]` parts."""
        if not self._passing.acquire(blocking=False):
            raise DataError("Remote shards are read by one iteration at a time: end the other one first.")
        try:
            ahead = Ahead(self, needs, parts)
            try:
                yield ahead
            finally:
                ahead.close()
        finally:
            self._passing.release()

    def _used(self, coming: int) -> int:
        return sum(self.size(shard) for shard in self.here | self._found | {coming})

    def _open(self, url: str) -> Path:
        """The local file of a URL, with all but its payload."""
        path = self._folder / f"{xxh3_64_hexdigest(url.encode())}.pack"
        size = _try(url, lambda files, place: files.size(place))
        head = _try(url, lambda files, place: files.cat_file(place, start=0, end=min(PAGE, size)))
        if path.exists() and path.stat().st_size == size and path.read_bytes()[:PAGE] == head:
            return path
        _mark(path).unlink(missing_ok=True)
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)
        try:
            header = read_header(Path(url), np.frombuffer(map_file(path), np.uint8))
        except DataError:
            path.unlink()
            raise
        self._download(url, path, header.metadata_offset, size, lambda: False)
        return path

    def _download(self, url: str, path: Path, start: int, end: int, stopped: Callable[[], bool]) -> None:
        with path.open("r+b", buffering=0) as file:
            for first in range(start, end, CHUNK):
                if stopped():
                    return
                last = min(first + CHUNK, end)
                data = _try(url, lambda files, place, a=first, b=last: files.cat_file(place, start=a, end=b))
                if len(data) != last - first:
                    raise DataError(f"{url}: {len(data)} bytes came where {last - first} were asked for, at byte {first}")
                _write(file, path, first, data)


class Ahead:
    """A thread that fetches shards in the order in which batches need them, as far ahead as the cache allows."""

    def __init__(self, shards: RemoteShards, needs: Sequence[np.ndarray], parts: Sequence[int]) -> None:
        self._shards, self._needs = shards, [set(need.tolist()) for need in needs]
        self._last = {shard: batch for batch, need in enumerate(self._needs) for shard in need}
        self._order = list(dict.fromkeys(shard for need in needs for shard in need.tolist()))
        self._left = list(parts)
        self._done, self._stopped, self._ready = 0, False, set[int]()
        self._error: Exception | None = None
        self._check()
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="shards", daemon=True)
        self._thread.start()

    def wait(self, batch: int) -> None:
        """Until everything that a batch reads is here."""
        with self._change:
            self._change.wait_for(lambda: self._stopped or self._error or self._needs[batch] <= self._ready)
            if self._error or self._stopped:
                raise self._error or DataError("stopped")

    def done(self, batch: int) -> None:
        """A part of a batch has been read; what no later batch needs may be dropped."""
        with self._change:
            self._left[batch] -= 1
            while self._done < len(self._left) and not self._left[self._done]:
                self._done += 1
            self._change.notify_all()

    def close(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join()

    def _check(self) -> None:
        """Every batch must find room for the shards between whose first and last use it lies."""
        first = {shard: batch for batch in reversed(range(len(self._needs))) for shard in self._needs[batch]}
        change = np.zeros(len(self._needs) + 1, np.int64)
        for shard, last in self._last.items():
            change[first[shard]] += self._shards.size(shard)
            change[last + 1] -= self._shards.size(shard)
        self._shards.check_room(int(change.cumsum().max(initial=0)))

    def _run(self) -> None:
        try:
            for shard in self._order:
                with self._change:
                    self._change.wait_for(lambda s=shard: self._stopped or self._fits(s))
                if self._stopped:
                    return
                if shard not in self._shards.here:
                    self._shards.fetch(shard, lambda: self._stopped)
                with self._change:
                    self._ready.add(shard)
                    self._change.notify_all()
        except Exception as error:  # whatever it is, the waiting threads raise it
            with self._change:
                self._error = error
                self._change.notify_all()

    def _fits(self, shard: int) -> bool:
        kept = {other for other, last in self._last.items() if last >= self._done and (other in self._ready or other == shard)}
        return shard in self._shards.here or self._shards.make_room(shard, kept)


def expand(url: str) -> list[str]:
    """The URLs that a pattern names, sorted; a URL without a pattern is itself."""
    if not any(sign in url for sign in "*?["):
        return [url]
    found = _try(url, lambda files, place: [files.unstrip_protocol(name) for name in files.glob(place)])
    return sorted(found) or [url]


def _try(url: str, ask: Callable[[Any, str], Any]) -> Any:
    """What a file system answers; a connection that fails is tried again."""
    for attempt in range(TRIES):
        try:
            files, place = fsspec.core.url_to_fs(url)
            return ask(files, place)
        except FileNotFoundError as error:
            raise DataError(f"{url}: there is no such file.") from error
        except (ImportError, ValueError) as error:
            raise ConfigurationError(f"{url}: fsspec cannot read it ({error}).") from error
        except Exception as error:  # every file system has errors of its own
            if attempt == TRIES - 1:
                raise DataError(f"{url}: no answer in {TRIES} attempts ({type(error).__name__}: {error}).") from error
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError


def _write(file: Any, path: Path, offset: int, data: bytes) -> None:
    try:
        while data:
            written = os.pwrite(file.fileno(), data, offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        if error.errno == errno.ENOSPC:
            full = f"{path.parent}: the disk of the cache is full. Free some space, lower cache_gb, or choose another cache_folder."
            raise DiskFullError(full) from error
        raise


def _own_folder(folder: Path) -> tuple[Path, Any]:
    """(the first numbered folder in `folder` that no process has, what keeps it ours)."""
    for number in range(MANY):
        place = folder / str(number)
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return place, lock
    raise DataError(f"{folder}: {MANY} processes use it already.")


def _mark(path: Path) -> Path:
    return path.with_suffix(".here")


def _punch(path: Path, offset: int, size: int) -> None:
    with path.open("r+b") as file:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if size and fallocate(file.fileno(), KEEP_SIZE | PUNCH_HOLE, offset, size):
            raise DataError(f"{path}: its file system cannot free part of a file ({os.strerror(ctypes.get_errno())}). Use another one.")
