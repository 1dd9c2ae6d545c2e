"""`pack`: read every picture once, slowly; store it so that it can be read for ever, fast."""

import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_cnn.data import _jpeg
from lightning_cnn.data._format import CODECS, INDEX, PAGE, Record, write
from lightning_cnn.data._sources import Item, Source, open_source
from lightning_cnn.errors import DataError, raise_all
from lightning_cnn.files import check_space

log = logging.getLogger(__name__)
ORIENTATION = 0x0112  # the EXIF tag
ON_ERROR = ("raise", "skip", "report")
FITS = ("crop", "short", "keep")


@dataclass
class PackReport:
    """What was written, and each picture that was left out with its reason."""

    paths: list[Path]
    samples: int = 0
    bytes: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def pack(
    source: Any,
    out: str | Path,
    *,
    size: int | None = 256,
    codec: Literal["raw", "jpeg"] = "raw",
    fit: Literal["crop", "short", "keep"] = "crop",
    quality: int = 90,
    shards: int = 1,
    workers: int | None = None,
    on_error: Literal["raise", "skip", "report"] = "raise",
    overwrite: bool = False,
    progress: bool = True,
) -> PackReport:
    """Store a folder of classes, a webdataset tar or a map-style dataset of (image, label) as one file, or as `shards` of them.

    `fit`: `crop` scales the shorter side to `size` and keeps the centre square (all samples alike: the fastest to read), `short`
    scales only, `keep` (or `size=None`) changes nothing; a JPEG that is kept stays byte for byte what it was. Scaling is bilinear and
    antialiased. `on_error`: `raise` stops at the first broken picture, `skip` leaves broken ones out and counts them, `report` reads on
    and then lists every one in its error, writing nothing. The same source gives the same bytes, whatever `workers` is. A file appears
    under its name complete or not at all.
    """
    raise_all(_problems(size, codec, fit, quality, shards, on_error))
    opened = open_source(source)
    if not len(opened):
        raise DataError(f"{source}: there is no sample to pack.")
    paths = shard_paths(Path(out), shards)
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{', '.join(existing)}: exists already. Choose another name, or pass overwrite=True.")
    encoder = _Encoder(opened, None if fit == "keep" else size, fit == "crop", codec, quality)
    _check_space(paths[0].parent, encoder)
    report = PackReport(paths)
    workers = max(1, (os.cpu_count() or 1) - 1) if workers is None else workers
    with _bar(progress) as bar:
        task = bar.add_task(f"packing {paths[0].name}", total=len(opened))
        for path, part in zip(paths, np.array_split(np.arange(len(opened)), shards), strict=True):
            stream = _Stream(encoder, part, workers, on_error, report, lambda: bar.advance(task))
            header = write(path, stream.records(), codec=codec, channels=encoder.channels, metadata=stream.metadata)
            report.samples, report.bytes = report.samples + header.samples, report.bytes + header.file_bytes
    log.info("packed %d samples into %d file(s), %.1f MB; left out %d", report.samples, shards, report.bytes / 1e6, len(report.skipped))
    return report


def shard_paths(out: Path, shards: int) -> list[Path]:
    """`name.pack`, or `name-00000-of-00004.pack` and so on."""
    return [out] if shards == 1 else [out.with_name(f"{out.stem}-{k:05d}-of-{shards:05d}{out.suffix}") for k in range(shards)]


def resize(image: Tensor, size: int, crop: bool) -> Tensor:
    """Scale the shorter side of a uint8 picture (c h w) to `size`, antialiased; then keep the centre square if asked."""
    height, width = image.shape[1:]
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    if shape != (height, width):
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
    if crop:
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        image = image[:, top : top + size, left : left + size]
    return image


class _Encoder(Dataset):
    """Sample i as a `Record` with the sums its mean and variance need, or the reason why not."""

    def __init__(self, source: Source, size: int | None, crop: bool, codec: str, quality: int) -> None:
        self.source, self.size, self.crop, self.codec, self.quality = source, size, crop, codec, quality
        self.channels = 3

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> "tuple[Record, np.ndarray] | tuple[str, str]":
        try:
            return self._encode(self.source.read(int(index)))
        except (OSError, RuntimeError, ValueError, SyntaxError) as error:
            return self.source.name(int(index)), str(error) or type(error).__name__

    def _encode(self, item: Item) -> tuple[Record, np.ndarray]:
        image = item.image()
        if image.shape[0] == 1:
            image = image.expand(3, -1, -1)
        height, width = image.shape[1:]
        if self.size is not None:
            image = resize(image, self.size, self.crop)
        kept = self.codec == "jpeg" and image.shape[1:] == (height, width) and _is_plain_jpeg(item.encoded)
        payload = item.encoded if kept and item.encoded else self._bytes(image)
        return Record(payload, item.label, *image.shape[1:]), _moments(image)

    def _bytes(self, image: Tensor) -> bytes:
        if max(image.shape) >= 1 << 16:
            raise DataError(f"a side of {max(image.shape)} pixels is more than the format holds (65535)")
        return _jpeg.encode(image, self.quality) if self.codec == "jpeg" else image.permute(1, 2, 0).contiguous().numpy().tobytes()


class _Stream:
    """The records of one file in order, and the metadata that is known when they have passed."""

    def __init__(self, encoder: _Encoder, part: np.ndarray, workers: int, on_error: str, report: PackReport, advance: Any) -> None:
        self._encoder, self._part, self._workers, self._on_error = encoder, part, workers, on_error
        self._report, self._advance = report, advance
        self._sums = np.zeros((3, 3))

    def records(self) -> Iterator[Record]:
        order = [int(index) for index in self._part]
        loader = DataLoader(self._encoder, None, sampler=order, num_workers=self._workers, collate_fn=_as_is)
        for record, moments in loader:
            self._advance()
            if isinstance(record, Record):
                self._sums += moments
                yield record
            elif self._on_error == "raise":
                raise DataError(f"{record}: {moments}. Remove or repair it, or pass on_error='skip'.")
            else:
                log.warning("left out %s: %s", record, moments)
                self._report.skipped.append((record, moments))
        if self._on_error == "report":
            raise_all((f"{name}: {reason}" for name, reason in self._report.skipped), DataError)

    def metadata(self) -> dict[str, Any]:
        encoder, (count, total, squares) = self._encoder, self._sums
        mean = total / np.maximum(count, 1)
        deviation = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
        return {
            "classes": encoder.source.classes,
            "resize": {"size": encoder.size, "crop": encoder.crop and encoder.size is not None, "filter": "bilinear, antialiased"},
            "mean": [round(value / 255, 6) for value in mean.tolist()],
            "std": [round(value / 255, 6) for value in deviation.tolist()],
            "fingerprint": encoder.source.fingerprint(),
        }


def _moments(image: Tensor) -> np.ndarray:
    """Pixels, their sum and the sum of their squares, by channel: whole numbers, so that no order of adding changes them."""
    histogram = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in image]).double()
    value = torch.arange(256, dtype=torch.float64)
    return torch.stack([histogram.sum(1), histogram @ value, histogram @ value**2]).numpy()


def _is_plain_jpeg(encoded: bytes | None) -> bool:
    """An upright JPEG in colour or grey; any other is encoded anew."""
    if not encoded or not encoded.startswith(b"\xff\xd8\xff"):
        return False
    with Image.open(io.BytesIO(encoded)) as image:
        return image.mode in ("RGB", "L") and image.getexif().get(ORIENTATION, 1) == 1


def _problems(size: int | None, codec: str, fit: str, quality: int, shards: int, on_error: str) -> Iterator[str]:
    if size is not None and size < 1:
        yield f"size must be at least 1 pixel, or None to keep the pictures' own; got {size}."
    if codec not in CODECS:
        yield f"codec must be one of {CODECS}, got {codec!r}."
    if fit not in FITS:
        yield f"fit must be one of {FITS}, got {fit!r}."
    if not 1 <= quality <= 100:
        yield f"quality must be from 1 to 100, got {quality}."
    if shards < 1:
        yield f"shards must be at least 1, got {shards}."
    if on_error not in ON_ERROR:
        yield f"on_error must be one of {ON_ERROR}, got {on_error!r}."


def _check_space(folder: Path, encoder: _Encoder) -> None:
    """Judge by up to 16 pictures, evenly spaced; a disk that fills up in spite of it is reported by `write`."""
    probes = [encoder[index] for index in np.unique(np.linspace(0, len(encoder) - 1, 16).astype(int))]
    sizes = [len(probe[0].payload) for probe in probes if isinstance(probe[0], Record)]
    needed = PAGE + len(encoder) * (INDEX.itemsize + int(np.mean(sizes or [0])))
    check_space(folder, needed)


def _bar(visible: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    return Progress(*columns, disable=not visible)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} pictures/s")


def _as_is(item: Any) -> Any:
    return item
