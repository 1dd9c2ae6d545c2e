"""Rows of tensors by view and sample index: in memory, or in memory-mapped files that several processes and later runs share.

A row's checksum is written after the row; a file that is opened again is believed only where the checksum agrees.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import xxhash
from torch import Tensor, nn
from torch.utils.data import Subset

from lightning_cnn.errors import ConfigurationError


class FeatureStore:
    """`views` x `samples` rows, each a tuple of tensors (the features, then what else a batch holds)."""

    def __init__(self, views: int, samples: int, folder: Path | None, memory_bytes: int) -> None:
        self.views, self.samples, self.folder, self.memory_bytes = views, samples, folder, memory_bytes
        # Shared, so that loader workers see what the main process has stored.
        self.seen = torch.zeros(views, samples, dtype=torch.bool).share_memory_()
        self.columns: list[Tensor] = []
        self.layout: list[dict[str, Any]] = []
        self.sums: Tensor | None = None
        if folder is not None and (folder / "layout.json").exists():
            self._open(json.loads((folder / "layout.json").read_text()))
            self._verify()

    def clear(self) -> None:
        self.seen.zero_()
        self.columns, self.sums = [], None

    def write(self, view: int, index: Tensor, row: Sequence[Tensor]) -> None:
        if not self.columns:
            self._create(row)
        for column, values in zip(self.columns, row, strict=True):
            column[view, index] = values.detach().cpu()
        if self.sums is not None:
            self.sums[view, index] = torch.tensor([self._sum(view, i) for i in index.tolist()])
        self.seen[view, index] = True

    def read(self, view: int, index: Tensor) -> list[Tensor]:
        rows = [column[view].index_select(0, index) for column in self.columns]
        if self.layout[0]["channels_last"]:
            rows[0] = rows[0].contiguous(memory_format=torch.channels_last)
        return rows

    def _create(self, row: Sequence[Tensor]) -> None:
        layout = [{"shape": list(t.shape[1:]), "dtype": str(t.dtype).removeprefix("torch."), "channels_last": _nhwc(t)} for t in row]
        size = self.views * self.samples * sum(t[0].numel() * t.element_size() for t in row)
        if self.folder is None and size > self.memory_bytes:
            raise ConfigurationError(
                f"the features of {self.samples} samples in {self.views} views take {size / 2**30:.1f} GiB, more than "
                f"memory_gib={self.memory_bytes / 2**30:g}: give folder=..., and they are kept in memory-mapped files."
            )
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A name of its own: the processes of a run come here at the same time, with the same seed.
            temporary = self.folder / f"layout.json.{uuid4().hex}"
            temporary.write_text(json.dumps(layout))
            temporary.replace(self.folder / "layout.json")
        self._open(layout)

    def _open(self, layout: list[dict[str, Any]]) -> None:
        self.layout = layout
        self.columns = [self._tensor(f"{i}.bin", getattr(torch, one["dtype"]), one["shape"]) for i, one in enumerate(layout)]
        self.sums = self._tensor("sums.bin", torch.int64, []) if self.folder is not None else None

    def _tensor(self, name: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        full = (self.views, self.samples, *shape)
        if self.folder is None:
            return torch.empty(full, dtype=dtype)
        return torch.from_file(str(self.folder / name), shared=True, size=torch.Size(full).numel(), dtype=dtype).view(full)

    def _sum(self, view: int, i: int) -> int:
        digest = xxhash.xxh3_64()
        for column in self.columns:
            digest.update(_bytes(column[view, i]))
        return (digest.intdigest() >> 1) | 1  # never 0, which an unwritten file holds

    def _verify(self) -> None:
        assert self.sums is not None
        for view, i in self.sums.nonzero().tolist():
            self.seen[view, i] = self._sum(view, i) == int(self.sums[view, i])


def weights_key(name: str, modules: Sequence[nn.Module]) -> str:
    """A hash of every parameter and buffer of `modules`."""
    digest = xxhash.xxh3_128(name.encode())
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def data_key(dataset: Any, samples: Sequence[Tensor]) -> str:
    """A hash of what a dataset holds and how it transforms it; refuses when it cannot tell.

    `samples` are a few items as they are delivered under fixed randomness: they show a transform that no attribute names.
    """
    digest = xxhash.xxh3_128()
    for part in (*_description(dataset), *map(_bytes, samples)):
        digest.update(part)
    return digest.hexdigest()


def _description(dataset: Any) -> Iterator[bytes]:
    yield f"{type(dataset).__qualname__} {len(dataset)}".encode()
    for name in ("transform", "target_transform", "transforms"):
        yield repr(getattr(dataset, name, None)).encode()
    if isinstance(dataset, Subset):
        yield repr(list(dataset.indices)).encode()
        yield from _description(dataset.dataset)
    elif isinstance(getattr(dataset, "checksum", None), str | int):
        yield str(dataset.checksum).encode()
    elif isinstance(files := getattr(dataset, "samples", getattr(dataset, "files", None)), list):
        for path, label in files:
            status = Path(path).stat()
            yield f"{path} {label} {status.st_size} {status.st_mtime_ns}".encode()
    else:
        held = [v for name in ("tensors", "images", "data", "labels", "targets") if (v := getattr(dataset, name, None)) is not None]
        tensors = [torch.as_tensor(t) for v in held for t in (v if isinstance(v, tuple) else (v,))]
        if not tensors:
            raise ConfigurationError(
                f"cannot tell whether the data of a {type(dataset).__name__} have changed, so no folder may keep its features: "
                "give it a `checksum` attribute, or leave folder out to keep them in memory."
            )
        yield from (_bytes(tensor) for tensor in tensors)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _nhwc(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
