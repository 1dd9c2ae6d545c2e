"""A head on standardised features that starts as a fitted probe."""

import pytest
import torch
from torch import nn

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.model import Classifier
from lightning_cnn.nn.features import features
from lightning_cnn.nn.probe import linear_form
from lightning_cnn.nn.transfer_head import Standardise, head_probe, start_head, transfer_head


def data(n=60, classes=3, size=32):
    labels = torch.arange(n) % classes
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, size, size, generator=noise) + 0.3 * torch.eye(3)[labels % 3][:, :, None, None]
    return [(images[i : i + 20], labels[i : i + 20]) for i in range(0, n, 20)]


@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_0", "mobilenet_v3_small", "small_cnn"])
def test_any_network_gets_one_and_starts_as_the_probe(architecture):
    """In evaluation mode the logits are those of logistic regression on the standardised features."""
    torch.manual_seed(0)
    model = Classifier(architecture=architecture, classes=3, in_channels=3, head="transfer").eval()
    assert torch.equal(model(data()[0][0]), torch.zeros(20, 3))
    probe = head_probe(model, data())
    start_head(model, probe)
    standardise = next(module for module in model.modules() if isinstance(module, Standardise))
    seen = []
    standardise.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = torch.cat([model(image) for image, _ in data()])
    x = torch.cat(seen)
    torch.testing.assert_close(standardise(x).mean(0), torch.zeros(x.shape[1]), atol=2e-3, rtol=0)
    expected = (x - probe.mean) / probe.std @ probe.weight.T + probe.bias
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_global_average_pooling_becomes_mean_and_maximum():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 9))
    transfer_head(network, 3)
    assert network[-1][-1].in_features == 8
    found, _ = features(network, ["0"], data(), pool="mean+max")
    seen = []
    network[-1][0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.eval()(data()[0][0])
    torch.testing.assert_close(seen[0], found["0"][:20])


def test_a_plain_linear_layer_takes_the_standardisation_into_its_weights():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    probe = head_probe(network, data())
    start_head(network, probe)
    x = network[:3](data()[0][0])
    torch.testing.assert_close(network[3](x), (x - probe.mean) / probe.std @ probe.weight.T + probe.bias, rtol=1e-4, atol=1e-4)


def test_two_classes_get_half_the_logit_each():
    x, y = torch.randn(40, 5), torch.arange(40) % 2
    x[:, 0] += 4 * y
    form = linear_form(x, y)
    assert form.weight.shape == (2, 5) and torch.equal(form.weight[0], -form.weight[1])
    assert (((x - form.mean) / form.std @ form.weight.T + form.bias).argmax(1) == y).float().mean() > 0.9


def test_what_cannot_start_as_a_probe_is_said():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedLayerError, match=r"'1' is a Conv2d.*transfer_head"):
        head_probe(network, data())
    with pytest.raises(UnsupportedLayerError, match=r"of the classes \(0, 1\).*tells 3 apart"):
        head_probe(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), data(classes=2))


def test_constant_features_do_not_divide_by_zero():
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    x[:, 1] = 7
    assert linear_form(x, y).std[1] == 1
