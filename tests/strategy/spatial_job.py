"""`python spatial_job.py OUT`: every case on every grid beside one process, in float64; the largest differences are written to OUT.

One process imports torch and forks the others, before any thread is started.
"""

import contextlib
import faulthandler
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18, squeezenet1_1

from lightning_cnn.functional.spatial import Interval
from lightning_cnn.nn.networks import resnet20
from lightning_cnn.strategy._band import whole
from lightning_cnn.strategy._grid import Grid, Rectangle
from lightning_cnn.strategy.spatial import divide

GRIDS = [(2, 1), (2, 2), (3, 1)]
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


class Fn(nn.Module):
    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


class Frozen(nn.BatchNorm2d):
    pass


def conv(*args, **kwargs):
    return nn.Sequential(nn.Conv2d(*args, **kwargs), nn.ReLU(inplace=True), nn.Conv2d(kwargs.get("out", args[1]), 2, 3, padding=1))


def excite(x, before, layer):
    y = before(x)
    return y * layer(F.adaptive_avg_pool2d(y, 1)).sigmoid() + y


def inplace(x, a, b):
    y = a(x)
    y += b(x)
    y.mul_(2)
    F.relu_(y)
    return y


def branches(x, a, b):
    first, second = a(x).chunk(2, 1)
    return torch.cat([first, b(x), second], 1)[:, 1:]


def c(i=3, o=4, k=3, **kwargs):
    return nn.Conv2d(i, o, k, **{"padding": 1, **kwargs})


CASES = {
    "conv 1x1": lambda: conv(3, 4, 1),
    "conv 1x1 stride 2": lambda: conv(3, 4, 1, stride=2),
    "conv 3x3": lambda: conv(3, 4, 3),
    "conv 3x3 padded": lambda: conv(3, 4, 3, padding=1),
    "conv 3x3 stride 2": lambda: conv(3, 4, 3, stride=2, padding=1),
    "conv 5x3 stride 1x3": lambda: conv(3, 4, (5, 3), stride=(1, 3), padding=(2, 0)),
    "conv 7x7 stride 2 padding 3": lambda: conv(3, 4, 7, stride=2, padding=3),
    "conv 13x1 reaches beyond the neighbour": lambda: conv(3, 4, (13, 1), padding=(6, 0)),
    "conv 2x2 stride 2": lambda: conv(3, 4, 2, stride=2),
    "conv stride 3 over kernel 2": lambda: conv(3, 4, 2, stride=3),
    "conv 4x4 same": lambda: conv(3, 4, 4, padding="same"),
    "conv 3x3 dilated": lambda: conv(3, 4, 3, padding=4, dilation=3),
    "conv same dilated": lambda: conv(3, 4, (3, 2), padding="same", dilation=2),
    "conv valid": lambda: conv(3, 4, 3, padding="valid"),
    "conv padded more than needed": lambda: conv(3, 4, 3, padding=5),
    "conv depthwise": lambda: conv(3, 6, 5, padding=2, groups=3),
    "conv reflect": lambda: conv(3, 4, 5, padding=2, padding_mode="reflect"),
    "conv replicate": lambda: conv(3, 4, 3, padding=1, padding_mode="replicate"),
    "conv circular": lambda: conv(3, 4, 3, padding=1, padding_mode="circular"),
    "max pool 3 stride 2": lambda: nn.Sequential(c(), nn.MaxPool2d(3, 2, 1)),
    "max pool ceil": lambda: nn.Sequential(c(), nn.MaxPool2d(3, 2, ceil_mode=True)),
    "max pool ceil padded": lambda: nn.Sequential(c(), nn.MaxPool2d((2, 3), (2, 3), (1, 0), ceil_mode=True)),
    "max pool dilated": lambda: nn.Sequential(c(), nn.MaxPool2d(3, 1, 1, dilation=2)),
    "avg pool": lambda: nn.Sequential(c(), nn.AvgPool2d(3, 2, 1)),
    "avg pool inside": lambda: nn.Sequential(c(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "avg pool ceil": lambda: nn.Sequential(c(), nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=True)),
    "avg pool divisor": lambda: nn.Sequential(c(), nn.AvgPool2d(2, divisor_override=3)),
    "adaptive avg pool 1": lambda: nn.Sequential(c(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    "adaptive avg pool 7x3": lambda: nn.Sequential(c(), nn.AdaptiveAvgPool2d((7, 3)), nn.Conv2d(4, 2, 3)),
    "adaptive max pool": lambda: nn.Sequential(c(), nn.AdaptiveMaxPool2d(2)),
    "mean": lambda: Fn(lambda x, a: a(x).mean((2, 3)), c()),
    "mean of everything": lambda: Fn(lambda x, a: a(x).mean(), c()),
    "batch norm": lambda: nn.Sequential(c(), nn.BatchNorm2d(4), nn.ReLU(), c(4)),
    "batch norm in evaluation": lambda: nn.Sequential(c(), Frozen(4), c(4)),
    "group norm": lambda: nn.Sequential(c(), nn.GroupNorm(2, 4), c(4)),
    "instance norm": lambda: nn.Sequential(c(), nn.InstanceNorm2d(4, affine=True), c(4)),
    "layer norm (put together)": lambda: nn.Sequential(c(), nn.LayerNorm(19)),
    "local response norm": lambda: nn.Sequential(c(), nn.LocalResponseNorm(3), c(4)),
    "pads": lambda: nn.Sequential(c(), nn.ZeroPad2d((1, 2, 0, 3)), nn.ReflectionPad2d((2, 1, 1, 2)), nn.ConstantPad2d(-2, 0), c(4)),
    "slices": lambda: Fn(lambda x, a, b: b(a(x)[:, :3, ::2, 1:-1]), c(), c()),
    "its length": lambda: Fn(lambda x, a, b: b(a(x) / len(x)), c(), c(4)),
    "squeeze and excitation": lambda: Fn(excite, c(), nn.Conv2d(4, 4, 1)),
    "in place": lambda: Fn(inplace, c(), c()),
    "branches": lambda: Fn(branches, c(), c()),
    "position bias": lambda: Fn(lambda x, a, b: a(x) + b(torch.ones(1, 3, 17, 19)), c(), c()),
    "dropout": lambda: nn.Sequential(c(), nn.Dropout(0.4), c(4), nn.Dropout2d(0.4)),
    "interpolate (put together)": lambda: Fn(lambda x, a, b: b(F.interpolate(a(x), scale_factor=2)), c(), c(4)),
    "transposed (put together)": lambda: nn.Sequential(c(), nn.ConvTranspose2d(4, 2, 3, 2), nn.Conv2d(2, 2, 3)),
    "flatten": lambda: nn.Sequential(c(), nn.Flatten(), nn.LazyLinear(3)),
    "shrinks to less than a row each": lambda: nn.Sequential(c(k=17, padding=0), nn.Conv2d(4, 2, 1)),
    "resnet18": lambda: resnet18(num_classes=3),
    "resnet20 with sliced shortcuts": lambda: resnet20(num_classes=3),
    "squeezenet": lambda: squeezenet1_1(num_classes=3),
    "mobilenet_v3": lambda: mobilenet_v3_small(num_classes=3),
}
SIZES = {"resnet18": (33, 40), "resnet20 with sliced shortcuts": (16, 20), "squeezenet": (40, 33), "mobilenet_v3": (48, 33)}


def run(net, x, target, cut):
    torch.manual_seed(1)
    for module in net.modules():
        module.training = not isinstance(module, Frozen)
    optimizer = torch.optim.SGD([x, *net.parameters()], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        output = whole(net(cut(x)))
        ((output - target[: output.numel()].view_as(output)) ** 2).mean().backward()
        gradients = [p.grad.clone() for p in [x, *net.parameters()]]
        optimizer.step()
    return output.detach(), gradients, [v.detach().clone() for v in net.state_dict().values()]


def distance(a, b):
    return float(((a - b).abs() / b.abs().clamp(min=1)).max()) if b.numel() else 0.0


def case(make, size, grid):
    torch.manual_seed(0)
    net = make()
    x = torch.randn(2, 3, *size, requires_grad=True)
    net(x.detach())  # lazy layers, and the first running statistics
    state = {key: value.clone() for key, value in net.state_dict().items()}
    target = torch.randn(20_000)
    alone = run(net, x.detach().clone().requires_grad_(), target, lambda x: x)
    net.load_state_dict(state)
    mine = run(net, x.detach().clone().requires_grad_(), target, lambda x: divide(x, grid))
    own = Rectangle(Interval(0, 0), Interval(0, 0)) if not grid.fits(size) else grid.own(size)
    part = (..., slice(*own.rows), slice(*own.columns))
    return {
        "forward": distance(mine[0], alone[0]),
        "picture's gradient": distance(mine[1][0][part], alone[1][0][part]),
        "gradients": max(map(distance, mine[1][1:], alone[1][1:])),
        "weights and statistics": max(map(distance, mine[2], alone[2])),
        "put together": sorted(grid.gathered),
    }


def work(rank, height, width, out):
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store{height}{width}", rank=rank, world_size=height * width, timeout=timedelta(seconds=20)
    )
    chosen = {name: make for name, make in CASES.items() if len(sys.argv) < 3 or sys.argv[2] in name}
    if (height, width) != (2, 1):
        chosen = {name: make for name, make in chosen.items() if name not in SIZES}
    facts = {}
    faulthandler.dump_traceback_later(60, exit=True)
    for name, make in chosen.items():
        try:
            facts[name] = case(make, SIZES.get(name, (17, 19)), Grid(height, width, rank))
        except Exception as error:
            raise RuntimeError(f"case {name!r} on {height}x{width}") from error
    Path(out, f"{height}x{width}-{rank}.json").write_text(json.dumps(facts))


def main():
    out = sys.argv[1]
    for height, width in GRIDS:
        children = []
        for rank in range(height * width):
            if (child := os.fork()) == 0:
                try:
                    work(rank, height, width, out)
                    os._exit(0)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        codes = []
        for _ in children:
            child, code = os.wait()
            codes.append(code)
            if code:
                for other in children:
                    if other != child:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(other, 9)
        if any(codes):
            sys.exit(1)


if __name__ == "__main__":
    main()
