"""`lightning-cnn summary`: the model of a configuration, layer by layer."""

from pathlib import Path

from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary
from omegaconf import DictConfig

from lightning_cnn.app import _build


def run(config: DictConfig, folder: Path) -> None:
    """Print the layers and parameters of `model` and write them to `summary.txt`."""
    config = _build.resolved(config, folder)
    text = str(ModelSummary(_build.model(config, _build.data(config)), max_depth=config.max_depth))
    (folder / "summary.txt").write_text(text + "\n")
    print(text)
    print(folder)
