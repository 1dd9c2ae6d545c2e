"""`lightning-cnn bench [NAME ...]`: run `benchmarks/`, keep the rows, and fill the tables of README and cards with them."""

import json
import os
import subprocess
import sys
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightning_cnn.app import _tables
from lightning_cnn.errors import ConfigurationError, LightningCNNError

ROOT = Path(__file__).resolve().parents[2]


def words(given: list[str]) -> list[str]:
    """`bench loading training` is `bench name=[loading,training]`."""
    names = [word for word in given if word.isidentifier()]
    return [*(word for word in given if word not in names), *([f"name=[{','.join(names)}]"] if names else [])]


def run(config: DictConfig, folder: Path, root: Path = ROOT) -> None:
    """Run each benchmark in a process of its own; rows go to `folder`, and unless `quick` to where the tables come from."""
    failed = []
    for name in _names(config.name, root):
        rows = _measured(name, config, folder, root)
        if rows is None:
            failed.append(name)
        elif config.publish and not config.quick:
            kept = _tables.keep(rows, root / "benchmarks" / "results" / f"{name}.json")
            filled = [str(page.relative_to(root)) for page in _tables.pages(root) if _tables.fill(page, name, kept)]
            print(f"{name}: {len(rows)} rows kept; tables filled in {', '.join(filled) or 'no page'}")
    print(folder)
    if failed:
        raise LightningCNNError(f"{', '.join(failed)} ended with an error, shown above; what the others measured was kept.")


def _names(asked: str | list[str] | None, root: Path) -> list[str]:
    known = sorted(path.stem for path in (root / "benchmarks").glob("*.py") if not path.stem.startswith("_"))
    if not known:
        raise ConfigurationError(
            f"bench needs the repository: there is no folder benchmarks/ beside {root / 'lightning_cnn'}, because packages do not ship it. "
            "Clone the repository, pip install -e . there, and run it from that checkout."
        )
    names = [asked] if isinstance(asked, str) else list(asked) if asked else known
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."
            raise ConfigurationError(f"bench: there is no benchmarks/{name}.py; {hint}")
    return names


def _measured(name: str, config: DictConfig, folder: Path, root: Path) -> list[_tables.Row] | None:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{name}.json").resolve()
    only = OmegaConf.to_container(config.only) if OmegaConf.is_config(config.only) else config.only
    groups = [str(group) for group in ([only] if isinstance(only, str) else only or ())]
    command = [sys.executable, str(root / "benchmarks" / f"{name}.py"), "--json", str(file)]
    command += ["--quick"] * bool(config.quick) + (["--only", *groups] if groups else [])
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    print(f"\n{name}: {' '.join(['python', f'benchmarks/{name}.py', *command[4:]])}", flush=True)
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": path}, check=False)
    return json.loads(file.read_text()) if done.returncode == 0 and file.exists() else None
