"""Dropout, DropConnect and stochastic depth in an existing network while a Trainer uses it, resume-exact and different for each sample.

`nn.inject` puts the noise in; this callback keys it: before each training step the noise becomes a function of (seed, epoch, sample).
"""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_cnn.callbacks._batch_hook import BatchTransform, Samples
from lightning_cnn.functional.batch import image_key, read
from lightning_cnn.nn.inject import Injection, Rates, inject


class NetworkNoise(BatchTransform):
    """Inject noise at setup, key it for each training batch, and remove it at teardown or after an exception.

    Args:
        dropout: Probability for the input of every `nn.Linear`; or by name, `{"net.3": 0.1}`, for the input of any layer.
        dropconnect: Probability for the weights of every `nn.Linear`; or by name for any `nn.Linear` and `nn.Conv2d`.
        stochastic_depth: Probability for the last residual branch, rising linearly to it from the first; or by the name of the module
            that ends each branch.
        seed: Another seed is other noise.

    Evaluation is the plain network, but finds the layers: `Marginalize(views=[MCDropout()])` after this callback averages over them.

    Raises:
        UnsupportedLayerError: at `setup`, listing every rate that finds no layer it can work on.
    """

    def __init__(self, *, dropout: Rates = 0.0, dropconnect: Rates = 0.0, stochastic_depth: Rates = 0.0, seed: int = 0) -> None:
        self.rates: dict[str, Rates] = {"dropout": dropout, "dropconnect": dropconnect, "stochastic_depth": stochastic_depth}
        self.seed = seed
        self._injection: Injection | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._injection is None:
            self._injection = inject(pl_module, **self.rates)

    def transform(self, batch: Any, samples: Samples) -> Any:
        """The batch as it is: only the network learns which samples it holds."""
        if self._injection is not None and self._injection.sites:
            self._injection.source.keyed(samples.key(self.seed, "network"), samples.index, read(batch, image_key(batch)).device)
        return batch

    def _remove(self) -> None:
        super()._remove()
        if self._injection is not None:
            self._injection.remove()
            self._injection = None
