"""What each layer of a network that read printed letters knows about handwritten digits, without training it on one (DeCAF).

Result: accuracy with 5 a class, 20 a class and all 997 digits: first stage 0.720 / 0.880 / 0.945, last stage 0.915 / 0.953 / 0.985 (+- 0.003 to
0.040; 200 validation pictures; 2 cores of an AMD EPYC (Zen 3), torch 2.15.0).
Command: python examples/03_decaf.py
"""

import argparse

import lightning as L

from lightning_cnn.callbacks import DecafReport
from lightning_cnn.data import Digits, Letters
from lightning_cnn.model import Classifier

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def main(epochs: int, folder: str) -> None:
    L.seed_everything(0, verbose=False)
    letters, digits = Letters(), Digits()
    model = Classifier(architecture="small_cnn", classes=letters.classes, in_channels=1)
    L.Trainer(max_epochs=epochs, accelerator="cpu", **QUIET).fit(model, datamodule=letters)

    report = DecafReport(shots=[None, 5, 20], folder=folder)  # writes a table, a curve, nearest neighbours and a map
    L.Trainer(max_epochs=0, accelerator="cpu", callbacks=[report], **QUIET).fit(model, datamodule=digits)

    for layer, reached in report.accuracy.items():
        print(f"{layer:<12}" + "  ".join(f"{shots:>4}: {mean:.3f} +- {error:.3f}" for shots, (mean, error) in reached.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it runs")
    parser.add_argument("--folder", default="outputs/decaf")
    arguments = parser.parse_args()
    main(1 if arguments.quick else 30, arguments.folder)
