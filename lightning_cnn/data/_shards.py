"""Which files one dataset is made of: patterns are filled in, and what does not belong together is refused."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_cnn.data import _remote
from lightning_cnn.data._format import Packed
from lightning_cnn.errors import ConfigurationError, DataError, raise_all

NUMBERED = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})\.[^./]*")


@dataclass(frozen=True)
class Shard:
    """What the name of a shard says, and the file it names."""

    path: str
    number: int
    total: int
    file: Packed


def expand(path: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Every file or URL that is named, in the order given; those of one pattern in the order of their names."""
    given = [path] if isinstance(path, str | Path) else list(path)
    paths = [found for item in given for found in _found(item)]
    if not paths:
        raise DataError("No packed file was named.")
    if len({_remote.is_url(path) for path in paths}) > 1:
        raise ConfigurationError("Shards of one dataset are either all at URLs or all in files.")
    return paths


def check(given: str | Path | Sequence[str | Path], paths: Sequence[str | Path], files: Sequence[Packed]) -> None:
    """Refuse files that are not one dataset, each once and in order. A list may leave shards out; a pattern finds all of them."""
    raise_all([*_unlike(paths, files), *_repeated(paths, files), *_misplaced(isinstance(given, str | Path), paths, files)], DataError)


def _found(item: str | Path) -> Sequence[str | Path]:
    if _remote.is_url(item):
        return _remote.expand(str(item))
    return sorted(Path(item).parent.glob(Path(item).name)) or [Path(item)]


def _unlike(paths: Sequence[str | Path], files: Sequence[Packed]) -> Iterator[str]:
    first = files[0]
    for path, file in zip(paths[1:], files[1:], strict=True):
        if (file.codec, file.metadata.get("classes")) != (first.codec, first.metadata.get("classes")):
            yield f"{path} and {paths[0]} differ in codec or classes: they are not shards of one dataset."


def _repeated(paths: Sequence[str | Path], files: Sequence[Packed]) -> Iterator[str]:
    first: dict[int, str | Path] = {}
    for path, file in zip(paths, files, strict=True):
        other = first.setdefault(file.header.index_checksum, path)
        if other is not path:
            yield f"{path} holds the same samples as {other}: name each once, and use weights= for some to come more often."


def _misplaced(whole: bool, paths: Sequence[str | Path], files: Sequence[Packed]) -> Iterator[str]:
    for name, shards in _families(paths, files).items():
        totals, numbers = {shard.total for shard in shards}, [shard.number for shard in shards]
        fingerprints = Counter(str(shard.file.metadata.get("fingerprint")) for shard in shards)
        if len(totals) > 1:
            yield f"{name}: shards of several packings are mixed, of {sorted(totals)} files each. Name those of one of them."
            continue
        if len(fingerprints) > 1:
            usual = fingerprints.most_common(1)[0][0]
            foreign = [shard.path for shard in shards if str(shard.file.metadata.get("fingerprint")) != usual]
            yield f"{', '.join(foreign)}: packed from another source than the other shards of {name}. Pack or fetch all of them again."
        if numbers != sorted(numbers):
            yield f"{name}: shards are named in the order {numbers}. Name them in rising order, or by a pattern: sample numbers depend on it."
        left = sorted(set(range(totals.pop())) - set(numbers))
        if whole and left:
            yield f"{name}: shards {left} are missing. Fetch them, or name in a list those that are to be used."


def _families(paths: Sequence[str | Path], files: Sequence[Packed]) -> dict[str, list[Shard]]:
    """The numbered shards by the name they have in common."""
    families = defaultdict(list)
    for path, file in zip(paths, files, strict=True):
        if match := NUMBERED.fullmatch(str(path)):
            families[match["name"]].append(Shard(str(path), int(match["number"]), int(match["total"]), file))
    return families
