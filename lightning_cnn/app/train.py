"""`lightning-cnn train`: fit, test the best weights, leave a report."""

import logging
from pathlib import Path

import lightning as L
from omegaconf import DictConfig

from lightning_cnn.app import _build, _report

log = logging.getLogger(__name__)


def run(config: DictConfig, folder: Path) -> float | None:
    """Train as `config` says and write `folder`; returns the test accuracy, which is what a sweep compares."""
    config = _build.resolved(config, folder)
    _build.seed_everything(config.seed)
    if config.get("recipe"):
        return _report.finish(folder, _build.built(config.recipe)(folder), table=False)  # a recipe prints its own
    data = _build.data(config)
    model = _build.model(config, data)
    trainer = _build.trainer(config, folder)
    if getattr(model, "loaded", None):
        log.info("Weights: %s", model.loaded)
    trainer.fit(model, datamodule=data, ckpt_path=_build.checkpoint(config))
    if trainer.interrupted:
        raise SystemExit(130)
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if config.test:
        numbers |= _tested(trainer, model, data)
    if not trainer.is_global_zero:
        return None  # one process of a run reports
    left_out = getattr(data, "left_out", ())
    if left_out:
        numbers["pictures_left_out"] = len(left_out)
        (folder / "left_out.txt").write_text("\n".join(left_out) + "\n")
    _report.pictures(folder, trainer, model, data)
    return _report.finish(folder, numbers, title=config.name, loaded=getattr(model, "loaded", None))


def _tested(trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    results = trainer.test(model, datamodule=data, ckpt_path=best or None, verbose=False, weights_only=True if best else None)
    return {name: float(value) for part in results for name, value in part.items()}
