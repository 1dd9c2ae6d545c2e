"""Kill a run in the middle of an epoch, resume it, and get the weights of the run that was never killed, to the last bit.

Result: SIGTERM in step 15 of 30: exit code 143; resumed to step 30: 0 of 98,477 weights differ (seed 0).
Command: python examples/14_exact_resume.py (2 cores of an AMD EPYC (Zen 3), torch 2.15.0)
"""

import logging
import os
import signal
import sys
import tempfile
import warnings

import lightning as L
import torch

from lightning_cnn.callbacks import BatchAugmentation, ExactResume, NetworkNoise
from lightning_cnn.checkpoint import SafeCheckpointIO
from lightning_cnn.data import Digits
from lightning_cnn.model import Classifier

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
EPOCHS, BATCHES = (1, 4) if "--quick" in sys.argv else (3, 10)


class TerminateAt(L.Callback):
    """The scheduler's signal, in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_before_backward(self, trainer, model, loss):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder, *callbacks, ckpt_path=None):
    torch.manual_seed(0)
    model = Classifier(architecture="small_cnn", classes=10, in_channels=1)
    noise = [BatchAugmentation(augment="affine"), NetworkNoise(dropout=0.2)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        max_epochs=EPOCHS, limit_train_batches=BATCHES, accelerator="cpu", default_root_dir=folder,
        callbacks=[ExactResume(seed=0), *noise, *callbacks], plugins=[SafeCheckpointIO()], **quiet,
    )  # fmt: skip
    trainer.fit(model, Digits(batch_size=64), ckpt_path=ckpt_path)
    return torch.cat([weight.flatten() for weight in model.state_dict().values()]), trainer.global_step


with tempfile.TemporaryDirectory() as folder:
    whole, steps = train(folder)
    stop = steps // 2 - 1
    try:
        train(folder, TerminateAt(stop))
    except SystemExit as leaving:
        code = leaving.code
    resumed, last = train(folder, ckpt_path=f"{folder}/checkpoints/last.ckpt")
different = int((whole != resumed).sum())
print(f"SIGTERM in step {stop + 1} of {steps}: exit code {code}; resumed to step {last}: {different} of {len(whole):,} weights differ")
