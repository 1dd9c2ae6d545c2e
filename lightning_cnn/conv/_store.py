"""Measured choices on disk, one JSON file an environment (processor, versions); read as a hint from a stranger, never as the truth.

A file that is damaged, of another format or environment, or that names what does not exist is ignored with a warning; every choice
taken from it is measured again before it is used twice.
"""

import json
import logging
import os
import platform
import tempfile
from hashlib import blake2b
from pathlib import Path

import torch

from lightning_cnn.conv._call import NAMES, Call

FORMAT = 1
log = logging.getLogger(__name__)


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_cnn"


def environment() -> dict[str, str]:
    """What a measurement is worth something for."""
    import numba

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": f"{_cpu_name()} {torch.backends.cpu.get_cpu_capability()}",
        "gpu": gpu,
        "torch": torch.__version__,
        "numba": numba.__version__,
    }


def key(call: Call) -> str:
    """The call as text; equal calls have equal text."""
    geometry = [list(value) if isinstance(value, tuple) else value for value in call.geometry]
    return json.dumps(
        [call.role, call.x, call.weight, geometry, str(call.dtype), call.device, call.channels_last, call.threads, call.keep]
    )


class Store:
    """`get` and `put` a choice; `folder=None` keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.environment = environment() if folder else {}
        self.path = folder / f"conv-{_digest(self.environment)[:16]}.json" if folder else None
        self._choices: dict[str, str] | None = None

    def get(self, call: Call) -> str | None:
        """The algorithm that was best for `call` in an earlier run, if any."""
        if self._choices is None:
            self._choices = self._read()
        return self._choices.get(key(call))

    def put(self, choices: dict[Call, str]) -> None:
        """Add to the file; what another process has written since is kept."""
        self._choices = {**self._read(), **{key(call): name for call, name in choices.items()}}
        if self.path is None:
            return
        body = {"format": FORMAT, "environment": self.environment, "choices": self._choices}
        try:
            _write(self.path, json.dumps({**body, "digest": _digest(body)}, indent=0))
        except OSError as error:
            log.warning("The measured choices could not be written to %s (%s); they hold for this run alone.", self.path, error)
            self.path = None

    def _read(self) -> dict[str, str]:
        if self.path is None or not self.path.exists():
            return dict(self._choices or {})
        try:
            body = json.loads(self.path.read_text())
            digest = body.pop("digest")
            intact = digest == _digest(body) and body["format"] == FORMAT and body["environment"] == self.environment
            choices = {str(k): v for k, v in body["choices"].items() if v in NAMES}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            intact, choices = False, {}
        if not intact:
            log.warning("%s is damaged or was written by something else; it is ignored and will be replaced.", self.path)
        return choices if intact else {}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def _digest(body: dict) -> str:
    return blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "cpu family", "model\t")
    return " ".join(line.split(":")[1].strip() for line in lines[:10] if line.startswith(wanted)) or platform.processor()
