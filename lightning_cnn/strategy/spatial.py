"""One picture over several devices: each computes some of its rows and columns and asks the neighbours for the rest."""

import logging
import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_cnn.errors import NoEffectWarning, raise_all
from lightning_cnn.strategy import _channels, _windows  # noqa: F401  they fill the band's rules
from lightning_cnn.strategy._band import Band, whole, wrap
from lightning_cnn.strategy._divided import Divided
from lightning_cnn.strategy._doctor import Diagnosis, batch_norms
from lightning_cnn.strategy._grid import Grid

log = logging.getLogger(__name__)


class Spatial(Divided):
    """Divides every picture of a batch among `height` times `width` processes, for pictures whose activations do not fit one.

    Convolutions, pooling, padding and normalisation exchange exactly the rows and columns they need, forward and backward; BatchNorm
    counts the whole picture; before an operation that is not known the picture is put together, so the result is that of one process
    whatever the model does. Weights are the same everywhere: checkpoints are those of one process.

    Source: Dryden et al. 2019, "Improving strong-scaling of CNN training by exploiting finer-grained parallelism", arXiv:1903.06681.
    """

    def __init__(self, *, height: int = 2, width: int = 1, timeout_s: float = 1800.0, **kwargs: Any) -> None:
        raise_all(
            [f"height must be at least 1, got {height}"] * (height < 1)
            + [f"width must be at least 1, got {width}"] * (width < 1)
            + [f"timeout_s must be positive, got {timeout_s}"] * (timeout_s <= 0)
        )
        super().__init__(timeout_s=timeout_s, **kwargs)
        self.height, self.width = height, width
        self._grid: Grid | None = None

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self._grid = Grid(self.height, self.width, self.global_rank)
        self._warned = False

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        found = super().examine(trainer, model)
        if trainer.world_size not in (1, self.height * self.width):
            found.problems.append(
                f"height={self.height} times width={self.width} is {self.height * self.width} processes, and the Trainer has "
                f"{trainer.world_size}; make them equal"
            )
        if norms := batch_norms(model):
            found.advice.append(f"BatchNorm ({norms[0]}, ...) counts the whole pictures: two small all-reduces a layer and direction")
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._divided(super().training_step, args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._divided(super().validation_step, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._divided(super().test_step, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._divided(super().predict_step, args, kwargs)

    def _divided(self, step: Any, args: Any, kwargs: Any) -> Any:
        if self.world_size == 1 or self._grid is None:
            return step(*args, **kwargs)
        self.check_same_batch((args, kwargs))
        grid, bands = self._grid, 0

        def part(value: Tensor) -> Tensor:
            nonlocal bands
            divided = divide(value, grid) if value.dim() == 4 else value
            bands += isinstance(divided, Band)
            return divided

        args, kwargs = apply_to_collection(args, Tensor, part), apply_to_collection(kwargs, Tensor, part)
        if not bands and not self._warned:
            self._warned = True
            warnings.warn(
                f"Spatial found no pictures (b c h w) of at least {self.height}x{self.width} pixels in the batch, so every process does "
                "all the work",
                NoEffectWarning,
                stacklevel=2,
            )
        return apply_to_collection(step(*args, **kwargs), Band, whole)

    def teardown(self) -> None:
        if self._grid is not None:
            put_together = ", ".join(sorted(self._grid.gathered)) or "nothing"
            log.info("Spatial: %dx%d processes; pictures were put together before: %s", self.height, self.width, put_together)
        super().teardown()


def divide(picture: Tensor, grid: Grid) -> Tensor:
    """This device's part of pictures that every device has; too small ones stay as they are."""
    extent = (picture.shape[2], picture.shape[3])
    if not grid.fits(extent):
        return picture
    own = grid.own(extent)
    return wrap(picture[..., slice(*own.rows), slice(*own.columns)].clone(), grid, extent)
