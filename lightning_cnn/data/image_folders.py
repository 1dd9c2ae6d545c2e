"""Your own pictures: a folder a class."""

from collections import Counter
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_cnn.data._loader import Resumable
from lightning_cnn.errors import ConfigurationError, DataError, raise_all
from lightning_cnn.functional import counter

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


class ImageFolders(L.LightningDataModule):
    """`root/<class>/*.jpg`, or `root/train/<class>/...` with `root/val/...` and perhaps `root/test/...`.

    Pictures come as uint8 (b, 3, size_px, size_px) with labels and sample indices: the shorter side is resized (antialiased) and the
    centre cut out. Without `val/`, `val_fraction` of each class is held out, the same pictures in every run; without `test/`, the
    validation pictures are tested on.

    Args:
        shots: training pictures a class (few-shot), or all.
        seed: orders the training pictures and chooses the shots.
        on_error: at a picture that cannot be decoded: `raise`, `skip` it (counted in the report), or `report` all at an epoch's end.

    Raises:
        DataError: at `setup`: the folder is missing, has fewer than two classes, or a class has too few pictures; while reading: the
            picture that cannot be decoded.
        ConfigurationError: at `setup`, listing every argument that cannot be met.
    """

    def __init__(
        self,
        *,
        root: str,
        size_px: int = 224,
        batch_size: int = 32,
        val_fraction: float = 0.2,
        shots: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        on_error: Literal["raise", "skip", "report"] = "raise",
    ) -> None:
        super().__init__()
        self.on_error: Literal["raise", "skip", "report"] = on_error
        self._loaders: dict[str, Resumable] = {}
        self.root, self.size_px, self.batch_size, self.val_fraction = str(root), size_px, batch_size, val_fraction
        self.shots, self.seed, self.num_workers = shots, seed, num_workers

    @property
    def classes(self) -> list[str]:
        """Names of the class folders, sorted; a label is a position in this list."""
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"data.root: there is no folder {root.resolve()}. Give one that holds a folder of pictures for each class.")
        train = root / "train" if (root / "train").is_dir() else root
        names = sorted(entry.name for entry in train.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if len(names) < 2:
            raise DataError(f"{train.resolve()} needs a folder for each of two or more classes; found {names or 'none'}.")
        return names

    def setup(self, stage: str | None = None) -> None:
        raise_all(self._problems(), ConfigurationError)
        root, names = Path(self.root), self.classes
        if (root / "train").is_dir():
            train = _listed(root / "train", names)
            held_out = next((_listed(root / name, names) for name in ("val", "valid") if (root / name).is_dir()), None)
            train, validation = (train, held_out) if held_out else self._held_out(train)
        else:
            train, validation = self._held_out(_listed(root, names))
        if self.shots is not None:
            train = self._shots(train, names)
        test = _listed(root / "test", names) if (root / "train").is_dir() and (root / "test").is_dir() else validation
        self.train, self.validation, self.test = (Pictures(files, self.size_px) for files in (train, validation, test))

    @property
    def left_out(self) -> list[str]:
        """Each picture that was skipped, with the reason."""
        return sorted({reason for loader in self._loaders.values() for reason in loader.left_out.values()})

    def train_dataloader(self) -> Resumable:
        return self._loader("train", self.train, min(self.batch_size, len(self.train)), shuffle=True)

    def val_dataloader(self) -> Resumable:
        return self._loader("val", self.validation, self.batch_size)

    def test_dataloader(self) -> Resumable:
        return self._loader("test", self.test, self.batch_size)

    def _loader(self, split: str, pictures: "Pictures", batch_size: int, shuffle: bool = False) -> Resumable:
        options: Any = {"shuffle": shuffle, "seed": self.seed, "num_workers": self.num_workers, "on_error": self.on_error}
        left_out = self._loaders[split].left_out if split in self._loaders else {}
        self._loaders[split] = Resumable(pictures, batch_size=batch_size, **options)
        self._loaders[split].left_out.update(left_out)
        return self._loaders[split]

    predict_dataloader = test_dataloader

    def _problems(self) -> list[str]:
        problems = []
        if not 0 < self.val_fraction < 1:
            problems.append(f"val_fraction={self.val_fraction}: choose a share between 0 and 1")
        if self.shots is not None and self.shots < 1:
            problems.append(f"shots={self.shots}: choose 1 or more, or null for all")
        if self.size_px < 1 or self.batch_size < 1:
            problems.append(f"size_px={self.size_px}, batch_size={self.batch_size}: choose 1 or more")
        return problems

    def _held_out(self, files: list[tuple[Path, int]]) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
        train, validation = [], []
        for label in sorted({label for _, label in files}):
            own = [file for file in files if file[1] == label]
            order = counter.permutation(counter.key(0, "image_folders", "split", label), len(own)).tolist()
            count = max(1, round(self.val_fraction * len(own)))
            if count >= len(own):
                raise DataError(
                    f"{own[0][0].parent} has {len(own)} picture; a class needs two, one to train on and one to validate with."
                )
            validation += [own[i] for i in sorted(order[:count])]
            train += [own[i] for i in sorted(order[count:])]
        return train, validation

    def _shots(self, files: list[tuple[Path, int]], names: list[str]) -> list[tuple[Path, int]]:
        shots = cast(int, self.shots)
        short = [name for label, name in enumerate(names) if Counter(label for _, label in files)[label] < shots]
        if short:
            raise DataError(f"shots={shots}: {', '.join(short)} have fewer training pictures than that.")
        order = counter.permutation(counter.key(self.seed, "image_folders", "shots"), len(files)).tolist()
        return [file for k in range(len(names)) for file in [files[i] for i in order if files[i][1] == k][:shots]]


class Pictures(Dataset):
    """Map-style dataset of (uint8 tensor (3, size_px, size_px), label) over a list of files."""

    def __init__(self, files: list[tuple[Path, int]], size_px: int) -> None:
        self.files, self.size_px = files, size_px

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return read(path, self.size_px), label


def read(path: Path, size_px: int) -> Tensor:
    """One picture as uint8 (3, size_px, size_px): shorter side resized (antialiased), centre cut out.

    Raises:
        DataError: the file is not a picture that can be decoded.
    """
    from torchvision.transforms.v2 import functional as TF

    image = TF.resize(_decoded(path), [size_px], antialias=True)
    return TF.center_crop(image, [size_px, size_px])


def _decoded(path: Path) -> Tensor:
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_image

    try:
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            return decode_image(str(path), mode=ImageReadMode.RGB, apply_exif_orientation=True)
        with Image.open(path) as picture:
            pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1)
    except (RuntimeError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path} cannot be decoded as a picture ({reason}). Mend it or take it out of the folder.") from error


def _listed(root: Path, names: list[str]) -> list[tuple[Path, int]]:
    files, problems = [], []
    for label, name in enumerate(names):
        own = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not own:
            problems.append(f"{root / name} holds no picture ({', '.join(SUFFIXES)}); fill it or remove it.")
        files += [(path, label) for path in own]
    raise_all(problems, DataError)
    return files
