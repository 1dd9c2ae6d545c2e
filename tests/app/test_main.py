"""The command line says what is wrong before it does anything, and answers at once when asked for help."""

import subprocess
import sys

import pytest

from lightning_cnn.app.main import main


def said(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_an_unknown_verb_gets_the_nearest_one(capsys):
    assert "no verb 'trian'; did you mean 'train'?" in said(capsys, "trian")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainr.max_epochs=3"], "did you mean 'trainer'?"),
        (["trainer.max_epoch=3"], "did you mean 'max_epochs'?"),
        (["trainer.max_epochs=three"], "trainer.max_epochs: lightning.Trainer takes int | None, got 'three'"),
        (["+trainer.max_epoch=3"], "trainer.max_epoch: lightning.Trainer has no such argument; did you mean 'max_epochs'?"),
        (["+modle.lr=3"], "modle: no such key at the top level; did you mean 'model'?"),
        (["model._target_=lightning_cnn.model.Classifer"], "did you mean 'Classifier'?"),
        (["experiment=transfr"], "Could not find 'experiment/transfr'"),
        (["experiment=transfer"], "data: lightning_cnn.data.ImageFolders needs 'root'; add data.root=..."),
    ],
)
def test_what_cannot_be_composed_is_said_with_the_nearest_key(capsys, words, message):
    assert message in said(capsys, "train", *words)


def test_all_problems_are_printed_together(capsys):
    error = said(capsys, "train", "+trainer.max_epoch=3", "+model.lerning_rate=1", "trainer.devices=-x", "model.lr=fast")
    assert "3 problems" in error
    assert "trainer.max_epoch" in error and "model.lerning_rate" in error and "model.lr" in error


def test_a_typo_inside_a_yaml_file_is_found_before_anything_is_built(capsys, tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "mine.yaml").write_text(
        "# @package callbacks.mine\n_target_: lightning_cnn.callbacks.BatchAugmentation\nagument: flip\n"
    )
    error = said(capsys, "train", f"hydra.searchpath=[file://{tmp_path}]", "callbacks=[default,mine]")
    assert "callbacks.mine.agument" in error and "did you mean 'augment'?" in error


def test_a_missing_folder_is_named_by_the_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = said(capsys, "train", "experiment=transfer", "data.root=nowhere", "model.weights=null", "trainer.max_epochs=1")
    assert "data.root: there is no folder" in error


def test_predicting_before_training_says_where_it_looked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no last.ckpt under" in said(capsys, "predict", "input=x")


def test_help_imports_neither_torch_nor_lightning():
    """The promise is under a second; what makes it so is what is not imported."""
    report = "atexit.register(lambda: print([m for m in ('torch', 'lightning') if m in sys.modules]))"
    code = f"import atexit, sys; from lightning_cnn.app.main import main; {report}; main(['train', '--help'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "image_folders" in out
    assert out.strip().endswith("[]")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, lightning_cnn; print([m for m in ('torch', 'lightning', 'hydra', 'numpy', 'kornia') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_completion_knows_verbs_groups_and_options():
    def complete(line: str) -> list[str]:
        env = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PATH": "/usr/bin"}
        command = [sys.executable, "-m", "lightning_cnn", "-sc", "query=bash"]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.split()

    assert complete("lightning-cnn tr") == ["train"]
    assert "data=image_folders" in complete("lightning-cnn train data=")
    assert "trainer.max_epochs=" in " ".join(complete("lightning-cnn train trainer.max_ep"))


def test_a_process_that_a_strategy_started_is_told_its_verb(monkeypatch):
    """Lightning repeats sys.argv, in which Hydra allows no verb."""
    ran = []
    monkeypatch.setattr("lightning_cnn.app.main._run", lambda verb, words: ran.append((verb, words)) or 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["seed=1"]) == 2
    monkeypatch.setenv("LIGHTNING_CNN_VERB", "train")
    assert main(["seed=1"]) == 0
    assert ran == [("train", ["seed=1"])]
