"""Transfer learning: what caching, probing and finetuning cost and bring.

    python benchmarks/transfer.py [--quick] [--json FILE] [--only cache probe recipes shots] [--seeds 3]
                                  [--root FOLDER --weights FILE --model squeezenet1_0 --px 160]

`--root` holds `train/<class>/` and `val/<class>/`. Without it the task is scikit-learn's handwritten digits 5 to 9, and the pretrained
network a small one trained on 0 to 4 in the first seconds.

The groups `recipes` and `shots` can be run in pieces: `--records FILE` keeps one line a run there, runs that it holds are not
repeated, and the table is made of all its lines; `--methods` and `--seeds 1 --first-seed 2` choose the piece.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torchvision
from _bench import Row, compare, report
from _transfer_tasks import QUIET, Finetune, HeadOnly, Pictures, Task, fit, smaller
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.callbacks import DiscriminativeLR, FeatureCache, GradualUnfreezing
from lightning_cnn.functional.transfer import similarity_of, transfer_recipe
from lightning_cnn.nn import features, stages
from lightning_cnn.nn.networks import small_cnn
from lightning_cnn.nn.probe import linear_probe, shots
from lightning_cnn.nn.transfer_head import head_probe, start_head

RECIPES = ("plain frozen", "FeatureCache", "BackboneFinetuning", "recipe")
SHOTS = ("probe", "finetuned", "scratch")


class Records:
    """One line a run, so that a long table can be made in pieces."""

    def __init__(self, file, settings):
        self.file, self.settings = Path(file) if file else None, settings
        lines = self.file.read_text().splitlines() if self.file and self.file.exists() else []
        self.runs = [run for run in map(json.loads, lines) if run["settings"] == settings]

    def find(self, group, name, seed):
        return next((run for run in self.runs if (run["group"], run["name"], run["seed"]) == (group, name, seed)), None)

    def of(self, group, name):
        return sorted((run for run in self.runs if (run["group"], run["name"]) == (group, name)), key=lambda run: run["seed"])

    def make(self, group, name, seed, run):
        """`run()` gives what the validation set said as (seconds, accuracy) pairs, the last one at the end."""
        if self.find(group, name, seed):
            return
        seen = run()
        record = {"group": group, "name": name, "seed": seed, "seen": seen, "settings": self.settings}
        self.runs.append(record)
        if self.file:
            with self.file.open("a") as file:
                file.write(json.dumps(record) + "\n")
        told = " ".join(f"{reached:.3f}" for _, reached in seen)
        print(f"{group}, {name}, seed {seed}: {told}; {seen[-1][0]:.1f} s of training", flush=True)


# ---------------------------------------------------------------- rows


def cache_rows(args):
    """A frozen resnet18 (weights do not matter) with and without the cache, the same Trainer otherwise."""
    n, px = (64, 64) if args.quick else (640, 96)
    images = torch.randn(n, 3, px, px, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(n) % 10)

    def run(epochs, *callbacks):
        torch.manual_seed(1)
        net = torchvision.models.resnet18(num_classes=10)
        module = Finetune((nn.Sequential(*list(net.children())[:-1], nn.Flatten()), net.fc), 1e-2)
        trainer = L.Trainer(max_epochs=epochs, callbacks=[GradualUnfreezing(up_to=1), *callbacks], **QUIET)
        start = time.perf_counter()
        trainer.fit(module, DataLoader(data, 64, shuffle=True))
        return time.perf_counter() - start, module.state_dict()

    run(1, FeatureCache())
    plain, theirs = run(10)
    rows = []
    for epochs, bar in ((10, 9.0), (50, 40.0)):
        cached, ours = run(epochs, FeatureCache())
        same = all(torch.equal(ours[name], theirs[name]) for name in ours) if epochs == 10 else "not compared"
        # The plain run is linear in epochs: 50 are taken as five times ten.
        print(f"{epochs} epochs: plain {plain * epochs / 10:.1f} s, cached {cached:.2f} s, bit-identical weights: {same}", flush=True)
        against = (f"cache_{epochs}_epochs", "same Trainer, frozen resnet18", cached, plain * epochs / 10, "s")
        rows.append(compare(*against, larger_is_better=False, bar=bar, n=1))
    return rows


def probe_rows(args, task):
    """A linear probe at each stage, pretrained and random."""
    reached = {}
    for name in ("pretrained", "random weights"):
        torch.manual_seed(0)
        body, _ = task.backbone(name == "pretrained")
        start = time.perf_counter()
        a, ya = features(body, layers(body), DataLoader(Pictures(*task.train), 32))
        b, yb = features(body, layers(body), DataLoader(Pictures(*task.val), 32))
        spent = time.perf_counter() - start
        reached[name] = [linear_probe(a[layer], ya, b[layer], yb).accuracy for layer in a]
        print(f"probe, {name}: {', '.join(f'{x:.3f}' for x in reached[name])} (features in {spent:.0f} s)", flush=True)
    ours, random = reached.values()
    alike, why = similarity_of(ours, 1 / task.classes)
    print(f"similarity: {alike}, {why}; recipe: {transfer_recipe(len(task.train[1]), alike, task.classes).name}")
    n = len(task.val[1])
    rows = [compare(f"probe_{args.px}px_top", "random weights", ours[-1], random[-1], "accuracy", larger_is_better=True, n=n)]
    if args.root:
        rows.append(compare(f"probe_{args.px}px_top", "goal .84", ours[-1], 0.84, "accuracy", larger_is_better=True, bar=1, n=n))
    return rows


def layers(body):
    names = {module: name for name, module in body.named_modules()}
    return [names[stage.modules[-1]] for stage in stages(body)]


def finetuned(task, args, train, epochs, every, views=1):
    """The recommended recipe: the head starts as a probe, then it and the top stages learn at 1, 1/10, 1/100. All of it on the clock."""
    network = task.network(started=True)
    _, probing = task.probe()
    if train is not task.train:
        start, both = time.perf_counter(), nn.Sequential(*network)
        start_head(both, head_probe(both, DataLoader(Pictures(*train), 32)))
        probing = time.perf_counter() - start
    cache = FeatureCache(views=views, memory_gib=8, folder=args.folder)
    callbacks = [GradualUnfreezing(unfrozen=args.top, up_to=args.top), DiscriminativeLR(), cache]
    flips, val = Pictures(*train, flip=views > 1), Pictures(*task.val)
    clock = fit(Finetune(network, args.lr), callbacks, flips, val, epochs=epochs, every=every)
    return [(probing + spent, reached) for spent, reached in clock.seen]


def recipe_rows(args, task, records):
    """Seconds to a fixed accuracy and accuracy at the end, each method over the seeds."""
    train, val = Pictures(*task.train), Pictures(*task.val)
    task.probe()

    def stock(callbacks, kind=Finetune):
        return fit(kind(task.network(), 2e-3), callbacks, train, val, epochs=args.epochs, every=args.every).seen

    runs = {
        "plain frozen": lambda seed: stock([GradualUnfreezing(up_to=1)]),
        "FeatureCache": lambda seed: stock([GradualUnfreezing(up_to=1), FeatureCache()]),
        "BackboneFinetuning": lambda seed: stock([BackboneFinetuning(args.epochs // 2, verbose=False)], HeadOnly),
        "recipe": lambda seed: finetuned(task, args, task.train, args.epochs, args.every, views=2),
    }
    for name in args.methods or RECIPES:
        for seed in range(args.first_seed, args.first_seed + args.seeds) if name in runs else ():
            torch.manual_seed(seed)
            records.make("recipes", name, seed, lambda name=name, seed=seed: runs[name](seed))
    rows, ours = [], records.of("recipes", "recipe")
    for name in RECIPES:
        theirs = records.of("recipes", name)
        if not theirs:
            continue
        until = [next((s for s, reached in run["seen"] if reached >= args.target), None) for run in theirs]
        told = ", ".join("never" if s is None else f"{s:.0f}" for s in until)
        print(f"{name:<20} {mean_se([run['seen'][-1][1] for run in theirs])}, {mean_se([run['seen'][-1][0] for run in theirs], 0)} s; "
              f"{args.target} after {told} s")  # fmt: skip
        if name != "recipe" and ours:
            rows += _against(name, ours, theirs, args.target)
    return rows


def _against(name, ours, theirs, target):
    """Accuracy at the end and, where every run reached it, seconds to the target."""
    end = [statistics.mean(run["seen"][-1][1] for run in side) for side in (ours, theirs)]
    rows = [compare("accuracy of the recipe", name, *end, "accuracy", larger_is_better=True, n=min(len(ours), len(theirs)))]
    until = [[next((s for s, reached in run["seen"] if reached >= target), None) for run in side] for side in (ours, theirs)]
    if all(None not in side for side in until):
        means = [statistics.mean(side) for side in until]
        return [*rows, compare(f"time to {target}", name, *means, "s", larger_is_better=False, n=len(until[1]))]
    return [*rows, Row(f"time to {target}", f"{name} (reached by {sum(s is not None for s in until[1])} of {len(until[1])})",
                       *(statistics.mean(side) if None not in side else None for side in until), "s", n=len(until[1]))]  # fmt: skip


def shot_rows(args, task, records):
    """k pictures a class: frozen features and a linear classifier, finetuning, and from scratch; the same pictures for all three."""
    frozen = {}
    task.probe()

    def probe(k, chosen):
        start = time.perf_counter()
        if not frozen:
            body, _ = task.backbone()
            top = layers(body)[-1:]
            for part, pictures in (("train", task.train), ("val", task.val)):
                found, _ = features(body, top, DataLoader(Pictures(*pictures), 32))
                frozen[part] = found[top[0]]
            frozen["s"] = (time.perf_counter() - start) / (len(task.train[1]) + len(task.val[1]))
        start, (train, val) = time.perf_counter(), (task.train[1], task.val[1])
        reached = linear_probe(frozen["train"][chosen], train[chosen], frozen["val"], val).accuracy
        return [(time.perf_counter() - start + frozen["s"] * len(chosen), reached)]

    def scratch(k, chosen):
        """As good as we could make it: a small network with batch norm at 32 px, flips, many epochs."""
        epochs = 2 if args.quick else max(30, min(150, 3000 // k))
        network = (nn.Identity(), small_cnn(num_classes=task.classes, in_channels=3, width=16))
        train = Pictures(smaller(task.train[0][chosen], 32), task.train[1][chosen], flip=bool(args.root))
        return fit(
            Finetune(network, 3e-3), [], train, Pictures(smaller(task.val[0], 32), task.val[1]), epochs=epochs, every=epochs
        ).seen

    def tuned(k, chosen):
        epochs = 2 if args.quick else {5: 20, 20: 10}.get(k, args.epochs)
        return finetuned(task, args, (task.train[0][chosen], task.train[1][chosen]), epochs, epochs)

    runs = {"probe": probe, "finetuned": tuned, "scratch": scratch}
    rows = []
    for k in args.shots or ((5, 20) if args.quick else (5, 20, 240)):
        if int(task.train[1].bincount().min()) < k:
            continue
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            chosen = shots(task.train[1], k, seed)
            for name in args.methods or SHOTS:
                torch.manual_seed(seed)
                if name in runs:
                    records.make(f"{k} a class", name, seed, lambda name=name, k=k, chosen=chosen: runs[name](k, chosen))
        base = records.of(f"{k} a class", "scratch")
        for name in SHOTS[:2]:
            ours = records.of(f"{k} a class", name)
            pairs = [(a["seen"][-1], b["seen"][-1]) for a in ours for b in base if a["seed"] == b["seed"]]
            if pairs:
                a, b = (statistics.mean(pair[side][1] for pair in pairs) for side in (0, 1))
                s, t = (statistics.mean(pair[side][0] for pair in pairs) for side in (0, 1))
                gain = mean_se([x[1] - y[1] for x, y in pairs])
                print(f"{k} a class: {name} {a:.3f} ({s:.1f} s), from scratch {b:.3f} ({t:.1f} s), paired gain {gain}", flush=True)
                rows.append(compare(f"{k} a class, {name}", "from scratch", a, b, "accuracy", larger_is_better=True, n=len(pairs)))
    return rows


def mean_se(values, digits=3):
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} +- {error:.{digits}f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--root")
    parser.add_argument("--weights")
    parser.add_argument("--model", default="squeezenet1_0")
    parser.add_argument("--px", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--top", type=int, default=2, help="stages that the recipe finetunes, the head among them")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the recipe's head")
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="epochs between looks at the validation set, outside of the clock")
    parser.add_argument("--folder", help="keep the recipe's features there: only the first run pays for them")
    parser.add_argument("--records", help="file that collects the runs of recipes and shots")
    parser.add_argument("--methods", nargs="*", help=f"of recipes: {', '.join(RECIPES)}; of shots: {', '.join(SHOTS)}")
    parser.add_argument("--shots", nargs="*", type=int, help="pictures a class")
    parser.add_argument("--only", nargs="*", default=["cache", "probe", "recipes", "shots"])
    args = parser.parse_args()
    args.px = args.px or (160 if args.root else 16)
    args.epochs = args.epochs or (2 if args.quick else 8)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = cache_rows(args) if "cache" in args.only else []
    if set(args.only) - {"cache"}:
        task = Task(args)
        records = Records(args.records, {"root": bool(args.root), "px": args.px, "epochs": args.epochs, "top": args.top, "lr": args.lr})
        rows += probe_rows(args, task) if "probe" in args.only else []
        rows += recipe_rows(args, task, records) if "recipes" in args.only else []
        rows += shot_rows(args, task, records) if "shots" in args.only else []
    report(rows, args.json)


if __name__ == "__main__":
    main()
