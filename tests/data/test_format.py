"""The packed file: read by somebody else, written whole, and never believed."""

import json
import os
import random
import signal
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from xxhash import xxh3_64_intdigest

from lightning_cnn.data import PackedImages, _jpeg
from lightning_cnn.data._format import HEADER_BYTES, INDEX, PAGE, Packed, Record, replacing, write
from lightning_cnn.data._format import _header as format_header
from lightning_cnn.errors import DataError


def pixels(index, height=4, width=6):
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)


def records(samples=5, **size):
    return (Record(pixels(i, **size).tobytes(), i % 3, *pixels(i, **size).shape[:2]) for i in range(samples))


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "x.pack"
    write(path, records(), codec="raw", channels=3, metadata={"classes": ["ä", "b", "c"]})
    return path


def independent_reader(path):
    """Written from the card alone: struct and numpy, nothing of ours."""
    data = path.read_bytes()
    magic, version, codec, channels, height, width, header_bytes = struct.unpack("<8s6I", data[:32])
    samples, payload, payload_bytes, metadata, metadata_bytes, index, index_bytes, file_bytes = struct.unpack("<8Q", data[32:96])
    metadata_checksum, index_checksum = struct.unpack("<2Q", data[96:112])
    assert (magic, version, codec, header_bytes, payload, file_bytes) == (b"LCNNPACK", 1, 0, 128, 4096, len(data))
    assert struct.unpack("<Q", data[120:128])[0] == xxh3_64_intdigest(data[:120])
    assert metadata_checksum == xxh3_64_intdigest(data[metadata : metadata + metadata_bytes])
    assert index_checksum == xxh3_64_intdigest(data[index : index + index_bytes])
    assert payload_bytes == samples * height * width * channels
    pictures = []
    for i in range(samples):
        offset, checksum, label, length, rows, columns = struct.unpack_from("<QQqIHH", data, index + 32 * i)
        stored = data[offset : offset + length]
        assert checksum == xxh3_64_intdigest(stored)
        pictures.append((np.frombuffer(stored, np.uint8).reshape(rows, columns, channels), label))
    return json.loads(data[metadata : metadata + metadata_bytes]), pictures


def test_an_independent_reader_finds_every_pixel(packed):
    metadata, pictures = independent_reader(packed)
    assert metadata == {"classes": ["ä", "b", "c"]}
    for i, (picture, label) in enumerate(pictures):
        assert np.array_equal(picture, pixels(i))
        assert label == i % 3


def test_pictures_of_different_sizes_share_a_file(tmp_path):
    shapes = [(3, 5), (7, 2), (1, 1)]
    rows = (Record(bytes(h * w * 3), 0, h, w) for h, w in shapes)
    write(tmp_path / "x.pack", rows, codec="raw", channels=3, metadata={})
    images = PackedImages(tmp_path / "x.pack")
    assert [tuple(image.shape[1:]) for image, _ in images] == shapes
    assert images.shape is None


def outcome(path):
    """How reading every sample ends: 'same' pixels or a typed error."""
    try:
        images = PackedImages(path)
        same = all(np.array_equal(images.pixels(i), pixels(i)) and images.labels[i] == i % 3 for i in range(5)) and len(images) == 5
        return "same" if same and images.classes == ["ä", "b", "c"] else "WRONG"
    except DataError as error:
        assert str(path) in str(error)
        assert "damaged at byte" in str(error)
        return "refused"


def test_a_truncated_file_is_refused_at_every_length(packed, tmp_path):
    whole, cut = packed.read_bytes(), tmp_path / "cut.pack"
    index = Packed(packed).header.index_offset
    lengths = [*range(0, HEADER_BYTES + 1), *range(HEADER_BYTES, index - 300, 97), *range(index - 300, len(whole))]
    for length in lengths:
        cut.write_bytes(whole[:length])
        assert outcome(cut) == "refused", length
    cut.write_bytes(whole + b"\0")
    assert outcome(cut) == "refused"


def test_ten_thousand_flipped_bits_give_no_wrong_sample(packed, tmp_path):
    """Only the zeros that pad the header and align the index may change unnoticed, and nothing is read from them."""
    whole, draw, damaged = packed.read_bytes(), random.Random(0), tmp_path / "damaged.pack"
    header = Packed(packed).header
    padding = {*range(HEADER_BYTES, PAGE), *range(header.metadata_offset + header.metadata_bytes, header.index_offset)}
    places = [place for place in range(len(whole)) if place not in padding]
    damaged.write_bytes(whole)
    with damaged.open("r+b", buffering=0) as file:
        for flip in range(10_000):
            place = draw.choice(places) if flip % 10 else draw.choice([*padding])
            change(file, place, whole[place] ^ 1 << draw.randrange(8))
            assert outcome(damaged) == ("same" if place in padding else "refused"), place
            change(file, place, whole[place])


def change(file, place, value):
    file.seek(place)
    file.write(bytes([value]))


HOSTILE = (0, 1, 2, 7, 255, 4095, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def with_header(data, offset, code, value):
    """The file with one number of the header replaced and the header's checksum made to fit."""
    size = struct.calcsize(code)
    data[offset : offset + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    data[120:128] = struct.pack("<Q", xxh3_64_intdigest(bytes(data[:120])))
    return bytes(data)


def with_index(data, header, entry, offset, size, value):
    """The file with one number of an index entry replaced and all checksums made to fit."""
    place = header.index_offset + 32 * entry + offset
    data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    table = bytes(data[header.index_offset : header.index_offset + header.index_bytes])
    return with_header(data, 104, "<Q", xxh3_64_intdigest(table))


def test_a_thousand_hostile_numbers_with_valid_checksums_are_harmless(packed, tmp_path):
    """Whoever can write checksums can write a label or a picture; no number makes us crash, hang, or allocate."""
    whole, draw, path = packed.read_bytes(), random.Random(1), tmp_path / "hostile.pack"
    header, ends = Packed(packed).header, set()
    tracemalloc.start()
    for attempt in range(1000):
        value = draw.choice(HOSTILE) + draw.choice((-1, 0, 1)) if draw.random() < 0.7 else draw.getrandbits(64)
        if attempt % 2:
            offset = draw.choice([*range(8, 32, 4), *range(32, 112, 8)])
            path.write_bytes(with_header(bytearray(whole), offset, "<I" if offset < 32 else "<Q", value))
        else:
            offset, size = draw.choice([(0, 8), (8, 8), (24, 4), (28, 2), (30, 2)])
            path.write_bytes(with_index(bytearray(whole), header, draw.randrange(5), offset, size, value))
        ends.add(outcome(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ends <= {"same", "refused"}
    assert peak < 2 << 20


def test_a_jpeg_that_claims_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    bomb = bytearray(_jpeg.encode(torch.zeros(3, 8, 8, dtype=torch.uint8), 90))
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    write(tmp_path / "x.pack", iter([Record(bytes(bomb), 0, 65000, 65000)]), codec="jpeg", channels=3, metadata={})
    with pytest.raises(DataError, match=r"damaged at byte 4096: sample 0: a JPEG of \d+ bytes and \(65000, 65000\) pixels"):
        PackedImages(tmp_path / "x.pack")[0]


def test_a_killed_writer_leaves_no_final_name_and_the_next_one_succeeds(tmp_path):
    path, survived = tmp_path / "x.pack", 0
    for attempt in range(30):
        child = os.fork()
        if child == 0:
            write(path, slow_records(), codec="raw", channels=3, metadata={"classes": ["ä", "b", "c"]})
            os._exit(0)
        time.sleep(0.0015 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            survived += 1
            assert outcome(path) == "same"
            path.unlink()
    assert survived < 30
    write(path, records(), codec="raw", channels=3, metadata={"classes": ["ä", "b", "c"]})
    assert outcome(path) == "same"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pack"]


def slow_records():
    for record in records():
        time.sleep(0.002)
        yield record


def test_a_failing_source_leaves_the_old_file_as_it_was(packed):
    def failing():
        yield from records(2)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write(packed, failing(), codec="raw", channels=3, metadata={})
    assert outcome(packed) == "same"
    assert [entry.name for entry in packed.parent.iterdir()] == ["x.pack"]


def test_two_writers_of_one_name_are_kept_apart(tmp_path):
    with replacing(tmp_path / "x.pack"), pytest.raises(DataError, match=r"x\.pack: another process is writing it"):
        write(tmp_path / "x.pack", records(), codec="raw", channels=3, metadata={})


def sparse(path, samples):
    """A packed file whose payload is a hole."""
    index = np.zeros(samples, INDEX)
    index["offset"], index["length"], index["height"], index["width"] = PAGE + 3072 * np.arange(samples), 3072, 32, 32
    header = format_header(index, b"{}", 3072 * samples, 0, 3)
    with path.open("wb") as file:
        for place, data in ((0, header.pack()), (header.metadata_offset, b"{}"), (header.index_offset, index.tobytes())):
            file.seek(place)
            file.write(data)
    return path


def calls(function):
    """How many functions a call takes, those of C included."""
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_a_million_records_open_at_once(tmp_path):
    """As many calls as for a thousand, and no memory but a page or two: what it costs in time is two passes of compiled code."""
    few, many = sparse(tmp_path / "few.pack", 1000), sparse(tmp_path / "many.pack", 1_000_000)
    Packed(few)
    assert calls(lambda: Packed(many)) == calls(lambda: Packed(few))
    tracemalloc.start()
    Packed(many)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 10
