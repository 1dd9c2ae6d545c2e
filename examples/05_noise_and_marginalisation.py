"""Training adds noise, testing averages it out: each kind of noise, tested with one pass and marginalised over.

Result: 3 seeds, one pass -> marginalised: accuracy (mean±sd), calibration error, NLL, cost in passes; 10 labels a digit, 600 test pictures
  none; test flip  0.949±0.023 -> 0.917±0.024  0.019 -> 0.249     0.173 -> 0.544   2.00
  flip             0.919±0.012 -> 0.927±0.016  0.024 -> 0.024     0.246 -> 0.235   2.00
  affine           0.969±0.021 -> 0.969±0.018  0.016 -> 0.044     0.120 -> 0.133  16.00
  dropout          0.947±0.018 -> 0.947±0.020  0.020 -> 0.022     0.170 -> 0.176   1.03
  dropconnect      0.949±0.028 -> 0.946±0.027  0.024 -> 0.026     0.161 -> 0.167   1.07
  batch norm       0.949±0.023 -> 0.948±0.019  0.019 -> 0.016     0.173 -> 0.175   8.00
  initial weights  0.949±0.023 -> 0.949±0.020  0.019 -> 0.020     0.173 -> 0.169   3.00
Helped: training on affine; averaging after flips. Not: flips, other noises; averaging over affine worsened calibration.
Command: python examples/05_noise_and_marginalisation.py (2 shared AMD EPYC cores, torch 2.15.0); twin: experiment=noise_and_marginalisation
"""

import sys
import tempfile
from statistics import mean, stdev

import lightning as L
import torch

from lightning_cnn import callbacks, data, model, nn

OFF = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
KINDS = {  # augmentation in training, noise in the network, and what testing averages over
    "none; test flip": (None, {}, [callbacks.HorizontalFlip()]),
    "flip": ("flip", {}, [callbacks.HorizontalFlip()]),
    "affine": ("affine", {}, [callbacks.Augmented(16, augment="affine")]),
    "dropout": (None, {"dropout": 0.5}, [callbacks.MCDropout(16)]),
    "dropconnect": (None, {"dropconnect": 0.5}, [callbacks.MCDropConnect(16)]),
    "batch norm": (None, {}, [callbacks.MCBatchNorm(8)]),
    "initial weights": (None, {}, None),  # an ensemble of three
}


def trained(augment, noise, digits, epochs, seed):
    L.seed_everything(seed, verbose=False)
    classifier = model.Classifier(architecture="small_cnn", classes=digits.classes, in_channels=1, lr=3e-3)
    nn.inject(classifier.network, **noise) if noise else None
    noisy = [callbacks.BatchAugmentation(augment=augment, seed=seed)] if augment else []
    L.Trainer(max_epochs=epochs, limit_val_batches=0, callbacks=noisy, **OFF).fit(classifier, datamodule=digits)
    return classifier


def measured(kind, epochs, seed):
    (augment, noise, views), digits = KINDS[kind], data.Digits(shots=10, batch_size=10, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        for member in range(0 if views else 3):
            torch.save(trained(augment, noise, digits, epochs, 100 * member + seed).state_dict(), f"{folder}/{member}.pt")
        views = views or [callbacks.Ensemble([f"{folder}/{member}.pt" for member in range(3)])]
        report = callbacks.EvaluationReport(compare={"marginalised": views}, folder=folder)
        L.Trainer(callbacks=[report], **OFF).test(trained(augment, noise, digits, epochs, seed), datamodule=digits, verbose=False)
    return [way[name] for name in ("accuracy", "ece", "nll") for way in report.table.values()] + [report.table["marginalised"]["cost"]]


if __name__ == "__main__":
    epochs, seeds = (1, 1) if "--quick" in sys.argv else (60, 3)  # 60 epochs of 10 steps
    for kind in KINDS:
        columns = zip(*(measured(kind, epochs, seed) for seed in range(seeds)), strict=True)
        print(f"{kind:<16}", *(f"{mean(c):.3f}" + (f"±{stdev(c):.3f}" if seeds > 1 else "") for c in columns), sep="  ")
