"""Loading against its peers: `python benchmarks/loading.py [--quick] [--json FILE] [--only GROUP ...] [--data FOLDER]`.

Pictures are cut from the two photographs of scikit-learn: JPEGs of 400 x 350 and about 40 KB. Every loader is the one a Trainer
would be given, with labels; peers run interleaved, in rounds, two workers each, and medians are reported. Peers that are not
installed are named. To have them all (Debian 12):

    apt install libopencv-dev libturbojpeg0-dev pkg-config libavdevice59 libavfilter8
    pip install ffcv spdl grain litdata webdataset psutil
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import _loading_peers as peers
import numpy as np
import torch
from _bench import Row, compare, interleave, medians, missing, report, seconds
from PIL import Image

WORK = "RandomResizedCrop 224, flip, normalise"


def jpegs(folder: Path, count: int) -> None:
    from sklearn.datasets import load_sample_images

    draw, photos = np.random.default_rng(0), load_sample_images().images
    for index in range(count):
        height = int(draw.integers(280, 420))
        top, left = draw.integers(0, 427 - height + 1), draw.integers(0, 640 - height * 8 // 7 + 1)
        cut = Image.fromarray(photos[index % 2][top : top + height, left : left + height * 8 // 7]).resize((400, 350))
        place = folder / "jpegs" / f"c{index % 10}"
        place.mkdir(parents=True, exist_ok=True)
        cut.save(place / f"{index:05d}.jpg", quality=93)


def packed(folder: Path) -> None:
    from lightning_cnn.data import pack

    pack(folder / "jpegs", folder / "raw.pack", size=256, progress=False)
    pack(folder / "jpegs", folder / "jpeg.pack", size=256, codec="jpeg", progress=False)
    small = np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 3), np.uint8)
    pack([(image, k % 10) for k, image in enumerate(small)], folder / "small.pack", size=None, progress=False)


def peers_data(folder: Path) -> None:
    """The same pictures in the peers' own formats; FFCV gets the same 256 px pixels."""
    files = sorted((folder / "jpegs").rglob("*.jpg"))
    (folder / "tars").mkdir()
    for shard in range(8):
        with tarfile.open(folder / "tars" / f"{shard}.tar", "w") as tar:
            for k, file in enumerate(files[shard::8]):
                for name, data in ((f"{k:05d}.jpg", file.read_bytes()), (f"{k:05d}.cls", file.parent.name[1:].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    if installed("litdata"):
        import litdata

        litdata.optimize(lit_item, [str(f) for f in files], str(folder / "litdata"), chunk_bytes="32MB", num_workers=1)
    if installed("ffcv"):
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        from lightning_cnn.data import PackedImages

        images = PackedImages(folder / "raw.pack")
        pairs = [(images.pixels(k).copy(), int(images.labels[k])) for k in range(len(images))]
        for kind in ("raw", "jpg"):
            field = RGBImageField(write_mode=kind, jpeg_quality=90)
            writer = DatasetWriter(str(folder / f"{kind}.beton"), {"image": field, "label": IntField()}, num_workers=1)
            writer.from_indexed_dataset(pairs)


def lit_item(path: str) -> dict:
    return {"image": Path(path).read_bytes(), "label": int(Path(path).parent.name[1:])}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module.split(".")[0]) is not None


def rates(
    streams: dict[str, Iterator[int]], batches: int, n: int, longer: dict[str, int] | None = None
) -> dict[str, tuple[float, float]]:
    """(pictures a second, CPU microseconds a picture) of each stream, in rounds; CPU time comes in steps of 10 ms, so a fast stream runs
    so many times `longer`.

    Workers of the streams that wait go on until their queues are full, and a stream's turn starts with what it had queued: so each turn
    first waits until the others have settled, then empties its own queue, unmeasured.
    """
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in streams}
    for _ in range(n + 1):
        for name, stream in streams.items():
            settle()
            peers.take(stream, 5)
            start, cpu = time.perf_counter(), cpu_seconds()
            count = peers.take(stream, batches * (longer or {}).get(name, 1))
            results[name].append((count / (time.perf_counter() - start), (cpu_seconds() - cpu) / count * 1e6))
    return {name: (median(rate for rate, _ in values[1:]), median(cost for _, cost in values[1:])) for name, values in results.items()}


def settle() -> None:
    """Until nobody works any more; no longer than 4 s."""
    for _ in range(40):
        before = cpu_seconds()
        time.sleep(0.1)
        if cpu_seconds() - before < 0.03:
            return


def both(
    row: str, peer: str, ours: tuple[float, float], theirs: tuple[float, float], bar: float | None, n: int, cpu_bar: float | None = None
) -> list[Row]:
    """Pictures a second decide; CPU time says the same on a machine that is shared."""
    return [
        compare(row, peer, ours[0], theirs[0], "img/s", larger_is_better=True, bar=bar, n=n),
        compare(f"{row} (CPU time)", peer, ours[1], theirs[1], "us/img", larger_is_better=False, bar=cpu_bar, n=n),
    ]


def cpu_seconds() -> float:
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(p.cpu_times()[:2]) for p in processes)


def raw(folder: Path, batches: int, n: int) -> list[Row]:
    row, streams = f"raw 256: {WORK}", {"ours": peers.ours(folder / "raw.pack"), "off": peers.ours(folder / "raw.pack", verify="off")}
    if installed("ffcv"):
        streams["FFCV raw"] = peers.ffcv(folder, "raw")
    got = rates(streams, batches, n, {"ours": 4, "off": 4})
    rows = both("verify=sample, after each first reading", "verify=off", got["ours"], got["off"], 0.95, n)
    if "FFCV raw" not in got:
        return [*rows, missing(row, "FFCV raw", peers.INSTALL["ffcv"])]
    return [*both(row, "FFCV raw", got["ours"], got["FFCV raw"], 2.5, n), *rows, *verification(folder, n)]


def verification(folder: Path, n: int) -> list[Row]:
    """One pass over a file that has just been opened, every checksum included, against the same without."""
    from lightning_cnn.data import PackedDataModule

    def one_pass(lane: str, verify: str) -> float:
        module = PackedDataModule(train=folder / "raw.pack", lane=lane, size=224 if lane == "fused" else None, threads=2, verify=verify)
        start = time.process_time()
        for _ in module.loader("train", shuffle=True):
            pass
        return time.process_time() - start

    rows = []
    for lane in ("fused", "gather"):
        got = medians(interleave({verify: partial(one_pass, lane, verify) for verify in ("sample", "off")}, n))
        row = f"verify=sample, first pass, lane {lane} (CPU time)"
        rows.append(compare(row, "verify=off", got["sample"], got["off"], "s", larger_is_better=False, bar=0.95, n=n))
    return rows


def jpeg(folder: Path, batches: int, n: int) -> list[Row]:
    row, streams = f"JPEG 256: {WORK}", {"ours": peers.ours(folder / "jpeg.pack")}
    if not installed("ffcv"):
        return [missing(row, "FFCV jpg", peers.INSTALL["ffcv"])]
    got = rates({**streams, "FFCV jpg": peers.ffcv(folder, "jpg")}, batches, n)
    return both(row, "FFCV jpg", got["ours"], got["FFCV jpg"], 1.5, n)


FILES = {
    "torchvision v2 + DataLoader": ("torchvision", peers.torchvision_v2),
    "DALI (CPU)": ("nvidia.dali", peers.dali),
    "SPDL": ("spdl.io", peers.spdl),
}
STREAMS = {
    "grain": ("grain", peers.grain),
    "litdata": ("litdata", peers.litdata),
    "webdataset": ("webdataset", peers.webdataset),
}


def against(menu: dict, folder: Path, batches: int, n: int) -> list[Row]:
    """Packed pictures against the same pictures as JPEGs, in files or in the peer's own format."""
    row = f"raw 256 against JPEGs: {WORK}"
    present = {name: make(folder) for name, (module, make) in menu.items() if installed(module)}
    longer = {"ours": 12, "grain": 12}  # one is fast, the other's queues would outlast a turn
    got = rates({"ours": peers.ours(folder / "raw.pack"), **present}, max(batches // 3, 1), n, longer)
    bars = {"torchvision v2 + DataLoader": 15.0}
    rows = [line for name in present for line in both(row, name, got["ours"], got[name], bars.get(name), n)]
    return rows + [missing(row, name, peers.INSTALL[module]) for name, (module, _) in menu.items() if name not in present]


def files(folder: Path, batches: int, n: int) -> list[Row]:
    return against(FILES, folder, batches, n)


def streams(folder: Path, batches: int, n: int) -> list[Row]:
    return against(STREAMS, folder, batches, n)


def folders(folder: Path, batches: int, n: int) -> list[Row]:
    """The folder itself, decoded anew each epoch, as a Trainer gets it and as torchvision reads it."""
    streams = {"ours": peers.image_folders(folder), "theirs": peers.image_folder(folder)}
    got = rates(streams, 2 * batches, n)
    return both("ImageFolders: JPEGs to uint8 at 224 px", "torchvision ImageFolder + DataLoader", got["ours"], got["theirs"], None, n)


def opened(folder: Path, batches: int, n: int) -> list[Row]:
    """A file of a million records, opened with all checksums of header, metadata and index."""
    from lightning_cnn.data._format import INDEX, PAGE, Packed, _header

    index, path = np.zeros(1_000_000, INDEX), folder / "million.pack"
    index["offset"], index["length"], index["height"], index["width"] = PAGE + 3 * np.arange(len(index)), 3, 1, 1
    header = _header(index, b"{}", 3 * len(index), 0, 3)
    with path.open("wb") as file:
        for place, data in ((0, header.pack()), (header.metadata_offset, b"{}"), (header.index_offset, index.tobytes())):
            file.seek(place)
            file.write(data)
    took = median(seconds(lambda: Packed(path)) for _ in range(3 * n))
    path.unlink()
    return [compare("open a million records", "the bar", 1e3 * took, 50, "ms", larger_is_better=False, bar=1, n=3 * n)]


def gather(folder: Path, batches: int, n: int) -> list[Row]:
    """Bytes delivered a second against torch's copy of the same bytes with the same number of threads."""
    # Written once, so that they are memory and not the one page of zeros; together larger than the last cache.
    sources, targets = (torch.randint(0, 256, (8, peers.BATCH, 256 * 256 * 3), dtype=torch.uint8) for _ in range(2))

    def copies() -> Iterator[int]:
        torch.set_num_threads(peers.WORKERS)
        while True:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)
                yield peers.BATCH

    got = rates({"ours": peers.ours(folder / "raw.pack", lane="gather", size=None), "memcpy": copies()}, batches * 4, n)
    torch.set_num_threads(1)
    ours, theirs = (256 * 256 * 3 / 1e9 * got[name][0] for name in ("ours", "memcpy"))
    peer = f"memcpy, {peers.WORKERS} threads"
    return [compare("gather: uint8 256 px batches", peer, ours, theirs, "GB/s", larger_is_better=True, bar=0.75, n=n)]


def small(folder: Path, batches: int, n: int) -> list[Row]:
    """CPU time, not wall time: what is left for the training."""
    from lightning_cnn.data import PackedImages

    images = PackedImages(folder / "small.pack")
    arrays = np.stack([images.pixels(k) for k in range(len(images))])
    streams = {
        "ours": peers.ours(folder / "small.pack", size=None, crop="padded", batch_size=512),
        "theirs": peers.small_pil(arrays, images.labels),
    }
    got = rates(streams, 2 * batches, n, {"ours": 20})
    return both("32 x 32: padded crop, flip, normalise", "DataLoader + PIL", got["ours"], got["theirs"], None, n, 50.0)


FRESH = """
import time, resource, sys
import torch, lightning_cnn.data as d
from pathlib import Path
def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1e3
d.PackedDataModule, d.PackedImages
import lightning_cnn.data._lanes
before, start = private(), time.perf_counter()
module = d.PackedDataModule(train=sys.argv[1], lane="fused", size=224, threads=2, batch_size=int(sys.argv[2]))
batches = iter(module.loader("train", shuffle=True))
next(batches)
first, peak = time.perf_counter() - start, 0
for batch in batches:
    peak = max(peak, private() - before)
print(first, peak)
"""


def fresh(folder: Path, batches: int, n: int) -> list[Row]:
    """A new process each time, kernels compiled before."""
    waited, megabytes = [], []
    for batch_size in (64, 128, 128):
        command = [sys.executable, "-c", FRESH, str(folder / "raw.pack"), str(batch_size)]
        first, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        waited.append(float(first))
        megabytes.append(float(peak))
    streamed = f"peak private memory, {(folder / 'raw.pack').stat().st_size / 1e6:.0f} MB streamed"
    first = median(waited)
    return [
        compare("first batch, kernels cached", "the bar", first, 0.5, "s", larger_is_better=False, bar=1, n=3),
        compare(f"{streamed}, batch 64", "the bar", megabytes[0], 300, "MB", larger_is_better=False, bar=1, n=1),
        compare(f"{streamed}, batch 128", "the bar", max(megabytes[1:]), 300, "MB", larger_is_better=False, bar=1, n=2),
    ]


def dali(folder: Path, batches: int, n: int) -> list[Row]:
    """Our order and noise in a DALI pipeline on the CPU, against DALI's own reader and random crop."""
    row = f"DALI on the CPU: {WORK}"
    if not installed("nvidia.dali"):
        return [missing(row, "DALI's own reader", peers.INSTALL["nvidia.dali"])]
    streams = {
        "folder": peers.dali_folder(folder),
        "packed": peers.ours(folder / "raw.pack", lane="dali"),
        "theirs": peers.dali(folder),
    }
    got = rates(streams, batches, n)
    folder_rows = both(f"DALIFolder, {row}", "DALI's own reader", got["folder"], got["theirs"], None, n)
    return [*folder_rows, *both(f"lane=dali, raw 256, {row}", "DALI's own reader of JPEGs", got["packed"], got["theirs"], None, n)]


GROUPS = {
    "raw": raw, "jpeg": jpeg, "files": files, "folders": folders,
    "streams": streams, "gather": gather, "small": small, "opened": opened, "fresh": fresh,
    "dali": dali,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--data", help="keep the prepared pictures here")
    parser.add_argument("--prepare", action="store_true", help="prepare the pictures and stop")
    options = parser.parse_args()
    folder = Path(options.data or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "ready").exists() and (options.prepare or set(options.only) - {"opened"}):
        jpegs(folder, 400 if options.quick else 2000)
        packed(folder)
        peers_data(folder)
        (folder / "ready").touch()
    if options.prepare:
        return
    rows = [row for name in options.only for row in GROUPS[name](folder, 2 if options.quick else 6, 2 if options.quick else 5)]
    report(rows, options.json)
    sys.stdout.flush()
    os._exit(0)  # peers' workers do not all end by themselves


if __name__ == "__main__":
    main()
