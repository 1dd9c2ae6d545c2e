"""What can be packed: a folder of classes, a map-style dataset of (image, label), or a webdataset tar.

A source has a length and reads sample i as an `Item`; it is picklable, so that many processes can read it at once.
"""

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import pil_to_tensor
from xxhash import xxh3_64

from lightning_cnn.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LABEL_BYTES = 20


@dataclass
class Item:
    """One sample as it was found: its encoded bytes where there are any, else its pixels."""

    label: int
    encoded: bytes | None = None
    pixels: Tensor | None = None

    def image(self) -> Tensor:
        """uint8 RGB (3 h w), upright."""
        return self.pixels if self.pixels is not None else decode(self.encoded or b"")


class Source(Protocol):
    classes: list[str]

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, index: int) -> Item: ...
    def fingerprint(self) -> str: ...


SPLITS = {"train", "val", "valid", "test"}


class FolderSource:
    """`root/<class>/**/picture`, classes and pictures in sorted order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if self.classes and not set(self.classes) - SPLITS:
            raise DataError(
                f"{root} holds {' and '.join(self.classes)}, which are no classes. Give each by itself: {root / self.classes[0]}."
            )
        self._files = [
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in EXTENSIONS
        ]
        if not self._files:
            raise DataError(f"{root}: no pictures found. Expected {root}/<class>/<picture> with one of {', '.join(EXTENSIONS)}.")

    def __len__(self) -> int:
        return len(self._files)

    @property
    def labels(self) -> list[int]:
        return [label for _, label in self._files]

    def name(self, index: int) -> str:
        return str(self._files[index][0])

    def read(self, index: int) -> Item:
        file, label = self._files[index]
        return Item(label, encoded=file.read_bytes())

    def fingerprint(self) -> str:
        return _fingerprint((file.relative_to(self.root).as_posix(), file.stat().st_size, label) for file, label in self._files)


class TarSource:
    """A webdataset tar, not compressed: members of one name belong together, `.cls` holds the class number as text."""

    def __init__(self, path: Path) -> None:
        self.path, self.classes = path, []
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        stem, _, extension = member.name.partition(".")
                        samples.setdefault(stem, {})["." + extension.lower()] = member
                self._samples = [self._sample(tar, stem, parts) for stem, parts in samples.items()]
        except DataError:
            raise
        except (tarfile.TarError, ValueError, OverflowError, OSError) as error:  # what the module raises for a damaged header
            raise DataError(f"{path}: not a whole, uncompressed tar ({error}). Unpack a compressed one, or fetch it again.") from error
        if not self._samples:
            raise DataError(f"{path}: the tar holds no samples.")

    def _sample(self, tar: tarfile.TarFile, stem: str, parts: dict[str, tarfile.TarInfo]) -> tuple[str, int, int, int]:
        picture = next((part for extension, part in parts.items() if extension in EXTENSIONS), None)
        label = tar.extractfile(parts[".cls"]) if ".cls" in parts else None
        if picture is None or label is None:
            raise DataError(f"{self.path}: sample '{stem}' has {sorted(parts)}; it needs a picture and a .cls with its class number.")
        number = label.read(LABEL_BYTES)
        if not number.strip().isdigit():
            raise DataError(f"{self.path}: the class of sample '{stem}' is a whole number as text; got {number!r}.")
        return picture.name, picture.offset_data, picture.size, int(number)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        return f"{self.path}:{self._samples[index][0]}"

    def read(self, index: int) -> Item:
        _, offset, size, label = self._samples[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            return Item(label, encoded=file.read(size))

    def fingerprint(self) -> str:
        return _fingerprint((name, size, label) for name, _, size, label in self._samples)


class DatasetSource:
    """Any map-style dataset of (image, label); an image is a PIL image, a uint8 tensor (c h w) or a uint8 array (h w c)."""

    def __init__(self, dataset: Any) -> None:
        self._dataset, self.classes = dataset, [str(name) for name in getattr(dataset, "classes", [])]

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        return f"{type(self._dataset).__name__}[{index}]"

    def read(self, index: int) -> Item:
        image, label = self._dataset[index]
        return Item(int(label), pixels=as_pixels(image))

    def fingerprint(self) -> str:
        return _fingerprint([(type(self._dataset).__name__, len(self), 0)])


def open_source(source: Any) -> Source:
    """A folder, a tar or a dataset, told apart by what it is."""
    if not isinstance(source, str | Path):
        return DatasetSource(source)
    path = Path(source)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and tarfile.is_tarfile(path):
        return TarSource(path)
    raise DataError(f"{path}: neither a folder of <class>/<picture> nor a webdataset tar.")


def decode(encoded: bytes) -> Tensor:
    """uint8 RGB (3 h w), turned upright; what torchvision does not know is left to PIL."""
    try:
        buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return decode_image(buffer, ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError):
        return _decode_with_pil(encoded)


def _decode_with_pil(encoded: bytes) -> Tensor:
    with Image.open(io.BytesIO(encoded)) as image:
        return pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))


def as_pixels(image: Any) -> Tensor:
    """uint8 (c h w) of a PIL image, tensor or array."""
    if isinstance(image, Tensor):
        pixels = image
    elif isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) if image.ndim == 3 else torch.from_numpy(image)[None]
    else:
        pixels = pil_to_tensor(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise DataError(f"expected uint8 (1 or 3, h, w), found {pixels.dtype} {tuple(pixels.shape)}: pack before converting to float")
    return pixels


def _fingerprint(rows: Iterable[tuple[str, int, int]]) -> str:
    digest = xxh3_64()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()
