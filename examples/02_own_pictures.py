"""From a folder of your pictures to a classifier: a pretrained network, its head replaced, fine-tuned with the lecture's rates.

Result: accuracy 0.900 of 80 held-out stand-in digits, a small CNN from scratch (without a folder, as in the command below); one seed;
2 cores of an AMD EPYC (Zen 3).
Command: python examples/02_own_pictures.py
Your pictures: python examples/02_own_pictures.py FOLDER --architecture squeezenet1_0 --weights FILE --size 96
Twin: lightning-cnn train experiment=transfer data.root=FOLDER
"""

import argparse
import tempfile
from pathlib import Path

import lightning as L
from torchvision.utils import save_image

from lightning_cnn.callbacks import BatchAugmentation, DiscriminativeLR, HorizontalFlip, Marginalize
from lightning_cnn.data import Digits, ImageFolders
from lightning_cnn.model import Classifier


def stand_in(folder):
    """Without a folder of yours: handwritten digits as PNG files, a folder a class."""
    digits = Digits(shots=40)
    digits.setup()
    for k, (image, label) in enumerate(digits.train):
        path = Path(folder, str(int(label)), f"{k}.png")
        path.parent.mkdir(exist_ok=True)
        save_image(image / 255, path)
    return folder


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root", nargs="?", help="a folder with a folder for each class")
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--weights", help="a .pth or .safetensors file, or DEFAULT (downloaded)")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="small and short: to see that it runs")
    options = parser.parse_args()
    if options.root is None or options.quick:
        options.architecture, options.size, options.epochs = "small_cnn", 32, 1 if options.quick else 15
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        data = ImageFolders(root=options.root or stand_in(folder), size_px=options.size)
        model = Classifier(architecture=options.architecture, classes=data.classes, weights=options.weights, lr=1e-3)
        noise, rates, views = BatchAugmentation(augment="flip"), DiscriminativeLR(), Marginalize(views=[HorizontalFlip()])
        callbacks = [noise, views, *([rates] if options.weights else [])]
        trainer = L.Trainer(max_epochs=options.epochs, callbacks=callbacks, logger=False, enable_checkpointing=False)
        trainer.fit(model, datamodule=data)
        trainer.test(model, datamodule=data)
        print(model.loaded or "no weights were loaded")


if __name__ == "__main__":
    main()
