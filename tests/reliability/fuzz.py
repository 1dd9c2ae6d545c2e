"""Coverage-guided fuzzing of what reads strangers' files: python tests/reliability/fuzz.py checkpoint|packed|tar SECONDS  (pip install atheris)

A crash, a hang, memory without bound or an exception of a foreign type ends it with libFuzzer's report and the input in a file.
"""

import io
import logging
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris
import numpy as np
import torch  # before the instrumentation, which would take minutes for the whole of it
from torch import _weights_only_unpickler
from xxhash import xxh3_64_intdigest

from lightning_cnn.kernels import checksum, index, jpeg, resample  # noqa: F401  (numba compiles what it finds, without the counters)

with atheris.instrument_imports(include=["lightning_cnn", "tarfile"]):
    import tarfile

    from lightning_cnn.checkpoint import _file
    from lightning_cnn.data._format import HEADER_BYTES, Packed, Record, write
    from lightning_cnn.data._sources import open_source
    from lightning_cnn.errors import CheckpointError, DataError

for function in (_weights_only_unpickler.Unpickler.load, zipfile.ZipFile._RealGetContents):  # pyright: ignore
    atheris.instrument_func(function)
logging.disable(logging.CRITICAL)
FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm"))
FILE = FOLDER / "input"


def checkpoint(data: bytes) -> None:
    with FILE.open("wb") as file:
        writer = _file._Signed(file)
        writer.write(data[:-2] + bytes(2))
        writer.sign()
    try:
        assert isinstance(_file._load(str(FILE), "cpu"), dict)
    except CheckpointError:
        return


def packed(data: bytes) -> None:
    """With the header's checksum made to fit, else nothing behind it would ever be reached."""
    body = data[: HEADER_BYTES - 8]
    FILE.write_bytes(body + struct.pack("<Q", xxh3_64_intdigest(body)) + data[HEADER_BYTES:] if len(data) > HEADER_BYTES else data)
    try:
        opened = Packed(FILE, verify=False)
        for position in range(min(len(opened.index), 8)):
            opened.sample(position).sum()
            opened.check_sample(position)
    except DataError:
        return


def tar(data: bytes) -> None:
    FILE.write_bytes(data)
    try:
        source = open_source(FILE)
        for position in range(min(len(source), 8)):
            source.read(position)
    except DataError:
        return


def seeds(name: str) -> bytes:
    if name == "checkpoint":
        buffer = io.BytesIO()
        torch.save({"state_dict": {"w": torch.arange(4.0)}, "loops": {"a": [1, None, "x", 1.5]}}, buffer)
        return buffer.getvalue()
    if name == "packed":
        rows = (Record(np.full((2, 3, 3), k, np.uint8).tobytes(), k, 2, 3) for k in range(3))
        write(FILE, rows, codec="raw", channels=3, metadata={"classes": ["a", "b"]})
        return FILE.read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, content in (("0.png", b"picture"), ("0.cls", b"1")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


if __name__ == "__main__":
    name, seconds = sys.argv[1:3]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seeds(name))
    options = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=4096", "-max_len=16384", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], globals()[name])
    atheris.Fuzz()
