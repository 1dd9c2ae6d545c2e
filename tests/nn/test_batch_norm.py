import pytest
import torch
from torch import nn

from lightning_cnn.nn import reestimate_batch_norm


def test_batches_of_any_size_give_the_statistics_of_the_whole_set():
    images = torch.randn(10, 3, 4, 4) * 2 + 1
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    assert reestimate_batch_norm(model, images.split([4, 4, 2]), model) == 1
    pixels = images.transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[0].running_mean, pixels.mean(1))
    torch.testing.assert_close(model[0].running_var, pixels.var(1))


def test_a_failing_batch_leaves_the_old_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)], model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model[0].training and not model[0]._forward_pre_hooks
