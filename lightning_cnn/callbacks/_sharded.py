"""Strategies that hold a parameter in pieces, where a callback that works parameter by parameter would silently do something else."""

from lightning.pytorch import Trainer

SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "Scattered"}  # the last: this package's Pipeline


def sharded_problems(trainer: Trainer, name: str) -> list[str]:
    kind = type(trainer.strategy).__name__
    if not SHARDED & {base.__name__ for base in type(trainer.strategy).__mro__}:
        return []
    return [f"{name} works parameter by parameter, but {kind} holds parameters in pieces; use strategy='ddp' or leave {name} out"]
