"""The installed wheel, in an empty folder: train, test, predict and sweep as a user would."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package as a wheel, unpacked where nothing else is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "*.egg-info", "build", "outputs", "__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "dist", source]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (found,) = (folder / "dist").glob("*.whl")
    shutil.unpack_archive(found, folder / "site", "zip")
    return folder / "site"


def run(wheel: Path, folder: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(wheel), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "lightning_cnn", *words]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_train_test_predict_in_an_empty_folder(wheel, tmp_path):
    out = run(wheel, tmp_path, "train", *TINY)
    folder = Path(out.strip().splitlines()[-1])
    assert folder.parent == tmp_path / "outputs" / "train"
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "report.md", "schedule.png", "confusion_matrix.png", "checkpoints/last.ckpt"} <= left
    assert any(name.startswith("tensorboard/events") for name in left)

    assert "test_accuracy" in run(wheel, tmp_path, "test", "ckpt_path=best", "trainer.accelerator=cpu")

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(3):
        Image.fromarray(np.full((9, 9), 40 * k, dtype=np.uint8)).save(pictures / f"{k}.png")
    out = run(wheel, tmp_path, "predict", "input=pictures", "trainer.accelerator=cpu")
    with Path(out.strip().splitlines()[-1], "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(0 < float(row["probability"]) <= 1 and 0 <= float(row["entropy"]) <= np.log(10) + 1e-5 for row in rows)


def test_a_sweep_ends_with_its_table_and_picture(wheel, tmp_path):
    out = run(wheel, tmp_path, "train", "-m", "model.lr=0.001,0.01", "test=false", *TINY)
    folder = Path(out.strip().splitlines()[-1])
    with (folder / "results.csv").open() as file:
        jobs = {row["job"].split()[0]: float(row["result"]) for row in csv.DictReader(file)}
    assert set(jobs) == {"model.lr=0.001", "model.lr=0.01"}
    assert (folder / "sweep.png").stat().st_size > 1000


def test_another_hydra_app_gets_our_groups(wheel, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text(
        "defaults:\n  - data: digits\n  - _self_\nseed: 3\nhydra:\n  searchpath: [pkg://lightning_cnn.conf]\n"
    )
    (tmp_path / "app.py").write_text(
        "import hydra\n@hydra.main(version_base='1.3', config_path='conf', config_name='app')\n"
        "def main(c): print(c.data._target_, c.data.seed)\nmain()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    out = subprocess.run([sys.executable, "app.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "lightning_cnn.data.Digits 3"
