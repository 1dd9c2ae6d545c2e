"""Training jobs for the tests: `python training_job.py '[{"strategy": ...}, ...]'`, one after another in the same processes.

Every rank writes what it saw of job n to OUT/n-rank.json. Lightning's launcher (or torchrun) starts the other ranks.
"""

import faulthandler
import json
import logging
import os
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

warnings.filterwarnings("ignore")
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_cnn.functional.batch import Batch

torch.set_num_threads(1)


@dataclass
class Options:
    strategy: str = "sync_ddp"
    kwargs: dict = field(default_factory=dict)
    out: str = "."
    ranks: int = 2
    samples: int = 64
    batch: int = 4
    epochs: int = 2
    double: bool = True
    shuffle: bool = False
    sleep_s: float = 0.0
    slow_rank: int = -1
    optimizer: str = "sgd"
    scheduler: str = ""
    kill_rank: int = -1
    kill_step: int = 0
    term_rank: int = -1
    term_step: int = 0
    validate: bool = True
    save_epoch: bool = False
    save_best: bool = False
    save_on_exception: bool = False
    afterwards: bool = False
    gather: bool = False
    loader: str = "torch"
    resume: str = ""
    trainer: dict = field(default_factory=dict)


class Pictures(Dataset):
    """Seeded pictures of three classes that a small net can tell apart."""

    def __init__(self, n: int, dtype: torch.dtype, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.y = torch.arange(n) % 3
        means = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(99))
        self.x = (torch.randn(n, 3, 6, 6, generator=g) + means[self.y]).to(dtype)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple:
        return self.x[i], self.y[i], i


class Own:
    """A loader that is no DataLoader and splits by itself, unevenly."""

    def __init__(self, data: Pictures, batch: int, rank: int, ranks: int) -> None:
        cut = len(data) * 3 // 4
        shares = [range(len(data))] if ranks == 1 else [range(cut), range(cut, len(data))]
        self.data, self.batch, self.mine = data, batch, shares[rank]

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch)

    def __iter__(self):
        for start in range(0, len(self.mine), self.batch):
            rows = [self.data[i] for i in self.mine[start : start + self.batch]]
            yield tuple(torch.stack([torch.as_tensor(v) for v in column]) for column in zip(*rows, strict=True))


class Classifier(LightningModule):
    latest: "Classifier | None" = None

    def __init__(self, options: Options) -> None:
        super().__init__()
        Classifier.latest = self
        torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))  # ranks start apart on purpose: the strategy must agree on weights
        self.options, self.steps, self.seen, self.lrs = options, 0, [], []
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.values: list[float] = []
        self.gathered: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        x, y, index = (*batch, batch.index) if isinstance(batch, Batch) else batch
        o = self.options
        self.steps += 1
        self.seen.append(index.tolist())
        self.lrs.append(self.optimizers().param_groups[0]["lr"])
        time.sleep(o.sleep_s * (3 if self.global_rank == o.slow_rank else 1))
        if self.global_rank == o.kill_rank and self.steps == o.kill_step:
            Path(o.out, "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        if self.global_rank == o.term_rank and self.steps == o.term_step:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        if o.gather:
            self.gathered.append(sorted(self.all_gather(index).flatten().tolist()))
        return loss

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        scores = self.net(x)
        self.accuracy(scores, y)
        self.log("val_loss", F.cross_entropy(scores, y), sync_dist=True)
        self.log("val_acc", self.accuracy)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.values.append(float(self.trainer.strategy.reduce(torch.tensor(float(self.global_rank)), reduce_op="sum")))

    def configure_optimizers(self):
        o = self.options
        optimizer = {
            "sgd": lambda: torch.optim.SGD(self.parameters(), lr=0.05),
            "momentum": lambda: torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(self.parameters(), lr=0.01),
        }[o.optimizer]()
        if not o.scheduler:
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digest(module: nn.Module) -> list[float]:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten().double().cpu() for p in whole]).tolist()


def run(options: Options, strategy: object) -> tuple[Trainer, Classifier]:
    if options.double:
        torch.set_default_dtype(torch.float64)
    dtype = torch.get_default_dtype()
    module = Classifier(options)
    callbacks: list = []
    if options.save_epoch:
        callbacks.append(ModelCheckpoint(options.out, filename="{epoch}", save_top_k=-1))
    if options.save_best:
        callbacks.append(ModelCheckpoint(Path(options.out, "best"), filename="{epoch}", monitor="val_loss"))
    if options.save_on_exception:
        callbacks.append(OnExceptionCheckpoint(options.out))
    trainer = Trainer(
        accelerator="cpu",
        **{"devices": options.ranks, **options.trainer},
        strategy=strategy,
        max_epochs=options.epochs,
        logger=False,
        enable_checkpointing=bool(callbacks),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Pictures(options.samples, dtype)
    if options.loader == "lane":  # this package's: it shards itself, and resumes inside an epoch
        from lightning_cnn.data import Resumable  # not above: processes that import it cannot fork, and `kills` forks

        pairs = [(x, y) for x, y, _ in data]
        train = Resumable(pairs, batch_size=options.batch, shuffle=options.shuffle)
    elif options.loader == "own":
        train = Own(data, options.batch, trainer.global_rank, options.ranks)
    else:
        # Lightning's own sampler always shuffles the training data; this one does only when asked.
        # With one replica of the model all ranks see every batch.
        shares = (1, 0) if options.loader == "same" else (options.ranks, trainer.global_rank)
        split = DistributedSampler(data, *shares, shuffle=options.shuffle) if options.ranks > 1 else None
        train = DataLoader(data, batch_size=options.batch, sampler=split)
    validation = DataLoader(Pictures(16, dtype, seed=1), batch_size=4) if options.validate else None
    trainer.fit(module, train, validation, ckpt_path=options.resume or None)
    if options.afterwards:
        use(trainer, module, validation, Path(options.out, "afterwards.ckpt"))
    return trainer, module


def use(trainer: Trainer, module: Classifier, data: DataLoader, path: Path) -> None:
    """What people do with a model after training; the last of it by one rank alone."""
    trainer.save_checkpoint(path)
    trainer.validate(module, data, ckpt_path=str(path), verbose=False)
    trainer.save_checkpoint(path)
    if trainer.is_global_zero:
        module.net(next(iter(data))[0])


def attempt(options: Options, name: str) -> None:
    """Run one training and leave what this rank saw in `name`, whole or not at all."""
    from lightning.pytorch.strategies import StrategyRegistry

    facts: dict = {"options": asdict(options)}
    try:
        trainer, module = run(options, StrategyRegistry[options.strategy]["strategy"](**options.kwargs))
        facts |= {
            "weights": digest(module),
            "seen": module.seen,
            "gathered": module.gathered,
            "lrs": module.lrs,
            "plain": not any(isinstance(p, DTensor) for p in module.parameters()),
            "values": module.values,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "report": getattr(trainer.strategy, "report", {}),
        }
    except BaseException as error:
        killed = Path(options.out, "killed")
        facts |= {"error": type(error).__name__, "message": str(error), "seen": Classifier.latest.seen if Classifier.latest else []}
        facts["after_s"] = time.time() - float(killed.read_text()) if killed.exists() else None
        raise
    finally:
        temporary = Path(options.out, f"{name}.tmp")
        temporary.write_text(json.dumps(facts))
        temporary.rename(Path(options.out, f"{name}.json"))


def main() -> None:
    faulthandler.dump_traceback_later(float(os.environ.get("JOB_LIMIT_S", "100")), exit=True)  # a hang shows where, and ends
    import lightning_cnn.strategy  # noqa: F401  registers the names

    names = ("REPLICA_GROUP_ID", "RANK", "LOCAL_RANK")
    rank = int(next((os.environ[name] for name in names if name in os.environ), 0))
    for number, options in enumerate(json.loads(sys.argv[1])):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        Path(options["out"], f"pid{rank}").write_text(str(os.getpid()))
        attempt(Options(**options), f"{number}-{rank}")


if __name__ == "__main__":
    main()
