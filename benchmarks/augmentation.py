"""Fused augmentation against the same steps one after the other, and what the callbacks cost a batch and a training step.

    python benchmarks/augmentation.py [--quick] [--json FILE] [--only fused compiled mixing network hook]

`compiled` compiles Kornia's pipelines with torch.compile first, a minute a row; `hook` is the difference of paired training runs.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from statistics import mean, stdev

import torch
from _bench import Row, compare, interleave, medians, report, seconds
from kornia import augmentation as K
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from lightning_cnn.callbacks import BatchAugmentation, CutMix, EvaluationReport, MixUp, NetworkNoise, ProgressiveResizing, RandomErasing
from lightning_cnn.callbacks._batch_hook import BatchTransform, Samples
from lightning_cnn.functional.batch import Batch
from lightning_cnn.functional.calibration import fit_temperature
from lightning_cnn.functional.keyed_random import KeyedRandom
from lightning_cnn.nn import FusedAugmentation, RandomLensDistortion, RandomPCALighting

BATCH = {32: 128, 224: 16}
GEOMETRY = {"flip": 0.5, "rotate_deg": 15.0, "translate": 0.1, "scale": (0.9, 1.1), "shear_deg": 10.0}
COLOUR = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
FUSED = {
    "flip, affine": GEOMETRY,
    "flip, affine, jitter": {**GEOMETRY, **COLOUR},
    "flip, affine, lens, jitter, lighting": {**GEOMETRY, **COLOUR, "lens": 0.1, "lighting": 0.1},
}


def kornias(row: str) -> nn.Module:
    """The same steps as Kornia runs them; it has no lens and no PCA lighting, so those two are ours, unfused."""
    steps: list[nn.Module] = [K.RandomHorizontalFlip(p=0.5), K.RandomAffine(15.0, (0.1, 0.1), (0.9, 1.1), 10.0, p=1.0)]
    steps += [RandomLensDistortion(radial=0.1)] if "lens" in row else []
    steps += [K.ColorJitter(0.2, 0.2, 0.2, 0.0, order=(0, 1, 2))] if "jitter" in row else []
    steps += [RandomPCALighting(std=0.1)] if "lighting" in row else []
    return K.AugmentationSequential(*steps, data_keys=["input"])


def torchvisions(row: str) -> Callable[[Tensor], Tensor]:
    bilinear = v2.InterpolationMode.BILINEAR
    steps: list[nn.Module] = [v2.RandomHorizontalFlip(0.5), v2.RandomAffine(15.0, (0.1, 0.1), (0.9, 1.1), 10.0, interpolation=bilinear)]
    steps += [v2.ColorJitter(0.2, 0.2, 0.2)] if "jitter" in row else []
    one = v2.Compose(steps)
    return lambda images: torch.stack([one(image) for image in images])


def fused(row: str) -> Callable[[Tensor], Tensor]:
    """As the callback runs it: parameters keyed by sample, then one pass."""
    step = FusedAugmentation(**FUSED[row])

    def call(images: Tensor) -> Tensor:
        with KeyedRandom(3, torch.arange(len(images))):
            params = step.forward_parameters(images.shape)
        return step(images, params=params)

    return call


def speed(size: int, row: str, n: int, compiled: bool) -> list[Row]:
    images = torch.rand(BATCH[size], 3, size, size)
    rivals: dict[str, Callable[[Tensor], Tensor]] = {"ours": fused(row)}
    rivals |= {"kornia compiled": torch.compile(kornias(row))} if compiled else {"kornia eager": kornias(row)}
    if "lens" not in row and not compiled:
        rivals["torchvision v2, sample by sample"] = torchvisions(row)
    for function in rivals.values():
        function(images)
        function(images)
    times = medians(interleave({name: lambda f=function: seconds(lambda: f(images)) for name, function in rivals.items()}, n))
    us = {name: 1e6 * value / len(images) for name, value in times.items()}
    return [
        compare(
            f"{row}, {size} px",
            name,
            us["ours"],
            us[name],
            "us/image",
            larger_is_better=False,
            bar=4.0 if "eager" in name else None,
            n=n,
        )
        for name in us
        if name != "ours"
    ]


class Small(LightningModule):
    """A step of some milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def callbacks_on_a_batch(size: int, n: int) -> list[Row]:
    """Callbacks that mix, erase and shrink, as training runs them (keyed by sample), against Kornia and torchvision on the same batch."""
    images, labels = torch.rand(BATCH[size], 3, size, size), torch.arange(BATCH[size]) % 10
    batch = Batch(images, labels, torch.arange(BATCH[size]))
    mixup, cutmix, erasing, erase_one = (
        v2.MixUp(num_classes=10),
        v2.CutMix(num_classes=10),
        K.RandomErasing(p=1.0),
        v2.RandomErasing(p=1.0),
    )
    ours: dict[str, BatchTransform] = {
        "MixUp": MixUp(classes=10), "CutMix": CutMix(classes=10), "RandomErasing": RandomErasing(p=1.0, fill=0.0),
        "RandomErasing, noise": RandomErasing(p=1.0), "ProgressiveResizing": ProgressiveResizing(start=0.5),
    }  # fmt: skip
    theirs: dict[str, dict[str, Callable[[], object]]] = {
        "MixUp": {"torchvision v2": lambda: mixup(images, labels)},
        "CutMix": {"torchvision v2": lambda: cutmix(images, labels)},
        "RandomErasing": {
            "kornia eager": lambda: erasing(images),
            "torchvision v2, sample by sample": lambda: torch.stack([erase_one(image) for image in images]),
        },
        "RandomErasing, noise": {"kornia eager, black": lambda: erasing(images)},
        "ProgressiveResizing": {
            "interpolate": lambda: nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
        },
    }
    rows = []
    for name, callback in ours.items():
        calls = {"ours": lambda c=callback: c.transform(batch, Samples(batch.index, ("epoch", 0))), **theirs[name]}
        times = medians(interleave({who: lambda f=call: seconds(f) for who, call in calls.items()}, n))
        us = {who: 1e6 * value / len(images) for who, value in times.items()}
        rows += [
            compare(f"{name}, {size} px", who, us["ours"], us[who], "us/image", larger_is_better=False, n=n) for who in theirs[name]
        ]
    return rows


def network_and_testing(n: int) -> list[Row]:
    """What noise in the network costs a training step, a temperature its fit, and an evaluation report a test."""
    images, labels = torch.rand(64, 3, 32, 32), torch.arange(64) % 10
    batch, samples = Batch(images, labels, torch.arange(64)), Samples(torch.arange(64), ("epoch", 0))

    def step(model: nn.Module, noise: NetworkNoise | None = None) -> None:
        if noise is not None:
            noise.transform(batch, samples)
        nn.functional.cross_entropy(model(images), labels).backward()

    plain, noisy, loops = Small(), Small(), {}
    callback = NetworkNoise(dropout=0.5, dropconnect={"net.0": 0.2})
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callback.setup(Trainer(accelerator="cpu", **off), noisy, "fit")
    loops["with"], loops["without"] = lambda: seconds(lambda: step(noisy, callback)), lambda: seconds(lambda: step(plain))
    ms = {name: 1e3 * value for name, value in medians(interleave(loops, n)).items()}
    rows = [compare("step of 64, dropout and DropConnect", "no noise", ms["with"], ms["without"], "ms", larger_is_better=False, n=n)]
    logits, truth = torch.randn(10_000, 10) * 3, torch.randint(10, (10_000,))
    fit = medians(interleave({"fit": lambda: seconds(lambda: fit_temperature(logits, truth))}, n))["fit"]
    rows.append(Row("temperature of 10,000 pictures in 10 classes", "none", 1e3 * fit, None, "ms", n=n))
    loader = DataLoader(TensorDataset(torch.rand(512, 3, 32, 32), torch.arange(512) % 10), batch_size=64)

    def test(callbacks: list[Callback]) -> float:
        return seconds(lambda: Trainer(accelerator="cpu", callbacks=callbacks, **off).test(Small(), loader, verbose=False))

    with tempfile.TemporaryDirectory() as folder:
        both = {"with": lambda: test([EvaluationReport(compare={"flip": ["flip"]}, folder=folder)]), "without": lambda: test([])}
        interleave(both, 1)
        tests = medians(interleave(both, 3))
    row = ("test of 512 pictures, report of one pass and flip", "no report", tests["with"], tests["without"], "s")
    return [*rows, compare(*row, larger_is_better=False, n=3)]


def hook(steps: int, n: int) -> list[Row]:
    """A training step with a callback that has nothing to do against one without any, paired; the spread says what is within noise."""
    data = TensorDataset(torch.rand(32 * steps, 3, 32, 32), torch.zeros(32 * steps, dtype=torch.long))

    def fit(callbacks: list[BatchAugmentation]) -> float:
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **off)
        return 1e3 * seconds(lambda: trainer.fit(Small(), DataLoader(data, batch_size=32))) / steps

    runs = {"with": lambda: fit([BatchAugmentation(augment=[])]), "without": lambda: fit([])}
    interleave(runs, 1)
    ms = interleave(runs, n)
    gaps = [a - b for a, b in zip(ms["with"], ms["without"], strict=True)]
    error = stdev(gaps) / n**0.5
    print(f"hook: {mean(gaps):+.3f} +- {error:.3f} ms a step (paired, n = {n})")
    middle = medians(ms)
    step = ("training step, hook without operations", "no callback", middle["with"], middle["without"], "ms")
    noise = ("hook's cost a step, against two standard errors of it", "noise", abs(mean(gaps)), 2 * error, "ms")
    return [compare(*step, larger_is_better=False, n=n), compare(*noise, larger_is_better=False, bar=1, n=n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument(
        "--only", nargs="*", default=["fused", "mixing", "network", "hook"], choices=["fused", "compiled", "mixing", "network", "hook"]
    )
    parser.add_argument("--px", nargs="*", type=int, default=list(BATCH))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rounds = 7 if arguments.quick else 25
    rows = []
    for size in arguments.px:
        for group in set(arguments.only) & {"fused", "compiled"}:
            rows += [row for name in FUSED for row in speed(size, name, rounds, group == "compiled")]
        rows += callbacks_on_a_batch(size, rounds) if "mixing" in arguments.only else []
    rows += network_and_testing(rounds) if "network" in arguments.only else []
    rows += hook(20 if arguments.quick else 60, 5 if arguments.quick else 11) if "hook" in arguments.only else []
    report(rows, arguments.json)


if __name__ == "__main__":
    main()
