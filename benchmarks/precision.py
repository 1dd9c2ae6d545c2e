"""Stochastic rounding: time of a step, and bytes a parameter, ours and the peers' interleaved in one run.

python benchmarks/precision.py [--quick] [--only optimizer|step] [--json FILE]

`step` times whole training steps of ResNet-18 through a Trainer, in which gradients and activations are rounded too.
Freed memory is kept (mallopt), so that no row pays for fresh pages.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import lightning as L
import torch
from _bench import Row, compare, interleave, medians, missing, report, seconds
from torch import nn
from torch.utils.data import DataLoader

from lightning_cnn.functional.rounding import as_format, formula, round_stochastic
from lightning_cnn.model import Classifier
from lightning_cnn.precision import BinaryNet, FixedPoint, LowBit, StochasticRounding

SIZE = (512, 512, 3, 3)  # one convolution of ResNet's last stage: 2.36 M weights
LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.01
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
TORCHAO, OPTIMI = "pip install torchao", "pip install torch-optimi"


def moments(weight, gradient, m, v):
    """AdamW in float32, without the bias correction that all rows would share."""
    m.lerp_(gradient, 1 - BETA1)
    v.lerp_(gradient * gradient, 1 - BETA2)
    return weight * (1 - LR * DECAY) - LR * m / (v.sqrt() + EPS)


@torch.compile
def adamw_float32(weight, gradient, m, v):
    weight.copy_(moments(weight, gradient, m, v))


@torch.compile
def adamw_stochastic(weight, gradient, m, v, step):
    new = moments(weight.float(), gradient.float(), m, v)
    round_stochastic(new, "bf16", step=step, out=weight)


@torch.compile
def adamw_nearest(weight, gradient, m, v):
    weight.copy_(moments(weight.float(), gradient.float(), m, v))


def tensors(dtype):
    weight, gradient = torch.randn(SIZE).mul_(0.05).to(dtype), torch.randn(SIZE).mul_(0.01).to(dtype)
    return weight, gradient, torch.zeros(SIZE), torch.full(SIZE, 1e-4)


def parameter(dtype):
    weight, gradient, *_ = tensors(dtype)
    weight = nn.Parameter(weight)
    weight.grad = gradient
    return weight


def stock(optimizer, dtype, **options) -> tuple[Callable[[], object], Callable[[], float]]:
    """A step, and the persistent bytes a parameter: weight, gradient and states."""
    weight = parameter(dtype)
    built = optimizer([weight], lr=LR, **options)
    return built.step, lambda: persistent(weight, built)


def plugin(optimizer=torch.optim.AdamW, momentum=None, **options) -> tuple[Callable[[], object], Callable[[], float]]:
    layer = nn.Conv2d(512, 512, 3, bias=False)
    ours = StochasticRounding(**options)
    ours.convert_module(layer)
    layer.weight.grad = torch.randn(SIZE).mul_(0.01).bfloat16()
    optimizer = optimizer(layer.parameters(), lr=LR, fused=True, **({"momentum": momentum} if momentum else {}))
    ours.connect(layer, [optimizer], [])
    ours._after_closure = lambda *_: None  # no Trainer here
    model = SimpleNamespace(automatic_optimization=True)
    return lambda: ours.optimizer_step(optimizer, model, lambda: 0.0), lambda: persistent(layer.weight, optimizer)


def persistent(weight, optimizer) -> float:
    return (weight.nbytes + weight.grad.nbytes + sum(size(value) for value in optimizer.state[weight].values())) / weight.numel()


def size(value) -> int:
    if not isinstance(value, torch.Tensor) and hasattr(value, "nbytes"):  # ours in 8 bits
        return value.nbytes
    if hasattr(value, "__tensor_flatten__"):  # torchao's subclasses
        return sum(getattr(value, name).nbytes for name in value.__tensor_flatten__()[0])
    return value.nbytes if isinstance(value, torch.Tensor) and value.numel() > 1 else 0


def peers() -> dict[str, tuple[Callable[[], object], Callable[[], float]]]:
    found = {
        "AdamW fused float32": stock(torch.optim.AdamW, torch.float32, fused=True),
        "AdamW fused bfloat16, to the nearest": stock(torch.optim.AdamW, torch.bfloat16, fused=True),
    }
    try:
        from torchao.optim import AdamW8bit, _AdamW

        found["torchao _AdamW stochastic"] = stock(_AdamW, torch.bfloat16, bf16_stochastic_round=True)
        found["torchao AdamW8bit stochastic"] = stock(AdamW8bit, torch.bfloat16, bf16_stochastic_round=True)
    except ImportError:
        pass
    try:
        import optimi

        found["optimi AdamW Kahan"] = stock(optimi.AdamW, torch.bfloat16, kahan_sum=True)
    except ImportError:
        pass
    return found


def rows(n: int) -> list[Row]:
    full, low, nearest = tensors(torch.float32), tensors(torch.bfloat16), tensors(torch.bfloat16)
    step = torch.tensor(0)
    x, out = torch.randn(SIZE), torch.empty(SIZE, dtype=torch.bfloat16)
    ours = {f"plugin, moments {states}": plugin(states=states) for states in ("fp32", "bf16", "8bit")}
    others = peers()
    functions = {
        "float32": lambda: adamw_float32(*full),
        "stochastic": lambda: adamw_stochastic(*low, step.add_(1)),
        "nearest": lambda: adamw_nearest(*nearest),
        "round": lambda: round_stochastic(x, "bf16", out=out),
        "formula": lambda: formula(x, as_format("bf16"), 1),
        "cast": lambda: out.copy_(x),
        "plugin, SGD": plugin(torch.optim.SGD, momentum=0.9)[0],
        "SGD float32": stock(torch.optim.SGD, torch.float32, fused=True, momentum=0.9)[0],
    } | {name: run for name, (run, _) in (ours | others).items()}
    for _ in range(3):
        for function in functions.values():
            function()
    timed = medians(interleave({name: lambda f=f: 1e3 * seconds(f) for name, f in functions.items()}, n))

    def time(row: str, mine: str, peer: str, name: str, bar: float | None = None, how: str = "") -> Row:
        if peer not in timed:
            return missing(row, name, how)
        return compare(row, name, timed[mine], timed[peer], "ms", larger_is_better=False, bar=bar, n=n)

    best = "plugin, moments fp32"
    result = [
        time("plugin, SGD with momentum", "plugin, SGD", "SGD float32", "SGD fused float32"),
        time("plugin, AdamW", best, "float32", "compiled float32 AdamW", 1 / 1.6),
        time("round_stochastic under torch.compile", "stochastic", "float32", "compiled float32 AdamW"),
        time("round_stochastic under torch.compile", "stochastic", "nearest", "compiled bfloat16 AdamW, to the nearest"),
        time("plugin, AdamW", best, "AdamW fused float32", "AdamW fused float32"),
        time("plugin, AdamW", best, "torchao _AdamW stochastic", "torchao _AdamW stochastic", 7.0, TORCHAO),
        time("plugin, AdamW", best, "optimi AdamW Kahan", "optimi AdamW Kahan", how=OPTIMI),
        time("plugin, moments bf16", "plugin, moments bf16", "AdamW fused float32", "AdamW fused float32"),
        time(
            "plugin, moments 8bit", "plugin, moments 8bit", "torchao AdamW8bit stochastic", "torchao AdamW8bit stochastic", how=TORCHAO
        ),
        time("round_stochastic to bf16", "round", "formula", "the formula, eager"),
        time("round_stochastic to bf16", "round", "cast", "cast to the nearest"),
    ]
    held = {"AdamW float32": 16.0, "bf16-mixed (float32 weights, gradients, moments)": 16.0}
    held |= {name: measure() for name, (_, measure) in others.items() if "fused" not in name}
    for name, (_, measure) in ours.items():
        mine = measure()
        result += [compare(name, peer, mine, theirs, "B/param", larger_is_better=False, n=1) for peer, theirs in held.items()]
    return result


class Clock(L.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def step_time(plugin: object, steps: int) -> float:
    """Median milliseconds of a training step, the first two left out."""
    clock, batch = Clock(), (torch.randn(8, 3, 64, 64), torch.arange(8))
    trainer = L.Trainer(
        max_steps=steps + 2, accelerator="cpu", callbacks=[clock], plugins=[plugin] if plugin else [], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(architecture="resnet18", optimizer="sgd"), DataLoader([batch] * (steps + 2), batch_size=None))
    return 1e3 * median(clock.seconds[2:])


def steps(n: int) -> list[Row]:
    plugins = {
        "float32": lambda: None,
        "FixedPoint <6,10>, everything": FixedPoint,
        "FixedPoint <6,10>, weights and updates": lambda: FixedPoint(of=("weights", "updates")),
        "StochasticRounding bf16": StochasticRounding,
        "BinaryNet": BinaryNet,
        "LowBit, 4 bits": lambda: LowBit(weights=4, activations=4),
    }
    timed = medians(interleave({name: lambda make=make: step_time(make(), n) for name, make in plugins.items()}, 3))
    peer = "the same step in float32"
    mine = [name for name in plugins if name != "float32"]
    return [
        compare(f"step of ResNet-18, 8x64px: {name}", peer, timed[name], timed["float32"], "ms", larger_is_better=False, n=3 * n)
        for name in mine
    ]


GROUPS = {"optimizer": rows, "step": steps}

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--json")
    arguments.add_argument("--only", nargs="*", default=[*GROUPS], choices=[*GROUPS])
    options = arguments.parse_args()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    torch.manual_seed(0)
    n = {"optimizer": 5 if options.quick else 40, "step": 2 if options.quick else 5}
    report([row for name in options.only for row in GROUPS[name](n[name])], options.json)
