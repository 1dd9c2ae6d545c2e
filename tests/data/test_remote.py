"""Shards at URLs: the same batches as from files, in bounded space, whatever the network and the disk do."""

import errno
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import torch

from lightning_cnn.data import PackedDataModule, PackedImages, _remote, pack
from lightning_cnn.data._format import PAGE
from lightning_cnn.errors import ConfigurationError, DataError

SAMPLES, SHARDS, SIDE = 60, 6, 24
PAYLOAD = SAMPLES // SHARDS * SIDE * SIDE * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("source")
    pictures = [(torch.from_numpy(np.random.default_rng(i).integers(0, 256, (3, SIDE, SIDE), np.uint8)), i % 3) for i in range(SAMPLES)]
    pack(pictures, place / "x.pack", size=None, shards=SHARDS, progress=False, workers=0)
    return place


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(_remote, "PAUSE_S", 0.0)


class Server(BaseHTTPRequestHandler):
    """Answers ranges; the next `failures` answers stop halfway."""

    folder, failures, served = None, 0, 0

    def do_HEAD(self):
        self.answer(b"", len(self.content()))

    def do_GET(self):
        data, wanted = self.content(), self.headers.get("Range")
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
        self.answer(data, len(data))

    def content(self):
        return (self.folder / self.path[1:]).read_bytes()

    def answer(self, data, length):
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        cls = type(self)
        cls.served += len(data)
        if data and cls.failures:
            cls.failures, data = cls.failures - 1, data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(folder):
    handler = type("Handler", (Server,), {"folder": folder, "failures": 0, "served": 0})
    served = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield handler, [f"http://127.0.0.1:{served.server_port}/{path.name}" for path in sorted(folder.iterdir())]
    served.shutdown()


def module(train, place, shards_kept=SHARDS, **options):
    options = {"cache_folder": place, "cache_gb": shards_kept * PAYLOAD / 1e9, "lane": "gather", "batch_size": 7, "seed": 1, **options}
    return PackedDataModule(train=train, **options)


def batches(data):
    return [(batch.image.clone(), batch.label, batch.index) for batch in data.loader("train", shuffle=True)]


def assert_same(some, others):
    assert len(some) == len(others)
    assert all(torch.equal(a, b) for one, other in zip(some, others, strict=True) for a, b in zip(one, other, strict=True))


def used(place):
    """Bytes on the disk, holes excluded."""
    return sum(path.stat().st_blocks * 512 for path in place.rglob("*.pack"))


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
@pytest.mark.parametrize("lane", ["gather", "fused", "dali"])
def test_urls_give_the_batches_of_the_files(folder, tmp_path, lane, order):
    options = {"lane": lane, "order": order, "window": 2}
    expected = batches(module(f"{folder}/x-*.pack", tmp_path, **options))
    assert_same(batches(module(f"file://{folder}/x-*.pack", tmp_path, **options)), expected)


def test_memory_and_http_are_read_in_bounded_space(folder, tmp_path, server):
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe_file(f"/{folder.name}/{path.name}", path.read_bytes())
    expected = batches(module(f"{folder}/x-*.pack", tmp_path, order="windowed", window=1))
    for name, urls in (("memory", f"memory://{folder.name}/x-*.pack"), ("http", server[1])):
        data = module(urls, tmp_path / name, shards_kept=2, order="windowed", window=1)
        loader, seen, most = data.loader("train", shuffle=True), [], 0
        for batch in loader:
            seen.append((batch.image.clone(), batch.label, batch.index))
            most = max(most, used(tmp_path / name))
        assert_same(seen, expected)
        assert most <= 2 * PAYLOAD + SHARDS * 5 * PAGE
        assert_same(batches(data), expected) if name == "memory" else None


def test_the_windowed_order_has_every_sample_once_and_few_shards_at_a_time(folder, tmp_path):
    options = {"order": "windowed", "window": 2, "batch_size": 10}
    first, second = (
        torch.cat([index for *_, index in batches(module(f"{folder}/x-*.pack", tmp_path, seed=k, **options))]) for k in (1, 2)
    )
    assert sorted(first.tolist()) == list(range(SAMPLES))
    assert not torch.equal(first, second)
    assert all(len({int(i) // 10 for i in first[start : start + 20]}) == 2 for start in range(0, SAMPLES, 20))


def test_a_server_that_drops_connections_is_asked_again(tmp_path, server, folder):
    handler, urls = server
    data = module(urls, tmp_path, shards_kept=2, order="windowed", window=1)
    loader, doomed = data.loader("train", shuffle=True), module(urls, tmp_path).loader("train", shuffle=True)
    handler.failures = 3
    got = [(batch.image.clone(), batch.label, batch.index) for batch in loader]
    assert handler.failures == 0
    assert_same(got, batches(module(f"{folder}/x-*.pack", tmp_path, order="windowed", window=1)))
    handler.failures = 10**6
    with pytest.raises(DataError, match=r"http://127.*could not be fetched .*no answer in 5 attempts"):
        next(iter(doomed))


def test_a_sample_that_is_wrong_at_the_source_never_arrives(folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    victim = source / f"x-00003-of-0000{SHARDS}.pack"
    data = bytearray(victim.read_bytes())
    data[PAGE + 2 * SIDE * SIDE * 3] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DataError, match=r"x-00003-of-00006\.pack: could not be fetched .*sample 2 does not match"):
        batches(module(f"file://{source}/x-*.pack", tmp_path / "cache"))


def test_what_an_earlier_run_left_is_used_if_it_is_whole(tmp_path, server):
    handler, urls = server
    expected = batches(module(urls, tmp_path))
    first, handler.served = handler.served, 0
    assert_same(batches(module(urls, tmp_path)), expected)
    assert handler.served <= SHARDS * PAGE < first
    one, two, three = sorted(tmp_path.rglob("*.pack"))[:3]
    with one.open("r+b") as file:
        file.truncate(PAGE + 100)
    with two.open("r+b") as file:
        file.seek(PAGE + 50)
        file.write(b"damage")
    three.write_bytes(b"another file")
    assert_same(batches(module(urls, tmp_path)), expected)


def test_a_full_disk_is_named(folder, tmp_path, monkeypatch):
    data = module(f"file://{folder}/x-*.pack", tmp_path)
    loader = data.loader("train", shuffle=True)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match="the disk of the cache is full"):
        next(iter(loader))
    monkeypatch.undo()
    assert len(list(loader)) == len(loader)


def test_what_cannot_fit_is_refused_before_it_is_fetched(folder, tmp_path):
    url = f"file://{folder}/x-*.pack"
    refused = pytest.raises(ConfigurationError, match=r"reads shards of .* GB at a time, and the cache holds")
    for order in ({"order": "shuffled"}, {"weights": [1] * SAMPLES}, {"order": "windowed", "window": 2, "batch_size": 9}):
        with refused:
            module(url, tmp_path, shards_kept=2, **order).setup("fit")
    module(url, tmp_path, shards_kept=2, subset=range(5, 15)).setup("fit")
    assert not list(tmp_path.rglob("*.here"))
    images = PackedImages(url, cache_folder=tmp_path, cache_gb=2 * PAYLOAD / 1e9)
    assert images[0][1] == 0
    with pytest.raises(DataError, match=r"do not fit into a cache of .*order='windowed'"):
        [images[k] for k in range(SAMPLES)]
    with pytest.raises(ConfigurationError, match="either all at URLs or all in files"):
        PackedImages([url, folder / f"x-00000-of-0000{SHARDS}.pack"])
    with pytest.raises(DataError, match="no such file"):
        PackedImages("memory://nowhere/x.pack", cache_folder=tmp_path)


def test_an_abandoned_pass_ends_its_thread_and_another_may_begin(folder, tmp_path):
    loader = module(f"file://{folder}/x-*.pack", tmp_path, shards_kept=2, order="windowed", window=1).loader("train", True)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(DataError, match="one iteration at a time"):
        next(iter(loader))
    iterator.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "shards"] == []
    assert len(list(loader)) == len(loader)


def test_two_users_of_a_cache_do_not_meet(folder, tmp_path):
    url = f"file://{folder}/x-*.pack"
    one, two = (PackedImages(url, cache_folder=tmp_path) for _ in range(2))
    assert torch.equal(one[7][0], two[7][0])
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_a_copy_of_a_dataset_has_a_cache_of_its_own(folder, tmp_path):
    images = PackedImages(f"file://{folder}/x-*.pack", cache_folder=tmp_path, cache_gb=1)
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(copy[7][0], images[7][0])
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_the_device_cache_delivers_what_the_gather_lane_delivers(folder, tmp_path):
    expected = batches(module(f"{folder}/x-*.pack", tmp_path))
    for train in (f"{folder}/x-*.pack", f"file://{folder}/x-*.pack"):
        data = module(train, tmp_path, shards_kept=2, cache="device", lane="auto")
        assert_same(batches(data), expected)
    with pytest.raises(ConfigurationError, match="cache='device' keeps stored pictures"):
        module(train, tmp_path, cache="device", lane="fused").setup("fit")
