"""Accuracy and calibration with and without each kind of training noise and its marginalisation: what helps, and what does not.

    python benchmarks/noise.py --root FOLDER [--seeds 3] [--first-seed 0] [--noise dropout mixup ...] [--records FILE] [--json FILE]
    python benchmarks/noise.py --quick

`--root` holds `train/<class>/` and `val/<class>/` of 32-pixel pictures (CIFAR-10 is meant); without it scikit-learn's digits. A small
network is trained with each kind of noise for each seed; a quarter of the validation pictures fits the temperature, the others are
the test. `--records` keeps one line a training, which is not repeated, so that the table can be made in pieces of some minutes.
"""

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
import torchvision
from _bench import compare, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import functional as F

from lightning_cnn.callbacks import (
    Augmented,
    BatchAugmentation,
    CutMix,
    EvaluationReport,
    HorizontalFlip,
    MCBatchNorm,
    MCDropConnect,
    MCDropout,
    MixUp,
    NetworkNoise,
    RandomErasing,
)
from lightning_cnn.functional.calibration import fit_temperature, scores

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
FIGURES = ("accuracy", "ece", "nll", "brier")
# For each kind of noise: the callbacks that train with it, and the ways of testing that marginalise over it.
NOISE = {
    "none": (lambda: [], lambda loader: {"flip": [HorizontalFlip()], "mc batch norm": [MCBatchNorm(10, loader)]}),
    "augmentation": (
        lambda: [BatchAugmentation(augment="cifar")],
        lambda loader: {"flip": [HorizontalFlip()], "augmented": [Augmented(10, augment="cifar")]},
    ),
    "dropout": (lambda: [NetworkNoise(dropout=0.5)], lambda loader: {"mc dropout": [MCDropout(10)]}),
    "dropconnect": (lambda: [NetworkNoise(dropconnect=0.5)], lambda loader: {"mc dropconnect": [MCDropConnect(10)]}),
    "mixup": (lambda: [MixUp(classes=10, alpha=0.4)], lambda loader: {"flip": [HorizontalFlip()]}),
    "cutmix": (lambda: [CutMix(classes=10)], lambda loader: {"flip": [HorizontalFlip()]}),
    "erasing": (lambda: [RandomErasing()], lambda loader: {"flip": [HorizontalFlip()]}),
    "augmentation, dropout": (
        lambda: [BatchAugmentation(augment="cifar"), NetworkNoise(dropout=0.5)],
        lambda loader: {"mc dropout": [MCDropout(10)], "flip x mc dropout": [HorizontalFlip(), MCDropout(10)]},
    ),
}


class Small(L.LightningModule):
    def __init__(self, channels: int) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

        self.net = nn.Sequential(*stage(channels, 16), *stage(16, 32), *stage(32, 64), nn.Flatten(), nn.LazyLinear(10))

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps), "interval": "step"}]


def pictures(root: str | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if root is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
        return (images[797:], labels[797:]), (images[:797], labels[:797])

    def read(split: str) -> tuple[Tensor, Tensor]:
        data = torchvision.datasets.ImageFolder(f"{root}/{split}")
        images = [F.pil_to_tensor(image.convert("RGB")) for image, _ in data]
        return torch.stack(images).float() / 255, torch.tensor(data.targets)

    return read("train"), read("val")


def run(noise: str, seed: int, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], epochs: int) -> dict[str, dict[str, float]]:
    """Train once; the figures of every way of testing, and of one pass with a temperature."""
    torch.manual_seed(seed)
    make, ways = NOISE[noise]
    order = torch.randperm(len(val[1]), generator=torch.Generator().manual_seed(0))
    few, rest = order[: len(order) // 4], order[len(order) // 4 :]
    module, callbacks = Small(train[0].shape[1]), make()
    module(train[0][:2])
    loader = DataLoader(TensorDataset(*train), 64, shuffle=True, drop_last=True)
    L.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET).fit(module, loader)
    with tempfile.TemporaryDirectory() as folder:
        evaluation = EvaluationReport(compare=ways(loader), folder=folder)
        inside = [callback for callback in callbacks if isinstance(callback, NetworkNoise)]
        tester = L.Trainer(callbacks=[*inside, evaluation], **QUIET)
        tester.test(module, DataLoader(TensorDataset(val[0][rest], val[1][rest]), 150), verbose=False)
    module.eval()
    with torch.no_grad():
        temperature = fit_temperature(module(val[0][few]), val[1][few])
        scaled = scores((module(val[0][rest]) / temperature).log_softmax(-1), val[1][rest]).summary()
    return {**evaluation.table, "single, temperature": {**scaled, "cost": 1.0, "temperature": temperature}}


def rows(runs: list[dict]) -> list:
    """Each kind of noise against none, one pass each; each marginalisation against one pass of the same network. Paired over the seeds."""
    found = {(one["noise"], one["seed"]): one["table"] for one in runs}
    result = []
    print(f"{'noise':<24}{'tested by':<22}" + "".join(f"{name:>18}" for name in FIGURES) + "   cost")
    for noise in NOISE:
        tables = [table for (name, _), table in sorted(found.items()) if name == noise]
        for way in tables[0] if tables else ():
            told = "".join(f"{mean_se([table[way][name] for table in tables]):>18}" for name in FIGURES)
            print(f"{noise:<24}{way:<22}{told}   {statistics.mean(table[way]['cost'] for table in tables):.3g}")
            base = "none" if way == "single" else noise
            pairs = [(found[noise, s][way], found[base, s]["single"]) for name, s in found if name == noise and (base, s) in found]
            if (noise, way) != ("none", "single") and pairs:
                for figure, larger in (("accuracy", True), ("nll", False)):
                    a, b = (statistics.mean(pair[side][figure] for pair in pairs) for side in (0, 1))
                    peer = "no noise, one pass" if way == "single" else "same network, one pass"
                    result.append(compare(f"{noise}; {way}", peer, a, b, figure, larger_is_better=larger, n=len(pairs)))
                    if figure == "accuracy":
                        print(f"{'':<24}  paired gain over {peer}: {mean_se([x[figure] - y[figure] for x, y in pairs], '+')}")
    return result


def mean_se(values: list[float], sign: str = "") -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.3f} +- {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--root")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--noise", nargs="*", default=list(NOISE), choices=list(NOISE))
    parser.add_argument("--records")
    parser.add_argument("--json")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    train, val = pictures(options.root)
    epochs = 2 if options.quick else options.epochs
    file = Path(options.records) if options.records else None
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []
    for seed in range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds)):
        for noise in options.noise:
            if any((one["noise"], one["seed"]) == (noise, seed) for one in runs):
                continue
            runs.append({"noise": noise, "seed": seed, "table": run(noise, seed, train, val, epochs)})
            if file:
                with file.open("a") as out:
                    out.write(json.dumps(runs[-1]) + "\n")
    report(rows(runs), options.json)


if __name__ == "__main__":
    main()
