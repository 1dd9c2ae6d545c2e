"""`PackedImages`: packed files as a map-style dataset for anyone's DataLoader."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from xxhash import xxh3_64_intdigest

from lightning_cnn.data import _jpeg, _shards
from lightning_cnn.data._format import Packed
from lightning_cnn.data._remote import Ahead, RemoteShards, is_url
from lightning_cnn.errors import ConfigurationError, DataError
from lightning_cnn.kernels.checksum import SHORT, first_wrong

Check = tuple[np.ndarray, np.ndarray, np.ndarray]  # of each sample: length, checksum, whether to look
Verify = Literal["open", "sample", "off"]


class PackedImages(Dataset):
    """(uint8 tensor (3 h w), label) from one packed file, or from several shards in the order given.

    `verify="sample"` compares each sample with its checksum the first time this process reads it, `"open"` only header, index and
    metadata, and `"off"` the header alone. `path` may be a list, or a pattern such as `train-*.pack`, which must find every shard. It may
    be at any URL that fsspec reads (`s3://bucket/train-*.pack`): then shards are fetched when they are needed into `cache_folder`,
    `cache_gb` at most for each process that reads, and every sample is checked when it arrives.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        verify: Verify = "sample",
        cache_folder: str | Path | None = None,
        cache_gb: float = 50.0,
    ) -> None:
        if verify not in ("open", "sample", "off"):
            raise ConfigurationError(f"verify must be 'open', 'sample' or 'off', got {verify!r}.")
        paths = _shards.expand(path)
        self._again = {"path": paths, "verify": verify, "cache_folder": cache_folder, "cache_gb": cache_gb}
        self._remote: RemoteShards | None = None
        if any(map(is_url, paths)):
            folder = Path(cache_folder or Path(tempfile.gettempdir()) / "lightning_cnn_shards")
            self._remote = RemoteShards([str(path) for path in paths], folder, int(cache_gb * 1e9))
        self.files = [Packed(path, verify=verify != "off") for path in (self._remote.paths if self._remote else paths)]
        _shards.check(path, paths, self.files)
        self.starts = np.concatenate([[0], np.cumsum([len(file.index) for file in self.files])])
        self.labels = np.concatenate([file.index["label"] for file in self.files])
        self._checked = np.full(len(self.labels), verify != "sample" or self._remote is not None)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        pixels = self.pixels(index % len(self))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(self.labels[index])

    @property
    def codec(self) -> str:
        return self.files[0].codec

    @property
    def metadata(self) -> dict[str, Any]:
        """Of the first file."""
        return self.files[0].metadata

    @property
    def classes(self) -> list[str]:
        return self.metadata.get("classes", [])

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) where all samples agree."""
        shapes = {(file.header.height, file.header.width) for file in self.files}
        shape = shapes.pop()
        return None if shapes or shape == (0, 0) else shape

    @property
    def fingerprint(self) -> int:
        """Of every sample and their order, as the checksums of the indices tell it."""
        return xxh3_64_intdigest(np.array([file.header.index_checksum for file in self.files], "<u8").tobytes()) >> 1

    @property
    def remote(self) -> RemoteShards | None:
        """What fetches shards; a process that was forked off begins anew, with a folder of its own."""
        if self._remote is not None and self._remote.process != os.getpid():
            self.__setstate__(self.__getstate__())
        return self._remote

    def locate(self, index: int) -> tuple[Packed, int]:
        """The file that holds a sample, and its position there."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        self.bring([shard])
        return self.files[shard], index - int(self.starts[shard])

    def shards(self, indices: np.ndarray) -> np.ndarray:
        """Which files hold some samples, in the order of their first use."""
        shard = np.searchsorted(self.starts, indices % len(self), side="right") - 1
        return shard[np.sort(np.unique(shard, return_index=True)[1])]

    def bring(self, shards: Iterable[int]) -> None:
        """Fetch those of some files that are not here."""
        remote = self.remote
        if remote is not None:
            for shard in shards:
                remote.require(int(shard))

    def fetched(self, plan: Sequence[np.ndarray], parts: Sequence[int]) -> AbstractContextManager[Ahead | None]:
        """Fetch ahead for batches of these samples, each of which is read in so many parts."""
        remote = self.remote
        return nullcontext() if remote is None else remote.passing([self.shards(indices) for indices in plan], parts)

    def by_file(self, indices: np.ndarray) -> Iterator[tuple[Packed, np.ndarray, np.ndarray]]:
        """(file, positions within `indices`, index entries) for each file that holds some of them."""
        if len(self.files) == 1:
            yield self.files[0], np.arange(len(indices)), self.files[0].index[indices]
            return
        shard = np.searchsorted(self.starts, indices, side="right") - 1
        for k in np.unique(shard):
            entry = np.flatnonzero(shard == k)
            yield self.files[k], entry, self.files[k].index[indices[entry] - self.starts[k]]

    def verify(self, indices: np.ndarray) -> None:
        """Compare with their checksums those samples that this process has not read before."""
        for index in indices[~self._checked[indices]]:
            file, position = self.locate(int(index))
            file.check_sample(position)
            self._checked[index] = True

    def pending(self, indices: np.ndarray, rows: np.ndarray) -> Check:
        """What a kernel needs to check, on its way, those samples that this process has not read before."""
        asked = ~self._checked[indices]
        if asked.any():
            short = asked & (rows["length"] <= SHORT)
            self.verify(indices[short])
            asked &= ~short
        return rows["length"].astype(np.int64), rows["checksum"].astype(np.uint64), asked

    def passed(self, indices: np.ndarray, wrong: int) -> None:
        """Take note of what a kernel found: the place of a wrong sample, or -1."""
        if wrong >= 0:
            self.verify(indices[wrong : wrong + 1])
        self._checked[indices] = True

    def stored(self, index: int) -> np.ndarray:
        """The stored bytes of a sample, verified; a view that must not be written to."""
        self.verify(np.array([index]))
        file, position = self.locate(index)
        return file.sample(position)

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (h w 3); a view of the file if raw."""
        stored = self.stored(index)
        file, position = self.locate(index)
        entry = file.index[position]
        height, width = int(entry["height"]), int(entry["width"])
        if file.codec == "raw":
            return stored.reshape(height, width, file.header.channels)
        try:
            return _jpeg.decode(stored, height, width)
        except DataError as error:
            raise DataError(f"{file.path}: damaged at byte {int(entry['offset'])}: sample {position}: {error}.") from error

    def crops(self, file: Packed, rows: np.ndarray, indices: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bytes, where each begins) of boxes of samples of a file of JPEGs; `rows` are the samples' index entries."""
        self.passed(indices, first_wrong(file.bytes, rows["offset"].astype(np.int64), self.pending(indices, rows)))
        pixels, place, done = _jpeg.crops(file.bytes, rows, box)
        for k in np.flatnonzero(~done):
            top, left, height, width = box[k]
            crop = self.pixels(int(indices[k]))[top : top + height, left : left + width]
            pixels[place[k] : place[k] + crop.size] = crop.reshape(-1)
        return pixels, place

    def __getstate__(self) -> dict[str, Any]:
        return self._again  # another process opens the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)
