"""The store of features, where several processes share a folder."""

from pathlib import Path

import torch

from lightning_cnn.callbacks._feature_store import FeatureStore


def test_two_processes_with_one_seed_may_create_it_at_the_same_moment(tmp_path, monkeypatch):
    """Ranks share seed and folder; the second comes when the first has written its description but not yet given it its name."""
    first, second = (FeatureStore(1, 4, tmp_path, 0) for _ in range(2))
    write = Path.write_text
    turns = iter([lambda: second.write(0, torch.tensor([2, 3]), [torch.ones(2, 5)])])

    def write_and_wait(self, text):
        write(self, text)
        next(turns, lambda: None)()

    monkeypatch.setattr(Path, "write_text", write_and_wait)
    first.write(0, torch.tensor([0, 1]), [torch.zeros(2, 5)])
    third = FeatureStore(1, 4, tmp_path, 0)
    assert third.seen.all()
    assert third.read(0, torch.arange(4))[0].sum() == 10
