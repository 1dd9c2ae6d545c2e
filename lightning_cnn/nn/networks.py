"""Small networks for recipes: quick to train on a CPU, plain to read."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["resnet20", "small_cnn"]


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
