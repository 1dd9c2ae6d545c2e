"""MixUp mixes pictures and labels by the same share, and nobody with himself."""

import pytest
import torch

from lightning_cnn.callbacks import MixUp
from lightning_cnn.callbacks._batch_hook import Samples
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.batch import Batch


def mixed(callback, n=64, dtype=torch.float32):
    """Picture i is constant i / n and has class i, so that a mixture can be read off both."""
    value = torch.arange(n)
    image = (value.view(-1, 1, 1, 1) / n).expand(n, 3, 4, 4)
    image = (image * 255).to(dtype) if dtype == torch.uint8 else image.to(dtype)
    return callback.transform(Batch(image, value, value), Samples(value, ("epoch", 0)))


def test_picture_and_label_are_mixed_by_one_share_a_picture():
    n = 64
    batch = mixed(MixUp(classes=n, alpha=1.0))
    assert torch.allclose(batch.label.sum(1), torch.ones(n))
    torch.testing.assert_close(batch.image[:, 0, 0, 0], batch.label @ (torch.arange(n) / n))
    assert (batch.label.gather(1, torch.arange(n)[:, None]) < 1).all(), "nobody is his own partner"
    share = batch.label.gather(1, torch.arange(n)[:, None]).squeeze(1)
    assert share.mean().item() == pytest.approx(0.5, abs=4.5 * (1 / 12 / n) ** 0.5)
    others = batch.label.clone().scatter_(1, torch.arange(n)[:, None], 0).argmax(1)
    assert sorted(others.tolist()) == list(range(n)), "each is somebody's partner once"


def test_types_are_kept_and_p_is_the_part_that_is_mixed():
    batch = mixed(MixUp(classes=64, alpha=1.0, p=0.5), dtype=torch.uint8)
    assert batch.image.dtype == torch.uint8
    untouched = (batch.label.amax(1) == 1).float().mean().item()
    assert untouched == pytest.approx(0.5, abs=4.5 * (0.25 / 64) ** 0.5)


def test_soft_labels_mix_on():
    batch = mixed(MixUp(classes=64, alpha=1.0))
    again = MixUp(classes=64, alpha=1.0, seed=1).transform(batch, Samples(torch.arange(64), ("epoch", 0)))
    assert torch.allclose(again.label.sum(1), torch.ones(64))
    assert ((again.label > 0).sum(1) > 2).any()


def test_wrong_arguments_are_named_together():
    with pytest.raises(ConfigurationError, match="3 problems"):
        MixUp(classes=1, alpha=0.0, p=2.0)
