"""Small networks for recipes: quick to train on a CPU, plain to read."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cnn.nn.blocks import SmallFilterStack

__all__ = ["large_filters", "resnet20", "small_cnn", "small_filters"]


def small_cnn(*, num_classes: int, in_channels: int = 1, width: int = 32) -> nn.Module:
    """Three stages of 3x3 convolutions for pictures of 8 to 32 pixels; 0.1 M parameters at width 32."""

    def stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(
        stage(in_channels, width),
        nn.Sequential(stage(width, 2 * width), nn.MaxPool2d(2)),
        nn.Sequential(stage(2 * width, 4 * width), nn.AdaptiveMaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(16 * width, num_classes),
    )


def large_filters(*, num_classes: int, in_channels: int = 1, width: int = 32) -> nn.Module:
    """Two stages of one 7x7 convolution each, for pictures of 8 to 32 pixels: what `small_filters` is compared with."""
    return _two_stages(num_classes, in_channels, width, lambda inputs, outputs: nn.Conv2d(inputs, outputs, 7, padding=3))


def small_filters(*, num_classes: int, in_channels: int = 1, width: int = 32) -> nn.Module:
    """`large_filters` with each 7x7 replaced by three 3x3 with ReLU between: the same receptive field, 27/49 of the weights."""
    return _two_stages(num_classes, in_channels, width, lambda inputs, outputs: SmallFilterStack(inputs, outputs, 7))


def _two_stages(num_classes: int, in_channels: int, width: int, convolution: Callable[[int, int], nn.Module]) -> nn.Module:
    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [convolution(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]

    stem = [nn.Conv2d(in_channels, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
    body = [*stage(width, width), nn.MaxPool2d(2), *stage(width, width)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads with zeros (option A): no parameters in it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + shortcut)


class _ResNet20(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(_BasicBlock(16, 32, 2), _BasicBlock(32, 32, 1), _BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(_BasicBlock(32, 64, 2), _BasicBlock(64, 64, 1), _BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def resnet20(*, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The 0.27 M-parameter ResNet for 32-pixel pictures.

    Source: He et al. 2015, "Deep residual learning", section 4.2, arXiv:1512.03385.
    """
    return _ResNet20(num_classes, in_channels)
