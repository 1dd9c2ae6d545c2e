"""From a checked configuration to objects: data, model, trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from lightning_cnn.app import _check, _checkpoint, _report
from lightning_cnn.checkpoint import load
from lightning_cnn.errors import LightningCNNError, raise_all


def resolved(config: DictConfig, folder: Path) -> DictConfig:
    """The configuration with every interpolation filled in, checked once more, and written to the run's folder.

    The second check is what makes the first one hold: an interpolation may have produced a node that nobody had seen.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    filled = DictConfig(plain)
    allow = tuple(f"{package}." for package in plain.get("allow_packages") or ())
    raise_all(_check.problems(filled, allow=allow))
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(filled, folder / "config.yaml")
    return filled


def built(node: Any) -> Any:
    """What a checked node describes; an error of ours comes out as it was raised, not wrapped in Hydra's."""
    try:
        return instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, LightningCNNError):
            raise error.__cause__ from None
        raise


def data(config: DictConfig) -> L.LightningDataModule:
    return built(config.data)


def model(config: DictConfig, data: L.LightningDataModule) -> L.LightningModule:
    """The model, with its classes taken from the data where both speak of classes."""
    node = config.model
    if "classes" in node and hasattr(data, "classes"):
        node = OmegaConf.merge(node, {"classes": list(data.classes)})  # type: ignore[attr-defined]
    return built(node)


def restored(config: DictConfig, data: L.LightningDataModule) -> L.LightningModule:
    """The model of `ckpt_path`, built from the hyper-parameters in it (plain types, read with `weights_only=True`)."""
    kind = _check.resolve(config.model._target_, tuple(f"{package}." for package in config.get("allow_packages") or ()))
    path = _checkpoint.find(config.ckpt_path)
    load(path)  # verified; `load_from_checkpoint` reads past the plugin
    return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)


def trainer(config: DictConfig, folder: Path, **changes: Any) -> L.Trainer:
    """The Trainer with the menu's callbacks, strategy, precision and checkpoint plugins; logs to `metrics.csv` and TensorBoard in `folder`."""
    callbacks = [*(built(node) for node in config.callbacks.values() if node), _report.Answers()]
    arguments = {key: value for key, value in config.trainer.items() if key != "_target_" and value is not None}
    if config.get("strategy"):
        arguments["strategy"] = built(config.strategy)
    plugins = [built(config[group]) for group in ("precision", "checkpoint") if config.get(group)]
    loggers = [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="", version="tensorboard")]
    return L.Trainer(callbacks=callbacks, plugins=plugins, logger=loggers, default_root_dir=folder, **{**arguments, **changes})


def seed_everything(seed: int) -> None:
    """Seeds only what this package does not draw from: initial weights, and third parties' global generators."""
    L.seed_everything(seed, workers=True, verbose=False)
    torch.use_deterministic_algorithms(False)


def checkpoint(config: Mapping[str, Any]) -> str | None:
    asked = config.get("ckpt_path")
    return str(_checkpoint.find(asked)) if asked else None
