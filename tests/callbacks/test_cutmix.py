"""CutMix pastes one rectangle, and the label is the share of the pixels."""

import torch

from lightning_cnn.callbacks import CutMix
from lightning_cnn.callbacks._batch_hook import Samples
from lightning_cnn.functional.batch import Batch


def test_the_label_is_the_share_of_the_pixels_and_what_is_pasted_is_a_rectangle():
    n, side = 48, 12
    value = torch.arange(n)
    image = (value.view(-1, 1, 1, 1) / n).expand(n, 3, side, side).contiguous()
    batch = CutMix(classes=n).transform(Batch(image, value, value), Samples(value, ("epoch", 0)))
    own = batch.image[:, 0] == image[:, 0]
    torch.testing.assert_close(batch.label.gather(1, value[:, None]).squeeze(1), own.float().mean((1, 2)))
    assert torch.allclose(batch.label.sum(1), torch.ones(n))
    for pasted in ~own:
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns[None, :])
        for line in (rows, columns):
            assert (line.int().diff() == 1).sum() <= 1, "in one piece"
    assert 0.3 < own.float().mean().item() < 0.85


def test_a_sample_keeps_its_rectangle_when_its_batch_comes_in_another_order():
    value, order = torch.arange(16), torch.randperm(16)
    image = torch.rand(16, 1, 8, 8)
    callback = CutMix(classes=16, alpha=0.3)
    whole = callback.transform(Batch(image, value, value), Samples(value, ("epoch", 2)))
    turned = callback.transform(Batch(image[order], value[order], order), Samples(order, ("epoch", 2)))
    assert torch.equal(turned.image, whole.image[order])
    torch.testing.assert_close(turned.label, whole.label[order])
