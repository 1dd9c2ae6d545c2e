"""Find the checkpoint that `ckpt_path=last|best|PATH` means, and the run that it belongs to."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from lightning_cnn.errors import CheckpointError

OUTPUTS = Path("outputs/train")


def find(ckpt_path: str, outputs: Path = OUTPUTS) -> Path:
    """The file meant by `last` or `best` (of the newest run that has one) or by a path.

    Raises:
        CheckpointError: there is no such file; the message says where it was looked for.
    """
    if ckpt_path not in ("last", "best"):
        path = Path(ckpt_path)
        if not path.is_file():
            raise CheckpointError(f"ckpt_path: there is no file {path}. Give a .ckpt file, or ckpt_path=last or best.")
        return path
    pattern = "last.ckpt" if ckpt_path == "last" else "best*.ckpt"
    files = sorted(outputs.rglob(f"checkpoints/{pattern}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise CheckpointError(
            f"ckpt_path={ckpt_path}: no {pattern} under {outputs.resolve()}. "
            "Train first (lightning-cnn train ...) or give ckpt_path=PATH."
        )
    return files[-1]


def with_overrides_of_its_run(verb: str, words: Sequence[str]) -> list[str]:
    """`words`, preceded by the overrides that the checkpoint's run was started with, so that its data and model are known.

    What is said now wins. A checkpoint that stands outside a run folder brings nothing along.
    """
    if verb not in ("test", "predict", "export"):
        return list(words)
    said = [word.partition("=")[2] for word in words if word.startswith("ckpt_path=")]
    file = find(said[-1] if said else "last")
    record = file.parents[1] / ".hydra" / "overrides.yaml"
    earlier = yaml.safe_load(record.read_text()) if record.is_file() else []
    kept = [str(word) for word in earlier or () if not str(word).startswith(("ckpt_path=", "hydra", "+hydra"))]
    return [*kept, *(word for word in words if not word.startswith("ckpt_path=")), f"ckpt_path='{file.resolve()}'"]
