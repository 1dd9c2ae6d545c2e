"""The packed file, byte by byte: how it is laid out, written whole or not at all, and opened without believing a byte of it.

    0        header, 128 bytes, little-endian, its last 8 the xxh3-64 of the others; zeros up to 4096
    4096     payload: the samples one after another
    ...      metadata: UTF-8 JSON (classes, resize policy, mean, std, fingerprint of the source)
    ...      index, 8-byte aligned: 32 bytes a sample

Everything that is not in the header is reached through it, so a file is readable as soon as its header is there; the header is written
last, into a file that has its final name only after everything has reached the disk.
"""

import json
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from lightning_cnn.errors import DataError
from lightning_cnn.files import replacing
from lightning_cnn.kernels.checksum import SHORT, first_wrong
from lightning_cnn.kernels.index import first_impossible

MAGIC, VERSION, PAGE = b"LCNNPACK", 1, 4096
CODECS = ("raw", "jpeg")
HEADER = struct.Struct("<8s6I10Q8x")  # without its checksum
HEADER_BYTES = HEADER.size + 8
INDEX = np.dtype([("offset", "<u8"), ("checksum", "<u8"), ("label", "<i8"), ("length", "<u4"), ("height", "<u2"), ("width", "<u2")])
METADATA_LIMIT = 64 << 20


@dataclass(frozen=True)
class Header:
    """Offsets are from the start of the file, lengths in bytes; `height` and `width` are 0 when samples differ in size."""

    magic: bytes
    version: int
    codec: int
    channels: int
    height: int
    width: int
    header_bytes: int
    samples: int
    payload_offset: int
    payload_bytes: int
    metadata_offset: int
    metadata_bytes: int
    index_offset: int
    index_bytes: int
    file_bytes: int
    metadata_checksum: int
    index_checksum: int

    def pack(self) -> bytes:
        body = HEADER.pack(*astuple(self))
        return body + struct.pack("<Q", xxh3_64_intdigest(body))


@dataclass(frozen=True)
class Record:
    """One sample on its way into a file."""

    payload: bytes
    label: int
    height: int
    width: int


class Packed:
    """An opened file: `header`, `metadata`, `index` (a structured array) and `payload` (bytes), all views of one read-only mapping."""

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        self.mapping = map_file(self.path)
        self.bytes = np.frombuffer(self.mapping, np.uint8)
        self.header = read_header(self.path, self.bytes)
        h = self.header
        metadata = self._part("metadata", h.metadata_offset, h.metadata_bytes, h.metadata_checksum if verify else None)
        index = self._part("index", h.index_offset, h.index_bytes, h.index_checksum if verify else None)
        self.metadata = self._read_metadata(metadata)
        self.index = index.view(INDEX)
        self._check_index()

    @property
    def codec(self) -> str:
        return CODECS[self.header.codec]

    def sample(self, position: int) -> np.ndarray:
        """The stored bytes of one sample; nothing is copied."""
        entry = self.index[position]
        start = int(entry["offset"])
        return self.bytes[start : start + int(entry["length"])]

    def check_sample(self, position: int) -> None:
        """Compare one sample's bytes with its checksum."""
        if xxh3_64_intdigest(self.sample(position).data) != int(self.index[position]["checksum"]):
            self._fail(f"sample {position} does not match its checksum", int(self.index[position]["offset"]))

    def _part(self, name: str, offset: int, size: int, checksum: int | None) -> np.ndarray:
        part = self.bytes[offset : offset + size]
        if checksum is not None and xxh3_64_intdigest(part.data) != checksum:
            self._fail(f"the {name} does not match its checksum", offset)
        return part

    def _read_metadata(self, part: np.ndarray) -> dict[str, Any]:
        try:
            metadata = json.loads(part.tobytes().decode())
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: the metadata at byte {self.header.metadata_offset} is no JSON ({error}).") from error
        if not isinstance(metadata, dict):
            self._fail("the metadata is no JSON object", self.header.metadata_offset)
        return metadata

    def _check_index(self) -> None:
        """Every sample lies inside the payload and, if raw, is as long as its picture."""
        h, words = self.header, self.index.view("<u8").reshape(-1, INDEX.itemsize // 8)
        numbers = (h.payload_offset, h.payload_offset + h.payload_bytes, h.channels, h.codec == 0, h.height, h.width)
        first = first_impossible(words, *map(np.uint64, numbers))
        if first >= 0:
            self._fail(f"index entry {first} is impossible: {self.index[first]}", h.index_offset + first * INDEX.itemsize)

    def _fail(self, what: str, offset: int) -> None:
        raise DataError(f"{self.path}: damaged at byte {offset}: {what}. Pack the source again, or fetch the file again.")


def map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < PAGE:
                raise DataError(f"{path}: damaged at byte {size}: a packed file has at least {PAGE} bytes.")
            return mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}.") from error


def read_header(path: Path, file: np.ndarray) -> Header:
    raw = file[:HEADER_BYTES].tobytes()
    if raw[: len(MAGIC)] != MAGIC:
        raise DataError(f"{path}: damaged at byte 0: not a packed file (it starts with {raw[:8]!r}, expected {MAGIC!r}).")
    if xxh3_64_intdigest(raw[: HEADER.size]) != struct.unpack("<Q", raw[HEADER.size :])[0]:
        raise DataError(f"{path}: damaged at byte 0: the header does not match its checksum. Pack the source again.")
    header = Header(*HEADER.unpack(raw[: HEADER.size]))
    problems = _header_problems(header, len(file))
    if problems:
        raise DataError(f"{path}: damaged at byte 0: the header is impossible: " + "; ".join(problems) + ".")
    return header


def _header_problems(h: Header, size: int) -> Iterator[str] | list[str]:
    if h.version != VERSION:
        return [f"version {h.version}, this release reads {VERSION}"]
    checks = {
        f"{size} bytes long, should be {h.file_bytes}": h.file_bytes == size,
        f"codec {h.codec}": h.codec < len(CODECS),
        f"{h.channels} channels": h.channels in (1, 3),
        f"picture size {h.height} x {h.width}": (h.height == 0) == (h.width == 0) and max(h.height, h.width) < 1 << 16,
        f"header of {h.header_bytes} bytes": h.header_bytes == HEADER_BYTES,
        f"{h.samples} samples": 0 < h.samples and h.index_bytes == h.samples * INDEX.itemsize,
        "payload outside of the file": PAGE <= h.payload_offset and h.payload_offset + h.payload_bytes <= size,
        "metadata outside of the file": h.metadata_bytes <= METADATA_LIMIT and h.metadata_offset + h.metadata_bytes <= size,
        "index outside of the file": h.index_offset % 8 == 0 and h.index_offset + h.index_bytes <= size,
    }
    return [problem for problem, fine in checks.items() if not fine]


def check_payload(file: Packed) -> None:
    """Compare every sample with its checksum."""
    index = file.index
    length, offset = index["length"].astype(np.int64), index["offset"].astype(np.int64)
    long = length > SHORT
    wrong = first_wrong(file.bytes, offset, (length, index["checksum"].astype(np.uint64), long))
    for position in [wrong] if wrong >= 0 else np.flatnonzero(~long):
        file.check_sample(int(position))


def write(path: str | Path, records: Iterator[Record], *, codec: str, channels: int, metadata: "dict[str, Any] | Any") -> Header:
    """Write `records` to `path`, which exists afterwards in full or, after any failure, not at all.

    `metadata` may be a function: it is called when the last record has been written (means are known only then).
    """
    with replacing(Path(path)) as file:
        file.write(bytes(PAGE))
        index, payload = [], PAGE
        for record in records:
            file.write(record.payload)
            index.append((payload, xxh3_64_intdigest(record.payload), record.label, len(record.payload), record.height, record.width))
            payload += len(record.payload)
        text = json.dumps(metadata() if callable(metadata) else metadata, sort_keys=True, ensure_ascii=False).encode()
        table = np.array(index, INDEX)
        header = _header(table, text, payload - PAGE, CODECS.index(codec), channels)
        file.write(text + bytes(header.index_offset - payload - len(text)) + table.tobytes())
        file.seek(0)
        file.write(header.pack())
    return header


def _header(table: np.ndarray, text: bytes, payload_bytes: int, codec: int, channels: int) -> Header:
    if not len(table):
        raise DataError("There is no sample to pack.")
    sizes = {(int(h), int(w)) for h, w in np.unique(table[["height", "width"]])}
    height, width = sizes.pop() if len(sizes) == 1 else (0, 0)
    metadata_offset = PAGE + payload_bytes
    index_offset = -(-(metadata_offset + len(text)) // 8) * 8
    return Header(
        magic=MAGIC, version=VERSION, codec=codec, channels=channels, height=height, width=width, header_bytes=HEADER_BYTES,
        samples=len(table), payload_offset=PAGE, payload_bytes=payload_bytes, metadata_offset=metadata_offset,
        metadata_bytes=len(text), index_offset=index_offset, index_bytes=table.nbytes, file_bytes=index_offset + table.nbytes,
        metadata_checksum=xxh3_64_intdigest(text), index_checksum=xxh3_64_intdigest(table.tobytes()),
    )  # fmt: skip


assert len(fields(Header)) == len(HEADER.unpack(bytes(HEADER.size)))
