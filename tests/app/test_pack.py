"""`lightning-cnn pack`: a folder becomes a file that says what is in it."""

from lightning_cnn.app.main import main
from lightning_cnn.data import PackedImages


def test_a_folder_is_packed_and_the_file_named_last(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pack", f"data.root={pictures}", "out=x.pack", "size=16", "workers=0"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "x.pack"
    assert "16 pictures of 2 classes" in lines[-2]
    images = PackedImages("x.pack")
    assert (len(images), images.shape, images.classes) == (16, (16, 16), ["dark", "light"])


def test_a_broken_picture_is_listed_and_a_file_that_exists_is_kept(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "a").mkdir(parents=True)
    (tmp_path / "mine" / "a" / "whole.png").write_bytes((pictures / "dark" / "0.png").read_bytes())
    (tmp_path / "mine" / "a" / "broken.png").write_bytes(b"no picture")
    words = ["pack", "data.root=mine", "out=x.pack", "size=16", "workers=0"]
    assert main(words) == 2
    assert "broken.png" in capsys.readouterr().err
    assert main([*words, "on_error=skip"]) == 0
    assert "left out mine/a/broken.png" in capsys.readouterr().out
    assert main(words) == 2
    assert "x.pack: exists already" in capsys.readouterr().err
