"""Adam in one pass equals torch's Adam on float32 copies, then rounded."""

import numpy as np
import pytest
import torch

from lightning_cnn.functional.rounding import round_stochastic
from lightning_cnn.precision import StochasticRounding

NOISE = {"seed": 3, "step": 1, "stream": "0/weight"}


def stepped(storage, size, threads=1, optimizer=torch.optim.AdamW, **options):
    """A layer after one step of the plugin, its state, and what torch does to float32 copies."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(size, 1, bias=False)
    plugin = StochasticRounding(states=storage, seed=3)
    plugin.convert_module(layer)
    layer.weight.grad = torch.randn_like(layer.weight)
    copy = torch.nn.Parameter(layer.weight.detach().float())
    copy.grad = layer.weight.grad.float()
    ours, theirs = optimizer(layer.parameters(), **options), optimizer([copy], **options)
    plugin.connect(layer, [ours], [])
    plugin._steps = [1]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert plugin._step_fused(ours) == {layer.weight}
    torch.set_num_threads(before)
    theirs.step()
    return layer.weight.detach(), ours.state[layer.weight], copy.detach(), theirs.state[copy]


@pytest.mark.parametrize("size", [5, 1024, 5000])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.AdamW, {"lr": 0.1}), (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.3, "maximize": True})],
    ids=["adamw", "adam"],
)
@pytest.mark.parametrize("storage", ["fp32", "bf16", "8bit"])
def test_a_step_is_the_optimizers_rounded_with_the_same_noise(storage, optimizer, options, size):
    """A last bit of float32 tips one rounding in 2**15 or so; of 5000 weights none or one."""
    weight, state, expected, reference = stepped(storage, size, optimizer=optimizer, **options)
    assert (weight != round_stochastic(expected, "bf16", **NOISE)).sum() <= 2
    for name in ("exp_avg", "exp_avg_sq"):
        if storage == "fp32":
            torch.testing.assert_close(state[name], reference[name], rtol=2e-6, atol=1e-12)
        elif storage == "bf16":
            noise = NOISE | {"stream": f"0/weight/{name}"}
            assert (state[name] != round_stochastic(reference[name], "bf16", **noise)).sum() <= 2
        else:
            error = (state[name].unpack(weight) - reference[name]).abs()
            assert (error <= reference[name].abs() / 4 + reference[name].abs().max() * 2.0**-16).all()


def test_two_threads_make_the_same_bits():
    one, two = (stepped("8bit", 600_000, threads) for threads in (1, 2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1]["exp_avg"].codes, two[1]["exp_avg"].codes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(value):
    torch.manual_seed(0)
    layer = torch.nn.Linear(2048, 1, bias=False)
    plugin = StochasticRounding()
    plugin.convert_module(layer)
    layer.weight.grad = torch.randn_like(layer.weight)
    layer.weight.grad[0, 100] = value
    optimizer = torch.optim.AdamW(layer.parameters())
    plugin.connect(layer, [optimizer], [])
    plugin._step_fused(optimizer)
    assert layer.weight.isfinite().logical_not().nonzero().tolist() == [[0, 100]]
