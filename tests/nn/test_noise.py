"""Noisy layers are plain in evaluation, and their noise depends on the key while there is one."""

import pytest
import torch
from torch import nn

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.nn import DropConnectConv2d, DropConnectLinear, Dropout, StochasticDepth

LAYERS = [
    (DropConnectLinear(6, 5, p=0.5), nn.Linear, (8, 6)),
    (DropConnectConv2d(6, 4, 3, padding=1, groups=2, padding_mode="circular", p=0.3), nn.Conv2d, (8, 6, 5, 5)),
    (Dropout(0.5), None, (8, 6, 5, 5)),
    (StochasticDepth(0.5), None, (8, 6, 5, 5)),
]
every = pytest.mark.parametrize(("layer", "plain", "shape"), LAYERS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")


@every
def test_evaluation_is_the_plain_layer(layer, plain, shape):
    x = torch.randn(shape)
    expected = plain.forward(layer, x) if plain else x
    assert torch.equal(layer.eval()(x), expected)
    assert not torch.equal(layer.train()(x), expected)


@every
def test_a_key_makes_noise_a_function_of_the_sample(layer, plain, shape):
    x = torch.randn(1, *shape[1:]).expand(shape)
    layer.train()
    layer.source.keyed(3, torch.tensor([5, 6, 5, 7, 8, 9, 10, 11]), x.device)
    state = torch.get_rng_state()
    y = layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y[0], y[2])
    assert len({row.sum().item() for row in y}) > 1
    assert torch.equal(layer(x), y)
    layer.source.free()
    assert not torch.equal(layer(x), y)


@every
def test_unkeyed_noise_is_seeded_like_any_dropout(layer, plain, shape):
    x = torch.randn(shape)
    layer.train()
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


@every
def test_it_compiles_whole_and_a_new_key_is_no_new_program(layer, plain, shape):
    torch._dynamo.reset()
    compiled = torch.compile(layer.train(), fullgraph=True, backend="aot_eager")
    x, index = torch.randn(shape), torch.arange(shape[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for key in range(3):
            layer.source.keyed(key, index, x.device)
            torch.testing.assert_close(compiled(x), layer(x))
    layer.source.free()


def test_a_wrong_probability_is_refused():
    with pytest.raises(ConfigurationError, match=r"Dropout needs a probability between 0 and 1; got p=1.5"):
        Dropout(1.5)
