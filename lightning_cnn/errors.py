"""Every error says what was wrong, what was found and what to do, and is raised at construction or `setup` where it can be."""

from collections.abc import Iterable


class LightningCNNError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(LightningCNNError, ValueError):
    """An argument, a key of a configuration, or a combination of plugins cannot work."""


class UnsupportedLayerError(LightningCNNError, ValueError):
    """A layer or model cannot be treated as asked."""


class DataError(LightningCNNError, ValueError):
    """A picture, file or folder is missing, damaged or empty; the message names it (and the byte offset where there is one)."""


class CheckpointError(LightningCNNError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class DistributedError(LightningCNNError, RuntimeError):
    """A worker died, stalled or disagrees; the message names the rank."""


class NumericsError(LightningCNNError, ArithmeticError):
    """A value became non-finite or left its declared range."""


class NoEffectWarning(UserWarning):
    """A plugin was applied and changed nothing."""


def raise_all(problems: Iterable[str], error: type[LightningCNNError] = ConfigurationError) -> None:
    """Raise one `error` that lists every problem, or return when there is none.

    >>> raise_all([])
    >>> raise_all(["views must not be empty"])
    Traceback (most recent call last):
    lightning_cnn.errors.ConfigurationError: views must not be empty
    """
    found = list(problems)
    if len(found) == 1:
        raise error(found[0])
    if found:
        raise error(f"{len(found)} problems:\n" + "\n".join(f"  - {problem}" for problem in found))
