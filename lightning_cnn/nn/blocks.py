"""What stands in for a convolution at a lower price: stacks of small filters, bottlenecks, factorised and separable filters.

Each takes the place of a `Conv2d` with the same inputs, outputs, stride and output size. Weights for C inputs and outputs:
`SmallFilterStack` 27 C^2 for a 7x7's 49 C^2, `Bottleneck` 3.25 C^2 for 9 C^2, `FactorizedConv` 6 C^2 for 9 C^2, `SeparableConv` C^2 + 9 C.

Source: CS231n 2016, lecture 11, "How to stack them"; Jaderberg et al. 2014, arXiv:1405.3866 (factorised in two, initialised by SVD);
Howard et al. 2017, arXiv:1704.04861 (depthwise separable).
"""

import torch
from torch import Tensor, nn

Pair = tuple[int, int]


class SmallFilterStack(nn.Sequential):
    """As many 3x3 convolutions as see what one `kernel` x `kernel` sees, with ReLU between; the last one takes the stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int | Pair = 1, bias: bool = True) -> None:
        count = (kernel - 1) // 2
        if kernel % 2 == 0 or count < 1:
            raise ValueError(f"3x3 filters stack to odd sizes from 3; got kernel={kernel}.")
        layers: list[nn.Module] = []
        for place in range(count):
            last = place == count - 1
            layers.append(nn.Conv2d(outputs if place else inputs, outputs, 3, stride if last else 1, padding=1, bias=bias))
            if not last:
                layers.append(nn.ReLU())
        super().__init__(*layers)


class Bottleneck(nn.Sequential):
    """1x1 to `middle` channels (half of the outputs unless given), KxK among them, 1x1 to `outputs`, with ReLU between."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, middle: int | None = None, stride: int | Pair = 1, bias: bool = True
    ) -> None:
        middle = middle or max(1, outputs // 2)
        super().__init__(
            nn.Conv2d(inputs, middle, 1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(middle, middle, kernel, stride, padding=kernel // 2, bias=bias),
            nn.ReLU(),
            nn.Conv2d(middle, outputs, 1, bias=bias),
        )


class FactorizedConv(nn.Sequential):
    """1xK to `rank` channels (the outputs unless given), then Kx1, with nothing between."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Pair = 3,
        *,
        rank: int | None = None,
        stride: int | Pair = 1,
        padding: int | Pair | None = None,
        dilation: int | Pair = 1,
        bias: bool = True,
    ) -> None:
        (r, s), (down, across), (dr, ds) = _pair(kernel), _pair(stride), _pair(dilation)
        pr, ps = _pair(padding) if padding is not None else (dr * (r - 1) // 2, ds * (s - 1) // 2)
        rank = rank or outputs
        super().__init__(
            nn.Conv2d(inputs, rank, (1, s), (1, across), (0, ps), (1, ds), bias=False),
            nn.Conv2d(rank, outputs, (r, 1), (down, 1), (pr, 0), (dr, 1), bias=bias),
        )

    @classmethod
    def of(cls, conv: nn.Conv2d, rank: int | None = None) -> "FactorizedConv":
        """The closest one to `conv` (least squares over weights): equal to it from rank min(inputs * K, outputs * K) on."""
        outputs, inputs, r, s = conv.weight.shape
        rank = min(rank or outputs, inputs * s, outputs * r)
        made = cls(
            inputs, outputs, (r, s), rank=rank, stride=_both(conv.stride), padding=_both(conv.padding), dilation=_both(conv.dilation),
            bias=conv.bias is not None,
        ).to(conv.weight)  # fmt: skip
        U, S, V = torch.linalg.svd(
            conv.weight.detach().double().permute(0, 2, 1, 3).reshape(outputs * r, inputs * s), full_matrices=False
        )
        root = S[:rank].sqrt()
        _fill(made[0], (root[:, None] * V[:rank]).view(rank, inputs, 1, s), None)
        _fill(made[1], (U[:, :rank] * root).view(outputs, r, rank, 1).transpose(1, 2), conv.bias)
        return made


class SeparableConv(nn.Sequential):
    """KxK for each channel on its own, then 1x1 over channels."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Pair = 3,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | None = None,
        dilation: int | Pair = 1,
        bias: bool = True,
    ) -> None:
        (r, s), (dr, ds) = _pair(kernel), _pair(dilation)
        padding = padding if padding is not None else (dr * (r - 1) // 2, ds * (s - 1) // 2)
        super().__init__(
            nn.Conv2d(inputs, inputs, (r, s), stride, padding, dilation, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=bias),
        )

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "SeparableConv":
        """The closest one to `conv`: for each input channel, the best rank-one product of a filter and its weights in the outputs."""
        outputs, inputs, r, s = conv.weight.shape
        made = cls(
            inputs, outputs, (r, s), stride=_both(conv.stride), padding=_both(conv.padding), dilation=_both(conv.dilation),
            bias=conv.bias is not None,
        ).to(conv.weight)  # fmt: skip
        U, S, V = torch.linalg.svd(conv.weight.detach().double().transpose(0, 1).reshape(inputs, outputs, r * s), full_matrices=False)
        root = S[:, :1].sqrt()
        _fill(made[0], (root * V[:, 0]).view(inputs, 1, r, s), None)
        _fill(made[1], (root * U[:, :, 0]).T.reshape(outputs, inputs, 1, 1), conv.bias)
        return made


def _fill(conv: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight.copy_(weight)
        if conv.bias is not None and bias is not None:
            conv.bias.copy_(bias)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def _both(value: tuple[int, ...] | str) -> Pair:
    assert not isinstance(value, str)
    return (value[0], value[1])
