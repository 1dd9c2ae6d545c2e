"""A number in a table is a number that was measured: rows are kept, and only tables between marks are written."""

import json

import pytest
from omegaconf import OmegaConf

from lightning_cnn.app import _tables, bench
from lightning_cnn.app.main import main
from lightning_cnn.errors import ConfigurationError, LightningCNNError

ROW = {
    "row": "resnet18 train", "peer": "stock", "ours": 0.5, "theirs": 1.0, "unit": "s", "ratio": 2.0, "bar": None, "n": 5,
    "machine": "2 cores of a CPU", "versions": {"torch": "2.15.0"}, "commit": "abc",
}  # fmt: skip
PAGE = "before\n<!-- bench speed: resnet* | vgg* -->\nnot yet measured\n<!-- /bench -->\nafter 3.14\n"
CONFIG = {"name": None, "only": None, "quick": False, "publish": True}


@pytest.fixture
def checkout(tmp_path):
    """A repository with one benchmark, which writes ROW and the words it was called with."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "speed.py").write_text(
        f"import json, sys\nrow = {ROW!r}\nrow['peer'] = ' '.join(sys.argv[3:]) or 'stock'\njson.dump([row], open(sys.argv[2], 'w'))\n"
    )
    (tmp_path / "benchmarks" / "_bench.py").write_text("")
    (tmp_path / "lightning_cnn").mkdir()
    (tmp_path / "lightning_cnn" / "card.md").write_text(PAGE)
    (tmp_path / "README.md").write_text(PAGE.replace("speed", "other"))
    return tmp_path


def run(checkout, **changes):
    bench.run(OmegaConf.create({**CONFIG, **changes}), checkout / "out", checkout)


def test_a_measured_row_reaches_the_card_and_nothing_else_changes(checkout):
    run(checkout)
    card = (checkout / "lightning_cnn" / "card.md").read_text()
    assert "| resnet18 train | 0.5 s | stock | 1 s | 2.00x |" in card
    assert "2 cores of a CPU, torch 2.15.0, n = 5, `lightning-cnn bench speed`" in card
    assert card.startswith("before\n<!-- bench speed: resnet* | vgg* -->\n|") and card.endswith("<!-- /bench -->\nafter 3.14\n")
    assert "not yet measured" in (checkout / "README.md").read_text()
    assert json.loads((checkout / "out" / "speed.json").read_text()) == [ROW]


def test_groups_measured_on_their_own_add_up(checkout):
    run(checkout)
    run(checkout, only=["one", "two"])
    kept = json.loads((checkout / "benchmarks" / "results" / "speed.json").read_text())
    assert [row["peer"] for row in kept] == ["stock", "--only one two"]


@pytest.mark.parametrize("changes", [{"quick": True}, {"publish": False}], ids=str)
def test_a_quick_look_publishes_nothing(checkout, changes):
    run(checkout, **changes)
    assert not (checkout / "benchmarks" / "results").exists()
    assert (checkout / "lightning_cnn" / "card.md").read_text() == PAGE


def test_an_older_row_is_replaced(tmp_path):
    file = tmp_path / "speed.json"
    _tables.keep([ROW], file)
    assert _tables.keep([{**ROW, "ours": 0.25}], file) == [{**ROW, "ours": 0.25}]


def test_a_missing_peer_is_shown_as_missing():
    text = _tables.table([{**ROW, "peer": "ffcv (not installed: pip)", "ours": None, "theirs": None, "ratio": None, "n": 0}], "speed")
    assert "| resnet18 train | - | ffcv (not installed: pip) | - |  |" in text


def test_a_benchmark_that_fails_is_named_and_the_others_are_kept(checkout):
    (checkout / "benchmarks" / "broken.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(LightningCNNError, match="broken ended with an error"):
        run(checkout)
    assert (checkout / "benchmarks" / "results" / "speed.json").exists()


def test_without_a_checkout_it_says_so(tmp_path):
    with pytest.raises(ConfigurationError, match="needs the repository"):
        bench.run(OmegaConf.create(CONFIG), tmp_path / "out", tmp_path)


def test_bare_words_are_names_and_a_wrong_one_gets_the_nearest(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.words(["loading", "quick=true", "training"]) == ["quick=true", "name=[loading,training]"]
    assert main(["bench", "loadign"]) == 2
    assert "did you mean 'loading'?" in capsys.readouterr().err
