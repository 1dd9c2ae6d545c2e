"""The digits: the same test pictures for every seed, the asked-for number of labels, and plain refusals."""

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_cnn.data import Digits
from lightning_cnn.errors import ConfigurationError


def ready(**options):
    data = Digits(**options)
    data.setup()
    return data


def test_every_picture_is_in_exactly_one_split():
    data = ready()
    assert (len(data.train), len(data.validation), len(data.test)) == (997, 200, 600)
    raw = torch.from_numpy(load_digits().images).flatten(1)
    every = torch.cat([part.tensors[0].flatten(1) for part in (data.train, data.validation, data.test)])
    assert torch.equal((every / 255 * 16).round().unique(dim=0, return_counts=True)[1], raw.unique(dim=0, return_counts=True)[1])


def test_seeds_choose_the_labelled_pictures_and_never_the_test_pictures():
    one, two = ready(shots=3, seed=1), ready(shots=3, seed=2)
    assert torch.bincount(one.train.tensors[1]).tolist() == [3] * 10
    assert not torch.equal(one.train.tensors[0], two.train.tensors[0])
    assert torch.equal(one.test.tensors[0], two.test.tensors[0])


def test_batches_are_uint8_with_labels_and_indices():
    batch = next(iter(ready(batch_size=8, size_px=16, channels=3).train_dataloader()))
    assert (batch.image.dtype, tuple(batch.image.shape)) == (torch.uint8, (8, 3, 16, 16))
    assert batch.image.max() > 200
    assert len(set(batch.index.tolist())) == 8


def test_all_that_cannot_be_met_is_said_at_once():
    with pytest.raises(ConfigurationError, match=r"(?s)3 problems.*shots=86.*size_px=4.*channels=2"):
        ready(shots=86, size_px=4, channels=2)
