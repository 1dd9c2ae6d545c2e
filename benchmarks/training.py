"""Steps of training and inference: `speed=auto` against stock Lightning and the best plain loop tuned by hand; and what a Trainer costs.

    python benchmarks/training.py [--quick] [--only GROUP ...] [--json FILE]

Groups: resnet18_train, convnext_train, resnet18_infer, convnext_infer, overhead, recipe. Float32, one thread unless OMP_NUM_THREADS
says otherwise; sizes are in the row names. `recipe` trains from a folder to an accuracy in wall time; torchvision's reference script
and timm's train.py run on the same pictures and schedule when REFERENCES names a folder with a checkout of each. PICTURES names a folder
with train/ and val/ to take in the place of cuts from scikit-learn's two photographs.

Steps are timed, for every row and peer, with glibc keeping the memory that a step frees (`mallopt`). Left to itself it hands some of it
back to the system, in one run and not in the next: up to 16,000 page faults a step of ResNet-18, a tenth of its time, whoever's loop it is.
"""

import argparse
import ctypes
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
import torchvision
from _bench import Row, compare, medians, missing, report
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import BottleneckMonitor, FastInference, FastTraining, LeanLogging

BATCH, PX = 8, 96
LOWER = {"larger_is_better": False}
SILENT = {"enable_checkpointing": False, "enable_model_summary": False}


class Module(L.LightningModule):
    def __init__(self, net: nn.Module, lr: float = 1e-3, logs: bool = False, prog_bar: bool = False) -> None:
        super().__init__()
        self.net, self.lr, self.logs, self.prog_bar = net, lr, logs, prog_bar

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image)

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.logs:
            self.log("train_loss", loss, prog_bar=self.prog_bar)
        return loss

    def predict_step(self, batch, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Clock(L.Callback):
    """Median seconds from step to step, without the first `skip`."""

    def __init__(self, skip: int) -> None:
        self.skip, self.times = skip, []

    def on_train_batch_end(self, *arguments) -> None:
        self.times.append(time.perf_counter())

    on_predict_batch_end = on_train_batch_end

    @property
    def mean_s(self) -> float:
        """With the steps that write logs in their share."""
        return (self.times[-1] - self.times[self.skip]) / (len(self.times) - 1 - self.skip)

    @property
    def seconds(self) -> float:
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return medians({"": steps[self.skip :]})[""]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(torchvision.models, {"resnet18": "resnet18", "convnext": "convnext_tiny"}[name])(num_classes=100)


def batches(count: int, batch: int = BATCH, px: int = PX) -> DataLoader:
    one = torch.rand(batch, 3, px, px, generator=torch.Generator().manual_seed(0)), torch.arange(batch) % 100
    return DataLoader([one] * count, batch_size=None)


def through_lightning(net: nn.Module, steps: int, stage: str, *callbacks: L.Callback) -> float:
    clock = Clock(skip=1)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, callbacks=[*callbacks, clock], **SILENT
    )
    getattr(trainer, {"train": "fit", "infer": "predict"}[stage])(Module(net), batches(steps + 2))
    return clock.seconds


def by_hand(net: nn.Module, steps: int, stage: str, last: bool, fold: bool) -> float:
    """A plain loop with every switch that has been seen to help on this kind of machine."""
    image, label = next(iter(batches(1)))
    if last:
        net, image = net.to(memory_format=torch.channels_last), image.contiguous(memory_format=torch.channels_last)
    if stage == "infer" and fold:
        net = torch.fx.experimental.optimization.fuse(net.eval())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True) if stage == "train" else None

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(image), label).backward()
        optimizer.step()

    def infer() -> None:
        with torch.inference_mode():
            net(image)

    net.train(stage == "train")
    return _median(train if stage == "train" else infer, steps)


def _median(step: Callable[[], None], steps: int) -> float:
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return medians({"": times[2:]})[""]


def steps_of(name: str, stage: str, quick: bool) -> list[Row]:
    """The three ways in turns, each on a network of its own with the same weights."""
    import torch.fx.experimental.optimization  # noqa: F401

    steps, rounds = (3, 1) if quick else (5, 2)
    fast = FastTraining if stage == "train" else FastInference
    found: dict[str, list[float]] = {"ours": [], "stock": [], "hand": []}
    loops = [
        (last, fold) for last in (False, True) for fold in ((False, True) if stage == "infer" and name == "resnet18" else (False,))
    ]
    for _ in range(rounds):
        callback = fast()
        found["stock"].append(through_lightning(network(name), steps, stage))
        found["ours"].append(through_lightning(network(name), steps, stage, callback))
        found["hand"].append(min(by_hand(network(name), steps, stage, *loop) for loop in loops))
    print("speed=auto:", "; ".join(map(str, callback.trials)))
    middle = medians(found)
    row = f"{name} {'train step' if stage == 'train' else 'inference'} {BATCH}x{PX}px float32"
    return [
        compare(row, "stock Lightning", middle["ours"], middle["stock"], "s", **LOWER, bar=2.0, n=rounds * steps),
        compare(row, "best plain loop", middle["ours"], middle["hand"], "s", **LOWER, bar=0.97, n=rounds * steps),
    ]


def overhead(quick: bool) -> list[Row]:
    """Microseconds a step over a plain loop on a network of next to no work; and what the monitor adds to one."""
    steps, rounds = (200, 1) if quick else (400, 3)
    found: dict[str, list[float]] = {name: [] for name in ("plain", "bare", "lean", "defaults", "watched")}
    for _ in range(rounds):
        found["plain"].append(_plain(steps))
        found["bare"].append(_tiny(steps, Module(_mite())))
        found["lean"].append(_tiny(steps, Module(_mite(), logs=True), [LeanLogging()], log=True))
        found["defaults"].append(_tiny(steps, Module(_mite(), logs=True, prog_bar=True), log=True, bar=True))
        found["watched"].append(_tiny(steps, Module(_mite()), [BottleneckMonitor()]))
    micro = {name: 1e6 * (seconds - medians(found)["plain"]) for name, seconds in medians(found).items()}
    row, n = "overhead of Lightning a step, log every 50", rounds * steps
    added = max(medians(found)["watched"] - medians(found)["bare"], 1e-7) * 1e6
    return [
        compare(f"{row}: ours", "bare + 100 us", micro["lean"], micro["bare"] + 100, "us", **LOWER, bar=1, n=n),
        compare(f"{row}: ours", "bare, nothing logged", micro["lean"], micro["bare"], "us", **LOWER, n=n),
        compare(f"{row}: ours", "defaults: bar and logger", micro["lean"], micro["defaults"], "us", **LOWER, bar=1, n=n),
        compare("overhead of the monitor a step", "1 % of a step of 10 ms", added, 100, "us", **LOWER, bar=1, n=n),
    ]


def _mite() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


def _plain(steps: int) -> float:
    net, (image, label) = _mite(), next(iter(batches(1, 4, 2)))
    label, optimizer = label % 4, torch.optim.AdamW(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(image), label).backward()
        optimizer.step()

    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def _tiny(steps: int, module: Module, callbacks: Sequence[L.Callback] = (), *, log: bool = False, bar: bool = False) -> float:
    clock = Clock(skip=10)
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder) if log else False
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=logger, enable_progress_bar=bar, callbacks=[*callbacks, clock], log_every_n_steps=50,
            default_root_dir=folder, **SILENT,
        )  # fmt: skip
        trainer.fit(module, DataLoader([(image, label % 4) for image, label in batches(steps, 4, 2)], batch_size=None))
    return clock.mean_s


def recipe(quick: bool) -> list[Row]:
    """From a folder of pictures to an accuracy: our verb with packed pictures, and the reference scripts with the same schedule."""
    classes, count, epochs, px, given = 4, 60 if quick else 200, 1 if quick else 2, 64, os.environ.get("PICTURES")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for split, many in (("train", count), ("val", count // 4)):
            if given:
                (folder / split).symlink_to(Path(given, split).resolve())
            else:
                _pictures(folder / split, classes, many)
        classes, pictures = len(list((folder / "train").iterdir())), len(list((folder / "train").rglob("*.*")))
        ours_s, ours = _ours(folder, epochs, px, fast=pictures * epochs >= 500 * 32)  # trials take some 36 steps
        for name, how in REFERENCE_SCRIPTS.items():
            script = Path(os.environ.get("REFERENCES", "."), how[0])
            row = f"recipe resnet18 {px}px, {pictures} pictures, {epochs} epochs, folder to accuracy"
            if not script.exists():
                rows.append(missing(row, name, how[1]))
                continue
            theirs_s, theirs = _theirs(script, name, folder, epochs, px, classes)
            rows.append(compare(row, name, ours_s, theirs_s, "s", **LOWER, bar=1, n=1))
            rows.append(compare(f"{row}: top-1", name, ours, theirs, "", larger_is_better=True, n=1))
    return rows


GIT = "git clone --depth 1 https://github.com"
REFERENCE_SCRIPTS = {
    "torchvision's train.py": ("vision/references/classification/train.py", f"{GIT}/pytorch/vision; REFERENCES=."),
    "timm's train.py": (
        "pytorch-image-models/train.py",
        f"{GIT}/huggingface/pytorch-image-models; pip install timm; REFERENCES=.",
    ),
}


def _pictures(root: Path, classes: int, many: int) -> None:
    """Photographs that come with scikit-learn, cut at random; a class is a photograph and a half of it."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    draw, photos = np.random.default_rng(len(root.name)), load_sample_images().images
    for k in range(classes):
        (root / str(k)).mkdir(parents=True)
        half = photos[k % 2][:, :320] if k < 2 else photos[k % 2][:, 320:]
        for i in range(many):
            top, left = draw.integers(0, 427 - 160), draw.integers(0, 320 - 160)
            Image.fromarray(half[top : top + 160, left : left + 160]).save(root / str(k) / f"{i}.jpg", quality=93)


def _timed(command: list[str], cwd: Path) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start, done.stdout + done.stderr


def _ours(folder: Path, epochs: int, px: int, fast: bool) -> tuple[float, float]:
    words = [
        "train", "data=image_folders", f"data.root={folder}", f"data.size_px={px}", "model.architecture=resnet18", "model.optimizer=sgd",
        "model.lr=0.02", f"trainer.max_epochs={epochs}", "augment=flip", "callbacks=[default,batch_augmentation]",
        "trainer.accelerator=cpu", "data.batch_size=32", *(["speed=auto"] if fast else []),
    ]  # fmt: skip
    seconds, _ = _timed([sys.executable, "-m", "lightning_cnn", *words], folder)
    (report_page,) = folder.glob("outputs/train/*/report.md")
    return seconds, float(re.search(r"test_accuracy \| ([\d.]+)", report_page.read_text())[1])


def _theirs(script: Path, name: str, folder: Path, epochs: int, px: int, classes: int) -> tuple[float, float]:
    if "timm" in name:
        options = f"--data-dir {folder} --model resnet18 --num-classes {classes} --epochs {epochs} -b 32 --opt momentum --lr 0.02 "
        options += f"--img-size {px} --sched cosine --warmup-epochs 0 -j 2 --device cpu --output {folder / 'timm'}"
        found = r"\*\*\* Best metric: ([\d.]+)"
    else:
        options = f"--data-path {folder} --model resnet18 --epochs {epochs} -b 32 --lr 0.02 --lr-scheduler cosineannealinglr -j 2 "
        options += f"--device cpu --train-crop-size {px} --val-crop-size {px} --val-resize-size {px} --output-dir {folder}"
        found = r"Test:\s+Acc@1 ([\d.]+)"
    seconds, said = _timed([sys.executable, str(script.resolve()), *options.split()], script.parent)
    return seconds, max(map(float, re.findall(found, said))) / 100


GROUPS: dict[str, Callable[[bool], list[Row]]] = {
    "resnet18_train": lambda quick: steps_of("resnet18", "train", quick),
    "convnext_train": lambda quick: steps_of("convnext", "train", quick),
    "resnet18_infer": lambda quick: steps_of("resnet18", "infer", quick),
    "convnext_infer": lambda quick: steps_of("convnext", "infer", quick),
    "overhead": overhead,
    "recipe": recipe,
}


def keep_freed_memory() -> None:
    """M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc; other libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not all(mallopt(option, 2**30) for option in (-1, -3)):
        print("glibc did not take the thresholds: expect page faults in the timings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep_freed_memory()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    report([row for name in options.only for row in GROUPS[name](options.quick)], options.json)


if __name__ == "__main__":
    main()
