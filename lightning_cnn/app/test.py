"""`lightning-cnn test`: evaluate a checkpoint on the test pictures of its run, or of `data=...`."""

from pathlib import Path

from omegaconf import DictConfig

from lightning_cnn.app import _build, _report


def run(config: DictConfig, folder: Path) -> float | None:
    """Test `ckpt_path` and write `folder`; returns the test accuracy."""
    config = _build.resolved(config, folder)
    _build.seed_everything(config.seed)
    data = _build.data(config)
    model = _build.restored(config, data)
    trainer = _build.trainer(config, folder)
    results = trainer.test(model, datamodule=data, verbose=False)
    _report.pictures(folder, trainer, model, data)
    return _report.finish(
        folder, {name: float(value) for part in results for name, value in part.items()}, title=f"test {config.ckpt_path}"
    )
