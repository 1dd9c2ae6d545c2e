"""Frozen is constant, and undone it is as before."""

import torch
from torch import nn

from lightning_cnn.nn.freezing import Freezer


def test_freezing_is_undone_exactly():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3))
    model[3].requires_grad_(False)
    model[2].eval()
    before = [(p.requires_grad, m.training) for m in model for p in m.parameters()], [m.training for m in model.modules()]
    freezer = Freezer()
    freezer.freeze([model], model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    freezer.undo()
    assert ([(p.requires_grad, m.training) for m in model for p in m.parameters()], [m.training for m in model.modules()]) == before


def test_hold_stands_against_train():
    model = nn.Sequential(nn.BatchNorm2d(4))
    freezer = Freezer()
    freezer.still([model[0]])
    model.train()
    freezer.hold()
    assert not model[0].training
    model(torch.full((2, 4, 1, 1), 7.0))
    assert torch.equal(model[0].running_mean, torch.zeros(4))


def test_two_freezers_do_not_wake_each_others_modules():
    layer = nn.BatchNorm2d(4)
    first, second = Freezer(), Freezer()
    first.still([layer])
    second.still([layer])
    second.undo()
    assert not layer.training
    first.undo()
    assert layer.training
