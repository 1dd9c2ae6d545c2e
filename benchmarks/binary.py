"""One bit against float32 and int8: convolutions of ResNet-18, and the whole network, bit-packed, on this CPU.

python benchmarks/binary.py [--quick] [--json FILE] [--threads 1] [--only layers|batches|network|breakdown|limit]

Packing the float input is part of our time. `breakdown` says where the time of the packed network goes. `limit` compares the kernel
alone with what the vector ports could do at most.
"""

import argparse
import time
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from _bench import Row, compare, interleave, medians, missing, report
from numba import njit
from torch import nn

from lightning_cnn.kernels.bits import Geometry
from lightning_cnn.kernels.xnor import panels, prefers_tables
from lightning_cnn.nn import pack
from lightning_cnn.nn.packed import xnor_conv2d
from lightning_cnn.precision import xnor_net

SHAPES = [(64, 56), (128, 28), (256, 14), (512, 7)]
PRODUCTS_A_CYCLE = 341  # 9 vector instructions do 768, on four ports


def layer_rows(channels: int, size: int, batch: int, threads: int, n: int) -> list[Row]:
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).eval()
    holder = nn.Sequential(conv)
    x = torch.randn(batch, channels, size, size)
    x_last, w_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, conv.weight.detach()))
    weight = conv.weight.detach().clone()
    xnor_net(keep=(), scale=False).convert_module(holder)
    packed = pack(holder)
    functions = {
        "packed": lambda: packed(x_last),
        "nchw": lambda: F.conv2d(x, weight, padding=1),
        "channels_last": lambda: F.conv2d(x_last, w_last, padding=1),
    }
    row, peer = f"conv 3x3 {channels}x{size}x{size} batch {batch} threads {threads}", "oneDNN int8"
    try:
        functions["int8"] = int8(x, weight)
        functions["int8"]()
    except (RuntimeError, ImportError, AttributeError):
        functions.pop("int8", None)
    times = timed(functions, n)
    rows = [best_float(row, times, n, bar=12)]
    if "int8" in times:
        return [*rows, compare(row, peer, times["packed"], times["int8"], "ms", larger_is_better=False, bar=4, n=n)]
    return [*rows, missing(row, peer, "a torch build with the onednn quantized engine")]


def int8(x: torch.Tensor, weight: torch.Tensor):
    from torch.ao.nn.quantized import Conv2d

    torch.backends.quantized.engine = "onednn"
    layer = Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    layer.set_weight_bias(torch.quantize_per_tensor(weight, 0.02, 0, torch.qint8), torch.zeros(len(weight)))
    layer.scale, layer.zero_point = 0.5, 0
    quantized = torch.quantize_per_tensor(x, 0.02, 64, torch.quint8).contiguous(memory_format=torch.channels_last)
    return lambda: layer(quantized)


def network_row(threads: int, n: int) -> Row:
    """torchvision's ResNet-18, its ReLUs dropped by the plugin, first and last layer float; batch 1, 224 x 224."""
    plain, plain_last = torchvision.models.resnet18().eval(), torchvision.models.resnet18().eval()
    plain_last.to(memory_format=torch.channels_last)
    packed, last = packed_network()
    x = last.contiguous()
    functions = {"packed": lambda: packed(last), "nchw": lambda: plain(x), "channels_last": lambda: plain_last(last)}
    return best_float(f"ResNet-18 batch 1 threads {threads}", timed(functions, n), n, bar=6)


def packed_network() -> tuple[nn.Module, torch.Tensor]:
    binary = torchvision.models.resnet18().eval()
    xnor_net().convert_module(binary)
    x = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    return pack(binary).to(memory_format=torch.channels_last), x


PARTS = ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")


def breakdown_rows(threads: int, n: int) -> list[Row]:
    """Milliseconds of each part of the packed network, of the whole, and of what lies between the parts."""
    network, x = packed_network()
    taken: dict[str, list[float]] = {name: [0.0] for name in (*PARTS, "whole")}
    watch(network, taken["whole"])
    for name in PARTS:
        watch(network.get_submodule(name), taken[name])
    rounds = []
    for _ in range(3 + n):
        for spent in taken.values():
            spent[0] = 0.0
        network(x)
        rounds.append({name: 1e3 * spent[0] for name, spent in taken.items()})
    found = {name: median(one[name] for one in rounds[3:]) for name in taken}
    found["between the parts"] = found["whole"] - sum(found[name] for name in PARTS)
    return [Row(f"packed ResNet-18, {name}, threads {threads}", "-", ms, None, "ms", n=n) for name, ms in found.items()]


def watch(module: nn.Module, spent: list[float]) -> None:
    """Add the seconds of each call to `spent[0]`."""
    forward = module.forward

    def timed_forward(*inputs):
        start = clock()
        output = forward(*inputs)
        spent[0] += clock() - start
        return output

    module.forward = timed_forward


def best_float(row: str, times: dict[str, float], n: int, bar: float) -> Row:
    layout = min(("nchw", "channels_last"), key=lambda name: times[name])
    return compare(row, f"oneDNN float32 ({layout})", times["packed"], times[layout], "ms", larger_is_better=False, bar=bar, n=n)


def timed(functions: dict, n: int) -> dict[str, float]:
    interleave({name: lambda f=f: took(f) for name, f in functions.items()}, 3)
    return {name: 1e3 * t for name, t in medians(interleave({k: lambda f=f: took(f) for k, f in functions.items()}, n)).items()}


def took(function) -> float:
    """Seconds; of one thread its processor time, which a busy neighbour does not change."""
    start = clock()
    function()
    return clock() - start


def clock() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def limit_rows(n: int) -> list[Row]:
    """The convolution of packed words alone, as a share of the port limit (see the kernel)."""
    rows = []
    for channels, size in SHAPES:
        geometry = Geometry(channels, 3, 3, padding_h=1, padding_w=1)
        panel = torch.from_numpy(panels(torch.randn(channels, channels, 3, 3).numpy() < 0)).clone()
        words, finish = torch.randint(-(2**62), 2**62, (1, size, size, channels // 64)), torch.ones(4, channels)
        work = {"packed": lambda a=(words, panel, finish, channels, geometry, False): xnor_conv2d(*a)}
        took = timed(work, n)["packed"] / 1e3
        products = size * size * channels * channels * 9 / took / 1e9
        most = PRODUCTS_A_CYCLE * cycles_a_second() / 1e9
        row = f"packed words 3x3 {channels}x{size}x{size}, share of the port limit"
        rows.append(compare(row, "AVX2 look-ups at most", products, most, "G/s", larger_is_better=True, n=n))
    return rows


def cycles_a_second() -> float:
    """The clock under load: a chain of dependent additions, one a cycle."""
    count = 20_000_000
    chain(1000)
    return max(count / took(lambda: chain(count)) for _ in range(5))


@njit
def chain(count):
    # a step of xorshift is six dependent instructions of one cycle each, which no compiler shortens
    x = np.uint64(88172645463325252)
    for _ in range(count // 6):
        x ^= x << np.uint64(13)
        x ^= x >> np.uint64(7)
        x ^= x << np.uint64(17)
    return x


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("layers", "batches", "network", "breakdown", "limit"))
    arguments = parser.parse_args()
    n, rows, start = (20 if arguments.quick else 100), [], time.perf_counter()
    print(f"kernel: {'AVX2 table look-ups' if prefers_tables() else 'vector popcount'}")
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        if arguments.only in (None, "layers"):
            rows += [row for shape in SHAPES for row in layer_rows(*shape, 1, arguments.threads, n)]
        if arguments.only in (None, "batches"):
            rows += [row for shape in SHAPES for row in layer_rows(*shape, 8, arguments.threads, n // 5)]
        if arguments.only in (None, "network"):
            rows.append(network_row(arguments.threads, n // 5))
        if arguments.only in (None, "breakdown"):
            rows += breakdown_rows(arguments.threads, n)
        if arguments.only in (None, "limit") and prefers_tables():
            rows += limit_rows(n)
    report(rows, arguments.json)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
