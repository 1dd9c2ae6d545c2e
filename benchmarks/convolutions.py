"""Convolutions: `auto` against torch in both memory layouts, by layer and by network, for inference and for training.

python benchmarks/convolutions.py [--quick] [--json FILE] [--threads 1] [--only layers|depthwise|layout|networks|training|memory|
    error|summary|peers]
    [--network vgg16] [--layers 0:8]

A group ends within about 90 s where networks are taken one by one and layers some at a time.
"""

import argparse
import copy
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from _bench import Row, compare, interleave, medians, missing, report
from torch import nn

from lightning_cnn.conv import confirm, swap
from lightning_cnn.conv._call import NAMES, Call, load
from lightning_cnn.conv._tuner import rms_error
from lightning_cnn.functional.conv.geometry import Geometry
from lightning_cnn.functional.roofline import roofline
from lightning_cnn.nn import architecture

LAST = torch.channels_last
LONG_S = 0.2  # a peer that takes longer is timed once
CLOSE = 1.15  # a layout in which torch takes so many times the other's time may be the better one for `auto`
HOPELESS = 4.0  # a layout of torch that takes so many times the other's time is timed once
LAYERS = [  # batch, channels, filters, pixels, kernel, stride, groups
    (1, 64, 64, 224, 3, 1, 1), (1, 128, 128, 112, 3, 1, 1), (1, 64, 64, 56, 3, 1, 1), (8, 64, 64, 56, 3, 1, 1), (1, 128, 128, 28, 3,
    1, 1), (1, 256, 256, 14, 3, 1, 1), (1, 512, 512, 7, 3, 1, 1), (8, 512, 512, 7, 3, 1, 1), (1, 512, 512, 28, 3, 1, 1), (1, 64, 128,
    56, 3, 2, 1), (1, 3, 64, 224, 7, 2, 1), (1, 3, 64, 224, 3, 1, 1), (1, 256, 64, 56, 1, 1, 1), (1, 64, 256, 56, 1, 1, 1), (1, 96,
    96, 56, 7, 1, 96), (1, 384, 384, 14, 7, 1, 384), (1, 96, 96, 112, 3, 1, 96), (1, 144, 144, 56, 5, 2, 144), (1, 32, 32, 56, 5, 1,
    1), (1, 16, 16, 64, 31, 1, 1), (1, 256, 256, 28, 13, 1, 256), (1, 128, 128, 56, 31, 1, 128),
    (1, 32, 32, 128, 31, 1, 1), (1, 64, 64, 56, 31, 1, 1),
]  # fmt: skip
DEPTHWISE = [(4, 96, 56, 7, 2.0), (4, 384, 14, 7, 2.0), (2, 256, 28, 13, None), (1, 128, 56, 15, 5.0), (1, 128, 56, 31, 5.0)]
NETWORKS = {
    "vgg16": (1.5, 1.25), "resnet18": (1.4, 1.25), "resnet50": (0.98, 0.98), "convnext_tiny": (0.98, 0.98), "mobilenet_v2": (0.98,
    0.98), "densenet121": (0.98, 0.98), "squeezenet1_1": (0.98, 0.98), "alexnet": (0.98, 0.98),
}  # fmt: skip
SMALL = ("resnet18", "mobilenet_v2", "squeezenet1_1", "alexnet")  # a run takes 15 to 50 ms, which a neighbour shows in
PEERS = {"ai3": "pip install aithree", "fft_conv_pytorch": "pip install fft-conv-pytorch"}


def layer_of(c, k, kernel, stride, groups):
    return nn.Conv2d(c, k, kernel, stride, kernel // 2, groups=groups)


def infer(model, x):
    with torch.inference_mode():
        return model(x)


def train(model, x):
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()


def timed(work, model, x) -> float:
    """Seconds of the second of two runs: what ran before must not decide whose input is in the cache.

    One thread is timed by its processor time, which a busy neighbour does not change.
    """
    work(model, x)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work(model, x)
    return clock() - start


def versus_stock(name: str, model: nn.Module, x: torch.Tensor, work, n: int, bar: float | None, network: bool = False) -> list[Row]:
    """`auto` against torch, each in whichever memory layout is better for it."""
    stock = {"nchw": (model, x), "nhwc": (copy.deepcopy(model).to(memory_format=LAST), x.contiguous(memory_format=LAST))}
    first = {layout: timed(work, *pair) for layout, pair in stock.items()}
    stock = {layout: pair for layout, pair in stock.items() if first[layout] <= HOPELESS * min(first.values())}
    first = medians(interleave({layout: partial(timed, work, *pair) for layout, pair in stock.items()}, max(3, n // 2)))
    close = [layout for layout in stock if first[layout] <= CLOSE * min(first.values())]
    ours = {f"auto {layout}": (swap(copy.deepcopy(stock[layout][0]), "auto", cache=None), stock[layout][1]) for layout in close}
    for pair in ours.values():
        for _ in range(3):
            work(*pair)
        if network:
            confirm(pair[0], partial(work, *pair), rounds=5)
    times = medians(interleave({key: partial(timed, work, *pair) for key, pair in (ours | stock).items()}, n))
    best, theirs = (1e3 * min(times[key] for key in keys) for keys in (ours, stock))
    return [compare(name, "torch", best, theirs, "ms", larger_is_better=False, bar=bar, n=n)]


def layers(options: argparse.Namespace) -> list[Row]:
    rows, quick = [], options.quick
    begin, end = (int(number) if number else None for number in options.layers.split(":"))
    for b, c, k, size, kernel, stride, groups in LAYERS[begin : end : 6 if quick else 1]:
        name = f"layer {b}x{c}x{size} {kernel}x{kernel}/{stride}" + (" depthwise" if groups > 1 else f" to {k}")
        x = torch.randn(b, c, size, size)
        dense = kernel == 31 and groups == 1  # a run of torch takes up to half a second
        n, bar = (5, 8.0) if dense else (25, 0.98)
        rows += versus_stock(name, layer_of(c, k, kernel, stride, groups).eval(), x, infer, 5 if quick else n, bar)
    return rows


def depthwise(options: argparse.Namespace) -> list[Row]:
    rows, quick = [], options.quick
    for b, c, size, kernel, bar in DEPTHWISE[:1] if quick else DEPTHWISE:
        x = torch.randn(b, c, size, size, requires_grad=True)
        name = f"train depthwise {b}x{c}x{size} {kernel}x{kernel}"
        rows += versus_stock(name, layer_of(c, c, kernel, 1, c), x, train, 5 if quick else 9, bar)
    x = torch.randn(1, 16, 64, 64, requires_grad=True)
    return rows + ([] if quick else versus_stock("train dense 1x16x64 31x31", layer_of(16, 16, 31, 1, 1), x, train, 9, 8.0))


def layout(options: argparse.Namespace) -> list[Row]:
    """The other memory layout and back, by itself: for a picture in NCHW where torch has no good loop for it, and where it has."""
    rows, n = [], 5 if options.quick else 9
    for c, kernel, groups in ((128, 15, 128), (64, 3, 1)):
        layer, x = layer_of(c, c, kernel, 1, groups).eval(), torch.randn(1, c, 56, 56)
        models = {"ours": swap(copy.deepcopy(layer), "layout"), "theirs": layer}
        times = medians(interleave({key: partial(timed, infer, model, x) for key, model in models.items()}, n))
        name = f"layout 1x{c}x56 {kernel}x{kernel}" + (" depthwise" if groups > 1 else f" to {c}")
        rows.append(compare(name, "torch nchw", times["ours"] * 1e3, times["theirs"] * 1e3, "ms", larger_is_better=False, n=n))
    return rows


def networks(options: argparse.Namespace) -> list[Row]:
    rows, quick, threads = [], options.quick, options.threads
    chosen = {options.network: NETWORKS[options.network]} if options.network else NETWORKS
    for name, bars in list(chosen.items())[:2] if quick else chosen.items():
        for batch in (1,) if quick else (1, 8) if name == "resnet18" else (1,):
            model = getattr(torchvision.models, name)().eval()
            x = torch.randn(batch, 3, 224, 224)
            n = 5 if quick else 25 if name in SMALL else 9
            rows += versus_stock(f"infer {name}, batch {batch}", model, x, infer, n, bars[min(threads, 2) - 1], True)
    return rows


def training(options: argparse.Namespace) -> list[Row]:
    rows, quick = [], options.quick
    chosen = [each for each in (("resnet18", 4, 112), ("convnext_tiny", 2, 96)) if options.network in (None, each[0])]
    for name, batch, size in chosen[: 1 if quick else 2]:
        model, x = getattr(torchvision.models, name)(), torch.randn(batch, 3, size, size)
        rows += versus_stock(f"train {name}, batch {batch}, {size} px", model, x, train, 3 if quick else 7, 0.98, True)
    return rows


def memory(options: argparse.Namespace) -> list[Row]:
    """Peak memory of one layer beyond a process that only holds its input, each algorithm in a process of its own."""
    peaks = {
        name: _peak_mb(name) for name in (("default", "im2col") if options.quick else [name for name in NAMES if name != "depthwise"])
    }
    layer = "memory beyond the input, 8x64x56 3x3"
    return [compare(f"{layer} {name}", "torch", mb, peaks["default"], "MB", larger_is_better=False, n=1) for name, mb in peaks.items()]


def error(options: argparse.Namespace) -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name in NAMES:
            groups = 256 if name == "depthwise" else 1
            geometry = Geometry(padding=(1, 1), groups=groups)
            call = Call("forward", (2, 256, 14, 14), (256, 256 // groups, 3, 3), geometry, dtype, "cpu", False, 1, False)
            if not load(name).refuses(call):
                stock = rms_error(call, "default")
                row = f"error 256 channels {str(dtype)[6:]} {name}"
                rows.append(compare(row, "torch", rms_error(call, name), stock, "rel. RMS", larger_is_better=False, n=1))
    return rows


def peers(options: argparse.Namespace) -> list[Row]:
    """Each peer's best way on three layers; what a peer cannot compute is a row with its own words."""
    rows = [missing("layers", name, how) for name, how in PEERS.items() if importlib.util.find_spec(name) is None]
    ways = {name: way for name, way in (("fft_conv_pytorch", _fft_conv), ("ai3", _ai3)) if importlib.util.find_spec(name) is not None}
    for c, size, kernel, groups in ((16, 56, 31, 1), (128, 56, 31, 128), (64, 56, 3, 1))[: 1 if options.quick else 3]:
        layer, x = layer_of(c, c, kernel, 1, groups).eval(), torch.randn(1, c, size, size)
        name = f"layer 1x{c}x{size} {kernel}x{kernel}" + (" depthwise" if groups > 1 else f" to {c}")
        ours = swap(copy.deepcopy(layer), "auto", cache=None)
        infer(ours, x)
        for peer, way in ways.items():
            rows += [_against(name, f"{peer} {how}", ours, theirs, layer, x) for how, theirs in way(layer).items()]
    return rows


def _against(name: str, peer: str, ours: nn.Module, theirs: Callable, layer: nn.Module, x: torch.Tensor) -> Row:
    try:
        error = (infer(theirs, x) - infer(layer, x)).abs().max().item()
    except (RuntimeError, AssertionError) as why:
        return Row(name, f"{peer} (refuses: {why})", None, None, "ms")
    if error > 1e-3:
        return Row(name, f"{peer} (wrong by {error:.1g})", None, None, "ms")
    start = time.perf_counter()
    infer(theirs, x)
    first = time.perf_counter() - start
    if first > LONG_S:
        return compare(name, peer, timed(infer, ours, x) * 1e3, first * 1e3, "ms", larger_is_better=False, n=1)
    n = 5
    times = medians(interleave({key: partial(timed, infer, model, x) for key, model in (("ours", ours), ("theirs", theirs))}, n))
    return compare(name, peer, times["ours"] * 1e3, times["theirs"] * 1e3, "ms", larger_is_better=False, n=n)


def _fft_conv(layer: nn.Conv2d) -> dict[str, Callable]:
    from fft_conv_pytorch import fft_conv

    return {"fft_conv": partial(fft_conv, kernel=layer.weight, bias=layer.bias, padding=layer.padding, groups=layer.groups)}


def _ai3(layer: nn.Conv2d) -> dict[str, Callable]:
    import ai3

    def swapped(how: str) -> nn.Module:
        model = nn.Sequential(copy.deepcopy(layer))
        ai3.swap_conv2d(model, how)
        return model

    return {how: swapped(how) for how in ("direct", "smm")}  # its others want cuDNN or a GPU


def summary(options: argparse.Namespace) -> list[Row]:
    """What `ArchitectureSummary` adds to a fit: one measured roofline, and one followed pass of one picture."""
    start = time.perf_counter()
    best = roofline()
    rows = [Row("summary: the machine measured, once", "-", 1e3 * (time.perf_counter() - start), None, "ms", n=1)]
    for name in ("resnet18",) if options.quick else ("resnet18", "convnext_tiny"):
        model, x = getattr(torchvision.models, name)().eval(), torch.randn(1, 3, 224, 224)
        looked = partial(architecture, best=best)
        times = medians(interleave({"ours": partial(timed, looked, model, x), "theirs": partial(timed, infer, model, x)}, 5))
        row = f"summary: one picture through {name}"
        rows.append(compare(row, "torch, forward alone", times["ours"] * 1e3, times["theirs"] * 1e3, "ms", larger_is_better=False, n=5))
    return rows


def _peak_mb(name: str) -> float:
    script = (
        "import re, sys, torch; from pathlib import Path; from lightning_cnn.conv import swap; torch.set_num_threads(1)\n"
        "read = lambda key: int(re.search(key + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "layer = swap(torch.nn.Conv2d(64, 64, 3, padding=1), sys.argv[1]); x = torch.randn(8, 64, 56, 56)\n"
        "with torch.inference_mode():\n"
        "    layer(x[:1, :, :8, :8].contiguous()); Path('/proc/self/clear_refs').write_text('5'); before = read('VmRSS'); layer(x)\n"
        "print((read('VmHWM') - before) / 1024)"
    )
    run = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=True)
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--threads", type=int, default=1)
    sections = {f.__name__: f for f in (layers, depthwise, layout, networks, training, memory, error, summary, peers)}
    parser.add_argument("--only", choices=[*sections])
    parser.add_argument("--network", choices=[*NETWORKS], help="this network alone")
    parser.add_argument("--layers", default=":", help="these rows of LAYERS alone, as begin:end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [row for name, section in sections.items() if arguments.only in (None, name) for row in section(arguments)]
    for row in rows:
        row.row += f", {arguments.threads} thread" + "s" * (arguments.threads > 1)
    report(rows, arguments.json)


if __name__ == "__main__":
    main()
