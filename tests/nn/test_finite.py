"""The first layer to blame is found by running it."""

import pytest
import torch
from torch import nn

from lightning_cnn.nn.finite import all_finite, bad_rows, first_nonfinite


class Log(nn.Module):
    def forward(self, x):
        return x.log()


def test_the_first_layer_in_order_of_execution_is_named_with_its_rows():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), Log(), nn.Linear(2, 2))
    nn.init.eye_(net[0].weight)
    x = torch.tensor([[1.0, 2.0], [1.0, -1.0], [0.0, 1.0]])
    assert first_nonfinite(net, lambda: net(x)) == ("1", [1, 2])
    assert first_nonfinite(net, lambda: net(x.abs() + 1)) is None
    assert all(not module._forward_hooks for module in net)


def test_hooks_go_when_the_run_fails():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        first_nonfinite(net, lambda: net(torch.ones(1, 3)))
    assert not net[0]._forward_hooks


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_is_enough(value):
    tensors = [torch.ones(3), torch.ones(2, 2), torch.ones(2, dtype=torch.bfloat16), torch.arange(2)]
    assert all_finite(tensors)
    assert all_finite([])
    tensors[1][1, 0] = value
    assert not all_finite(tensors)
    assert bad_rows(tensors[1]) == [1]
    assert bad_rows(tensors[0]) is None
