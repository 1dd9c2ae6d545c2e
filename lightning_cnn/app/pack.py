"""`lightning-cnn pack`: write a folder of pictures, or a webdataset tar, into one contiguous file."""

from pathlib import Path

from omegaconf import DictConfig

from lightning_cnn.data import PackedImages, pack


def run(config: DictConfig, folder: Path | None = None) -> None:
    """Pack `data.root` into `out` and say what is there now."""
    report = pack(
        config.data.root,
        config.out,
        size=config.size,
        codec=config.codec,
        fit=config.fit,
        quality=config.quality,
        shards=config.shards,
        workers=config.workers,
        on_error=config.on_error,
        overwrite=config.overwrite,
    )
    for name, reason in report.skipped:
        print(f"left out {name}: {reason}")
    images = PackedImages(report.paths)
    print(f"{report.samples} pictures of {len(images.classes)} classes, {report.bytes / 1e6:.1f} MB, {len(report.skipped)} left out")
    print(*report.paths, sep="\n")
