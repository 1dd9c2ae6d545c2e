"""`lightning-cnn predict`: label a folder or some files of pictures."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from lightning_cnn import plot
from lightning_cnn.app import _build
from lightning_cnn.data.image_folders import SUFFIXES, read
from lightning_cnn.errors import ConfigurationError, DataError


def run(config: DictConfig, folder: Path) -> None:
    """Write `predictions.csv` (file, label, probability, entropy in nats) and `predictions.png` into `folder`."""
    config = _build.resolved(config, folder)
    files = _files(config.input)
    data = _build.data(config)
    model = _build.restored(config, data)
    classes: list[str] = list(getattr(model, "classes", ()))
    pictures = _Pictures(files, int(getattr(data, "size_px", 224)), int(getattr(data, "channels", 3)))
    trainer = _build.trainer(config, folder)
    outputs = trainer.predict(model, DataLoader(pictures, batch_size=config.batch_size))
    log_probability = torch.cat([part for part in outputs or [] if isinstance(part, torch.Tensor)]).float().cpu()
    top = log_probability.max(-1)
    entropy = -(log_probability.exp() * log_probability).nan_to_num().sum(-1)
    labels = [str(classes[k]) if classes else str(k) for k in top.indices.flatten().tolist()]
    rows: list[tuple[Path, str, float, float]] = list(zip(files, labels, top.values.exp().tolist(), entropy.tolist(), strict=True))
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "label", "probability", "entropy"), *((f, n, f"{p:.6f}", f"{h:.6f}") for f, n, p, h in rows)]
        )
    _grid(rows, pictures, math.log(log_probability.shape[1])).savefig(folder / "predictions.png")
    console = Console()
    console.print(f"{len(rows)} pictures labelled: {folder / 'predictions.csv'}", soft_wrap=True, highlight=False)
    console.print(str(folder), soft_wrap=True, highlight=False)


class _Pictures(Dataset):
    def __init__(self, files: list[Path], size_px: int, channels: int) -> None:
        self.files, self.size_px, self.channels = files, size_px, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = read(self.files[index], self.size_px)
        return image if self.channels == 3 else image.float().mean(0, keepdim=True).round().to(torch.uint8)


def _files(given: str | list[str] | None) -> list[Path]:
    if not given:
        raise ConfigurationError("input: name a folder of pictures, a file, or a list of files: lightning-cnn predict input=FOLDER")
    found = [file for word in ([given] if isinstance(given, str) else given) for file in _in(Path(word))]
    if not found:
        raise DataError(f"input: {given} holds no picture ({', '.join(SUFFIXES)}).")
    return found


def _in(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    elif path.is_file():
        yield path
    else:
        raise DataError(f"input: there is no file or folder {path.resolve()}.")


def _grid(rows: list[tuple[Path, str, float, float]], pictures: _Pictures, highest: float):
    """The 24 least certain answers: the ones worth a look."""
    order = sorted(range(len(rows)), key=lambda k: -rows[k][3])[:24]
    shown = [pictures[k].permute(1, 2, 0).squeeze(-1).numpy() for k in order]
    captions = [f"{rows[k][1]} {rows[k][2]:.0%}\nentropy {rows[k][3] / highest:.0%} of most" for k in order]
    return plot.picture_grid(shown, captions)
