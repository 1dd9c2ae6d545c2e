"""`lightning-cnn summary`: the model of a configuration, layer by layer: what each makes, costs and sees."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from lightning_cnn.app import _build
from lightning_cnn.functional.batch import image_key, read
from lightning_cnn.functional.roofline import roofline
from lightning_cnn.nn.architecture import architecture
from lightning_cnn.plot import architecture_chart


def run(config: DictConfig, folder: Path) -> None:
    """Print the table of `model` on one picture, and write `summary.txt` and `summary.png`."""
    config = _build.resolved(config, folder)
    data = _build.data(config)
    image = torch.zeros(1, *config.picture) if config.picture else _first_picture(data)
    found = architecture(_build.model(config, data), image, best=roofline())
    (folder / "summary.txt").write_text(f"{found}\n")
    architecture_chart(found.rows, picture_px=image.shape[-2]).savefig(folder / "summary.png")
    print(found)
    print(folder)


def _first_picture(data) -> Tensor:
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    return read(batch, image_key(batch))[:1]
