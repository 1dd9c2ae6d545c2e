"""Steps of training and inference: `speed=auto` against stock Lightning and the best plain loop tuned by hand; and what a Trainer costs.

    python benchmarks/training.py [--quick] [--only GROUP ...] [--json FILE]

Groups: resnet18_train, convnext_train, resnet18_infer, convnext_infer, overhead, recipe. Float32 (there is no bf16 without units for it:
the bar of 2x stock is for CPUs that have them), one thread unless OMP_NUM_THREADS says otherwise; sizes are in the row names.

Steps: each loop runs in a process of its own, forked before torch has computed anything, so that no loop finds memory as another left it.
A plain loop is timed twice, with glibc as it is and told to keep freed memory (`mallopt`), which FastTraining tries by itself. Steps are
timed after the trials, which are not limited to a share of what lies ahead here: runs are short.

`recipe` trains from a folder to an accuracy in wall time, against torchvision's reference script and timm's train.py, which run when
REFERENCES names a folder with a checkout of each. The same for all: pictures (PICTURES names a folder with train/ and val/; without it,
cuts from scikit-learn's two photographs), network, epochs, batch of 32, SGD with momentum 0.9, learning rate 0.02 and weight decay 1e-4,
random crops of 8 % to 100 % of the area and flips, validation after every epoch, threads, and one worker to load (ours: one thread).
To each its own: initial weights, the cosine (ours goes down by the step, theirs by the epoch), and how pictures are read: ours packs them
first, in the same process and in the time; `speed=auto` makes its own choices. Every command has run once, to its help or for one
batch, before the timed runs.
"""

import argparse
import csv
import logging
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
import torchvision
from _bench import Row, compare, interleave, medians, missing, report
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import BottleneckMonitor, FastInference, FastTraining, LeanLogging, _changes

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


def alone(function: Callable[..., float], *arguments: object) -> float:
    """In a fork of this process, which has imported everything and computed nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
        return process.submit(function, *arguments).result()


def through_lightning(name: str, stage: str, steps: int, fast: bool) -> float:
    clock, speed = Clock(skip=1), {"train": FastTraining, "infer": FastInference}[stage](trial_share=math.inf)
    callbacks = [*([speed] if fast else []), clock]
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, callbacks=callbacks, **SILENT)
    getattr(trainer, {"train": "fit", "infer": "predict"}[stage])(Module(network(name)), batches(steps + 2))
    if fast:
        print("speed=auto:", "; ".join(map(str, speed.trials)), flush=True)
    return clock.seconds


def by_hand(name: str, stage: str, steps: int, keeps_memory: bool, last: bool, fold: bool) -> float:
    """A plain loop with every switch that has been seen to help on this kind of machine."""
    from torch.fx.experimental.optimization import fuse

    if keeps_memory:
        _changes.keep_memory()
    net, (image, label) = network(name), next(iter(batches(1)))
    if last:
        net, image = net.to(memory_format=torch.channels_last), image.contiguous(memory_format=torch.channels_last)
    if stage == "infer" and fold:
        net = fuse(net.eval())
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
    """The ways in turns, each on a network of its own with the same weights; of the loops by hand the one with the best median counts.

    Not the best of each round: the least of four times with an error of 2 % each is 2 % too low, and `speed=auto` draws one time.
    """
    steps, rounds = (3, 1) if quick else (7, 3 if stage == "infer" else 2)
    folds = (False, True) if stage == "infer" and name == "resnet18" else (False,)
    loops = [(last, fold) for last in (False, True) for fold in folds]
    ways = {("stock",): (through_lightning, False), ("ours",): (through_lightning, True)}
    ways |= {(keeps, *loop): (by_hand, keeps, *loop) for keeps in (False, True) for loop in loops}
    found = interleave({way: lambda f=f, rest=rest: alone(f, name, stage, steps, *rest) for way, (f, *rest) in ways.items()}, rounds)
    middle, n = medians(found), rounds * steps
    stock, ours = middle[("stock",)], middle[("ours",)]
    hand, kept = (min(seconds for way, seconds in middle.items() if way[0] is keeps) for keeps in (False, True))
    row = f"{name} {'train step' if stage == 'train' else 'inference'} {BATCH}x{PX}px float32"
    return [
        compare(row, "stock Lightning", ours, stock, "s", **LOWER, n=n),
        compare(row, "best plain loop", ours, hand, "s", **LOWER, bar=0.97, n=n),
        compare(row, "best plain loop, memory kept", ours, kept, "s", **LOWER, bar=0.97, n=n),
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
    """From a folder of pictures to an accuracy: our verbs, and the reference scripts with the same schedule."""
    px, epochs, most = (32, 1, 24) if quick else (32, 3, 10**6)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        classes, pictures = _folder(folder, os.environ.get("PICTURES"), most)
        row, rows = f"recipe resnet18 {px}px, {pictures} pictures, {epochs} epochs, folder to accuracy", []
        commands = {}
        for name, (script, how) in REFERENCE_SCRIPTS.items():
            path = Path(os.environ.get("REFERENCES", "."), script).resolve()
            if path.exists():
                _timed([sys.executable, str(path), "--help"], path.parent)
                commands[name] = [sys.executable, str(path), *_options(name, folder, epochs, px, classes).split()]
            else:
                rows.append(missing(row, name, how))
        _ours(folder / "first", folder, epochs, px, "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
        ours_s, ours = _ours(folder / "timed", folder, epochs, px)
        for name, command in commands.items():
            theirs_s, said = _timed(command, Path(command[1]).parent)
            theirs = max(map(float, re.findall(REPORTED[name], said))) / 100
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


def _folder(folder: Path, given: str | None, most: int) -> tuple[int, int]:
    """train/ and val/ with at most so many pictures a class; tells how many classes and training pictures there are."""
    for split, share in (("train", 1.0), ("val", 0.25)):
        if not given:
            _pictures(folder / split, 4, int(share * min(most, 200)))
            continue
        for place in sorted(path for path in Path(given, split).resolve().iterdir() if path.is_dir()):
            (folder / split / place.name).mkdir(parents=True)
            for file in sorted(place.iterdir())[: max(1, int(share * most))]:
                (folder / split / place.name / file.name).symlink_to(file)
    return len(list((folder / "train").iterdir())), len(list((folder / "train").rglob("*.*")))


def _ours(work: Path, folder: Path, epochs: int, px: int, *more: str) -> tuple[float, float]:
    """Seconds, and the accuracy of the best epoch, as for the others."""
    work.mkdir()
    start = time.perf_counter()
    words = [
        "train", "data=packed", f"data.train={work}/train.pack", f"data.val={work}/val.pack", f"data.size={px}", "data.batch_size=32",
        f"+data.mean={list(MEAN)}", f"+data.std={list(STD)}", "+data.central=1.0", "+data.threads=1", "model.architecture=resnet18",
        "model.optimizer=sgd", "model.lr=0.02", "model.weight_decay=1e-4", f"trainer.max_epochs={epochs}", "trainer.accelerator=cpu",
        "speed=auto", "test=false", *more,
    ]  # fmt: skip
    _timed([sys.executable, "-c", PACK_AND_TRAIN, str(folder), str(work), *words], work)
    seconds = time.perf_counter() - start
    (log,) = work.glob("outputs/train/*/metrics.csv")
    with log.open(newline="") as file:
        return seconds, max(float(line["val_accuracy"]) for line in csv.DictReader(file) if line["val_accuracy"])


def _options(name: str, folder: Path, epochs: int, px: int, classes: int) -> str:
    if "timm" in name:
        return (
            f"--data-dir {folder} --train-split train --val-split val --model resnet18 --num-classes {classes} --epochs {epochs} -b 32 "
            f"--opt momentum --lr 0.02 --weight-decay 1e-4 --sched cosine --warmup-epochs 0 --smoothing 0 --color-jitter 0 "
            f"--train-interpolation bilinear --input-size 3 {px} {px} --crop-pct 1.0 -j 1 --device cpu --output {folder / 'timm'}"
        )
    return (
        f"--data-path {folder} --model resnet18 --epochs {epochs} -b 32 --lr 0.02 --wd 1e-4 --lr-scheduler cosineannealinglr -j 1 "
        f"--device cpu --train-crop-size {px} --val-crop-size {px} --val-resize-size {px} --output-dir {folder / 'torchvision'}"
    )


PACK_AND_TRAIN = """
import sys
from pathlib import Path
from lightning_cnn.app.main import main
from lightning_cnn.data import pack
folder, work, *words = sys.argv[1:]
for split in ("train", "val"):
    pack(Path(folder, split), Path(work, f"{split}.pack"), size=None, fit="keep", workers=0, progress=False)
sys.exit(main(words))
"""
REPORTED = {"torchvision's train.py": r"Test:\s+Acc@1 ([\d.]+)", "timm's train.py": r"\*\*\* Best metric: ([\d.]+)"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


GROUPS: dict[str, Callable[[bool], list[Row]]] = {
    "resnet18_train": lambda quick: steps_of("resnet18", "train", quick),
    "convnext_train": lambda quick: steps_of("convnext", "train", quick),
    "resnet18_infer": lambda quick: steps_of("resnet18", "infer", quick),
    "convnext_infer": lambda quick: steps_of("convnext", "infer", quick),
    "overhead": overhead,
    "recipe": recipe,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    report([row for name in options.only for row in GROUPS[name](options.quick)], options.json)


if __name__ == "__main__":
    main()
