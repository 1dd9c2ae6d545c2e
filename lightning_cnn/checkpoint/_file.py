"""A checkpoint file: what `torch.save` writes, and at its end, as the zip archive's comment, a checksum of every byte before it.

    0            the zip archive of torch.save; the length of its comment, the last two bytes, is 24
    -24          "LCNNCKPT", xxh3-128 of everything up to here

Plain `torch.load(path, weights_only=True)` and Lightning's `load_from_checkpoint` read it as any other. Read here, it is believed only
if the checksum is right; a file without one (Lightning's own) is believed if the archive is exact and each of its CRCs is right.
"""

import io
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from xxhash import xxh3_128

from lightning_cnn.checkpoint._plain import plain, size_of
from lightning_cnn.errors import CheckpointError
from lightning_cnn.files import check_space, replacing

log = logging.getLogger(__name__)
MAGIC, END_RECORD, END_BYTES = b"LCNNCKPT", b"PK\x05\x06", 22
COMMENT_BYTES = len(MAGIC) + 16
CHUNK = 1 << 20
OVERHEAD = 1 << 16  # of the archive beyond its tensors, about


def save(checkpoint: Mapping[str, Any], path: str | Path, *, previous: bool = True) -> None:
    """Write `checkpoint` to a file or fsspec address, whole or not at all; `previous` keeps what stood there as `path.previous`.

    Raises:
        CheckpointError: something in it has no plain form, or the disk is full; what stood there still stands.
    """
    write(plain(checkpoint, copied=False), path, previous)


def write(checkpoint: dict[str, Any], path: str | Path, previous: bool = True) -> None:
    """`save` for a checkpoint of plain types."""
    files, place = storage(path)
    if not _is_local(files):
        return _write_remote(checkpoint, files, place, previous)
    refuse_full_disk(checkpoint, path)
    with replacing(Path(place), CheckpointError, Path(f"{place}.previous") if previous else None) as file:
        _write(checkpoint, file)
    return None


def load(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The verified checkpoint at `path`, or, with a warning, the one that stood there before it (`path.previous`).

    Raises:
        CheckpointError: neither is there and whole; the message says what is wrong with each.
    """
    wrong = []
    for place in (str(path), f"{path}.previous"):
        try:
            checkpoint = _load(place, map_location)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        if wrong:
            log.warning("%s Loaded the one before it, %s.", wrong[0], place)
        return checkpoint
    raise CheckpointError(f"{wrong[0]} There is nothing to fall back on: {wrong[1]}")


def remove(path: str | Path) -> None:
    """Remove a checkpoint and the one before it."""
    files, place = storage(path)
    for name in (place, f"{place}.previous"):
        if files.exists(name):
            files.rm(name, recursive=True)


def refuse_full_disk(checkpoint: dict[str, Any], path: str | Path) -> None:
    files, place = storage(path)
    if _is_local(files):
        check_space(Path(place).parent, size_of(checkpoint) + OVERHEAD, CheckpointError)


def storage(path: str | Path) -> tuple[Any, str]:
    """The fsspec file system of `path` and its name there."""
    from fsspec.core import url_to_fs

    return url_to_fs(str(path))


def _is_local(files: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(files, LocalFileSystem)


def _write_remote(checkpoint: dict[str, Any], files: Any, place: str, previous: bool) -> None:
    """As `replacing`, as far as another's storage can: there may be a moment in which only `previous` exists."""
    partial = f"{place}.partial"
    files.makedirs(place.rpartition("/")[0], exist_ok=True)
    with files.open(partial, "wb") as file:
        _write(checkpoint, file)
    if files.exists(place):
        files.mv(place, f"{place}.previous") if previous else files.rm(place)
    files.mv(partial, place)


def _write(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    signed = _Signed(file)
    try:
        torch.save(checkpoint, signed)  # pyright: ignore[reportArgumentType]  # it asks for `write` and `flush` only
    except Exception as error:
        raise signed.error or error from None
    signed.sign()


class _Signed:
    """Hashes what it passes on; holds back the last two bytes, the archive's comment length, until the end is known."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._held = file, xxh3_128(), b""
        self.error: OSError | None = None  # torch's writer turns it into another

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if len(view) < 2:
            view = memoryview(self._held + bytes(view))
        else:
            self._pass_on(self._held)
        self._pass_on(view[:-2])
        self._held = bytes(view[-2:])
        return len(data)

    def sign(self) -> None:
        self._pass_on(COMMENT_BYTES.to_bytes(2, "little") + MAGIC)
        self._file.write(self._hash.digest())

    def flush(self) -> None:
        """What is held back waits for `sign`."""

    def _pass_on(self, data: Any) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)


def _load(path: str, map_location: Any) -> dict[str, Any]:
    files, place = storage(path)
    try:
        with files.open(place, "rb") as file:
            _verify(file, path)
            file.seek(0)
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint.") from error
    except Exception as error:  # whatever a parser says of bytes that it cannot read
        raise CheckpointError(f"{path}: no checkpoint of plain types ({_first_sentence(error)}).") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, expected the dict of a checkpoint.")
    return checkpoint


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no more is said'}"


def _verify(file: BinaryIO, path: str) -> None:
    size = file.seek(0, io.SEEK_END)
    end = _tail(file, size, COMMENT_BYTES)
    if end.startswith(MAGIC):
        if _digest(file, size - 16) != end[len(MAGIC) :]:
            raise CheckpointError(f"{path}: damaged: its {size} bytes do not match their checksum.")
        _check_archive(file, path, size)
        return
    last = _tail(file, size, END_BYTES)
    if not last.startswith(END_RECORD) or last[-2:] != b"\0\0":
        raise CheckpointError(f"{path}: damaged or no checkpoint: {size} bytes that do not end as a checkpoint does.")
    broken = _check_archive(file, path, size).testzip()
    if broken is not None:
        raise CheckpointError(f"{path}: damaged: '{broken}' in it does not match its CRC.")
    log.warning("%s has no checksum of ours; the CRC of each part is right.", path)


def _check_archive(file: BinaryIO, path: str, size: int) -> zipfile.ZipFile:
    """Only parts as torch writes them: stored as they are, none twice, none larger than the file, none outside of its folder."""
    file.seek(0)
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # zipfile raises a dozen types over bytes that it cannot read
        raise CheckpointError(f"{path}: damaged: no zip archive ({_first_sentence(error)}).") from error
    parts = archive.infolist()
    names = [part.filename for part in parts]
    hostile = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size]
    hostile += [name for name in names if name.startswith("/") or ".." in name.split("/") or names.count(name) > 1]
    if hostile or sum(part.file_size for part in parts) > size:
        raise CheckpointError(f"{path}: not as torch.save writes: {', '.join(map(repr, hostile[:3])) or 'parts larger than the file'}.")
    return archive


def _tail(file: BinaryIO, size: int, count: int) -> bytes:
    file.seek(max(0, size - count))
    return file.read(count)


def _digest(file: BinaryIO, size: int) -> bytes:
    file.seek(0)
    digest = xxh3_128()
    while size > 0 and (chunk := file.read(min(CHUNK, size))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()
