"""Features by layer, and linear classifiers on them."""

import pytest
import torch
from torch import nn

from lightning_cnn.errors import DataError, UnsupportedLayerError
from lightning_cnn.nn import features
from lightning_cnn.nn.features import image_of, label_of, pooled
from lightning_cnn.nn.probe import linear_probe, shots


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.LazyLinear(2))


def batches(n=3):
    return [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(n)]


def test_features_are_what_the_layer_gives_in_evaluation_mode():
    model, data = net(), batches()
    model(data[0][0])
    found, labels = features(model, ["2"], data, pool="none")
    expected = torch.cat([model[2](model[0](image)) for image, _ in data])
    torch.testing.assert_close(found["2"], expected)
    assert labels.tolist() == [0, 1, 2, 3] * 3
    assert model.training and model[1].training and not any(m._forward_hooks for m in model)


def test_nothing_behind_the_last_layer_runs():
    model = net()
    model[5] = nn.Module()  # has no forward
    found, _ = features(model, ["0", "3"], batches(1))
    assert {name: tuple(value.shape) for name, value in found.items()} == {"0": (4, 8), "3": (4, 10)}


def test_pooling_is_mean_and_maximum():
    maps = torch.randn(2, 3, 4, 4)
    assert torch.equal(pooled(maps), torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))


def test_unknown_and_unreached_layers_are_named():
    with pytest.raises(UnsupportedLayerError, match="no module 'conv9'"):
        features(net(), ["conv9"], batches(1))
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.spare = nn.Identity()
    model.forward = lambda x: model[0](x)
    with pytest.raises(UnsupportedLayerError, match="spare did not run"):
        features(model, ["0", "spare"], batches(1))


def test_batches_of_any_usual_kind_are_read_and_others_refused():
    image, label = batches(1)[0]
    assert image_of({"picture": image}) is image and image_of(image) is image and label_of({"label": label}) is label
    with pytest.raises(DataError, match="holds no picture"):
        image_of([label])
    with pytest.raises(DataError, match="holds no labels"):
        label_of([image])
    with pytest.raises(DataError, match="gave no batch"):
        features(net(), ["0"], [])


@pytest.mark.parametrize("kind", ["logistic", "svm"])
def test_a_probe_separates_what_is_linearly_separable_and_guesses_on_noise(kind):
    x, y = torch.randn(200, 5), torch.arange(200) % 2
    assert abs(linear_probe(x[:100], y[:100], x[100:], y[100:], kind=kind).accuracy - 0.5) < 0.2
    x[:, 0] += 6 * y
    assert linear_probe(x[:100], y[:100], x[100:], y[100:], kind=kind).accuracy > 0.95


def test_noise_dimensions_ask_for_more_regularisation():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 200, generator=generator), torch.arange(120) % 2
    x[:, 0] += 1.5 * y
    assert linear_probe(x[:80], y[:80], x[80:], y[80:]).C <= 0.01


def test_shots_are_nested_balanced_and_reproducible():
    labels = torch.arange(60) % 3
    five, ten = shots(labels, 5, seed=1), shots(labels, 10, seed=1)
    assert labels[five].bincount().tolist() == [5, 5, 5]
    assert set(five.tolist()) <= set(ten.tolist())
    assert torch.equal(five, shots(labels, 5, seed=1)) and not torch.equal(five, shots(labels, 5, seed=2))
    with pytest.raises(DataError, match="class 0 has 20 samples, 21 were asked for"):
        shots(labels, 21)
