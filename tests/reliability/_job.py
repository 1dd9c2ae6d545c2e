"""A training run with every source of randomness at once, and processes to interrupt it in."""

import os
import random
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_cnn.callbacks import EMA, BatchAugmentation, ExactResume, MixUp, NetworkNoise
from lightning_cnn.checkpoint import SafeCheckpointIO
from lightning_cnn.data import Resumable
from lightning_cnn.precision import StochasticRounding

SAMPLES, BATCH, EPOCHS = 64, 4, 3
STEPS = EPOCHS * SAMPLES // BATCH
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False) | {"accelerator": "cpu"}


class Noisy(torch.utils.data.Dataset):
    """Pictures with noise from all three global generators."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return (torch.rand(3, 8, 8) + index / SAMPLES + np.random.rand() + random.random()).clamp(0, 3) / 3, index % 4


class Net(LightningModule):
    """Dropout, batch norm, and a third party's flips and gains, drawn from all three generators, before and inside the step."""

    def __init__(self, padding=0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(288, 4))
        self.padding = nn.Parameter(torch.zeros(padding))  # makes a checkpoint as large as a test needs it
        self.losses = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training and torch.rand(()) < 0.5:
            return batch.replace(image=batch.image.flip(-1))
        return batch

    def training_step(self, batch, batch_idx):
        image, label = batch
        image = image * np.random.uniform(0.9, 1.1) + random.random() / 100
        loss = nn.functional.cross_entropy(self.net(image), label) + 0 * self.padding.sum()
        self.losses.append(float(loss.detach()).hex())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("score", self.net(batch[0]).sum() + torch.rand(()))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SaveEveryBatch(Callback):
    def __init__(self, folder):
        self.folder, self.batches = folder, 0

    def on_train_batch_end(self, trainer, *_):
        self.batches += 1
        trainer.save_checkpoint(self.folder / f"{self.batches}.ckpt")


def train(*callbacks, resume=None, accumulate=1, workers=0, rounding=False, padding=0, saver=None, io=None, **options):
    """A whole run; returns the model with its losses, one for each batch that it saw."""
    model = Net(padding)
    noise = [BatchAugmentation(augment="flip"), MixUp(classes=4, alpha=1.0), NetworkNoise(dropconnect={"net.5": 0.3}), EMA(decay=0.9)]
    plugins = [io or SafeCheckpointIO(), *([StochasticRounding()] if rounding else [])]
    trainer = Trainer(
        **{
            **QUIET,
            "max_epochs": EPOCHS,
            "callbacks": [ExactResume(), *noise, *callbacks, *([saver] if saver else [])],
            "plugins": plugins,
            "accumulate_grad_batches": accumulate,
            "enable_checkpointing": saver is not None,
            **options,
        }
    )
    model.trainer_ = trainer
    loaders = Resumable(Noisy(), batch_size=BATCH, num_workers=workers), Resumable(Noisy(), batch_size=32, shuffle=False)
    trainer.fit(model, *loaders, ckpt_path=resume)
    return model


def last_saver(folder, every=1):
    return ModelCheckpoint(folder, every_n_train_steps=every, save_last=True, filename="best", enable_version_counter=False)


def forked(work, environment=None):
    """Start `work` in a process of its own, which ends with the code that a program would end with; returns its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(environment or {})
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(process):
    """The exit code of a process, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Count(Callback):
    """Writes how many steps are done where another process can read it, and takes its time."""

    def __init__(self, path: Path, pause_s: float = 0.0) -> None:
        self.path, self.pause_s = path, pause_s

    def on_train_batch_end(self, trainer, *_):
        import time

        self.path.write_text(str(trainer.global_step))
        time.sleep(self.pause_s)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
