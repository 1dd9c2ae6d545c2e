"""Run the frozen prefix of a network once a sample, and train the rest on what it said.

The first epoch is the ordinary one, except that what leaves the prefix is stored by sample; from then on batches are neither loaded nor
run through the prefix, and the weights of the rest are bit for bit those of the run without this callback. Order of samples, random
draws, hooks of the module and distributed samplers stay as they are. When a stage is unfrozen, the prefix and the store start again
one stage lower.

Source: Donahue et al. 2014, "DeCAF", arXiv:1310.1531 (features computed once, classifiers trained on them).
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_cnn.callbacks._feature_check import Check
from lightning_cnn.callbacks._feature_lane import OFF, Entry, Lane, dataset_of, lane_loader, read, refusals, samples_of
from lightning_cnn.callbacks._feature_store import FeatureStore, data_key, weights_key
from lightning_cnn.callbacks._feature_validation import ValidationLane
from lightning_cnn.callbacks._sharded import sharded_problems
from lightning_cnn.errors import ConfigurationError, DataError, UnsupportedLayerError, raise_all
from lightning_cnn.nn.prefix import PrefixSwitch, frozen_prefix
from lightning_cnn.nn.stages import Unit, units

log = logging.getLogger(__name__)


class FeatureCache(Callback):
    """Store what leaves the frozen prefix: in memory up to `memory_gib`, or in memory-mapped files under `folder`.

    A folder is shared by the processes of a run and reused by later runs; its sub-folders are named by a hash of the prefix's weights
    and of the data and their transform. `views` > 1 keeps that many random versions of each picture: epoch e trains on version
    e mod views, so random augmentation costs `views` ordinary epochs. With one view random data are refused. Validation is remembered
    beside it, in as much memory again, or runs as without this callback, and the log says why.
    """

    def __init__(self, *, views: int = 1, folder: str | None = None, memory_gib: float = 2.0) -> None:
        raise_all([f"views must be at least 1, got {views}"] if views < 1 else [])
        self.views, self.folder, self.memory_gib = views, folder, memory_gib
        self._lane: Lane | None = None
        self._switch: PrefixSwitch | None = None
        self._chain: list[Unit] = []
        self._prefix: list[Unit] = []
        self._versions: list[int] = []
        self._check: Check | None = None
        self._workers = 0
        self._recorded = 0
        self._key = ""
        self._sources: list[Any] = []
        self._validation = ValidationLane(0, _changes, self._place)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        problems = sharded_problems(trainer, "FeatureCache")
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            problems.append("FeatureCache exchanges forward methods, which a compiled module has baked in: fit the module uncompiled")
        raise_all(problems)
        source: Any = trainer.fit_loop._data_source
        given = source.dataloader
        vars(source)["dataloader"] = lambda: self._wrapped(given())
        validated: Any = trainer.fit_loop.epoch_loop.val_loop._data_source
        given_to_validate = validated.dataloader
        self._validation = ValidationLane(int(self.memory_gib * 2**30), _changes, self._place)
        vars(validated)["dataloader"] = lambda: self._validation.wrapped(given_to_validate())
        self._sources = [source, validated]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._chain = units(pl_module)
        strategy = trainer.strategy
        self._transfer, self._had_transfer = strategy.batch_to_device, vars(strategy).get("batch_to_device")

        def batch_to_device(batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
            return self._to_device(trainer, batch, device, dataloader_idx)

        vars(strategy)["batch_to_device"] = self._ours = batch_to_device

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lane, loader = self._need_lane(), trainer.fit_loop._combined_loader.flattened[0]  # pyright: ignore[reportOptionalMemberAccess]
        self._follow(trainer, pl_module, loader)
        self._validation.follow(self._prefix, self._switch, self._key)
        if self._switch is None:
            lane.view.fill_(OFF)
            return
        view = trainer.current_epoch % self.views
        lane.view.fill_(view)
        # Loader workers cost more than they bring once most batches load nothing.
        stored = float(lane.store.seen[view].float().mean())
        loader.num_workers = 0 if stored > 0.5 else self._workers

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        lane, switch = self._need_lane(), self._switch
        if switch is None or not lane.stepping:
            return
        if batch_idx == 0 and [unit.name for unit in frozen_prefix(self._chain)] != [unit.name for unit in self._prefix]:
            raise ConfigurationError(
                "stages were frozen or unfrozen after FeatureCache had looked: list FeatureCache after that callback."
            )
        entry = lane.stepping.popleft()
        self._recorded = 0
        switch.features = entry.features
        switch.record = None if entry.features is not None else lambda output: self._keep(entry, output)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        switch = self._switch
        if switch is None:
            return
        if switch.record is not None and self._recorded != 1:
            raise UnsupportedLayerError(
                f"the prefix ran {self._recorded} times in one training step; FeatureCache stores one answer a sample."
            )
        switch.features = switch.record = None
        if self._check is not None and self._check.done:
            self._check = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.begins(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._validation.batch_begins(trainer.strategy.root_device)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._validation.batch_ends()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.ends()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._lane is not None:
            self._lane.view.fill_(OFF)  # whoever reads the training data between epochs gets the real ones
            self._lane.restart()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo(trainer)

    def _wrapped(self, loader: Any) -> Any:
        raise_all(refusals(loader))
        if self.views == 1:
            _refuse_random_data(loader)
        self._memory = int(self.memory_gib * 2**30)
        self._loader, self._workers = loader, getattr(loader, "num_workers", 0)
        self._lane = Lane(FeatureStore(self.views, samples_of(loader), None, self._memory))
        return lane_loader(loader, self._lane)

    def _follow(self, trainer: Trainer, pl_module: LightningModule, loader: Any) -> None:
        """Keep prefix and store in step with what is frozen now, and with its weights."""
        first = self._switch is None and not self._prefix
        try:
            prefix = frozen_prefix(self._chain)
        except UnsupportedLayerError:
            if first:
                raise
            log.info("epoch %d: nothing is frozen any more, features are not cached", trainer.current_epoch)
            self._leave()
            return
        versions = [tensor._version for unit in prefix for tensor in (*unit.module.parameters(), *unit.module.buffers())]
        same = [unit.name for unit in prefix] == [unit.name for unit in self._prefix]
        if same and self._switch is not None and versions == self._versions:
            return
        key = _name(pl_module, prefix)
        if not (same and self._switch is not None and key == self._key):
            self._enter(pl_module, prefix, key, loader)
        self._versions, self._key = versions, key

    def _enter(self, pl_module: LightningModule, prefix: list[Unit], key: str, loader: Any) -> None:
        self._leave()
        lane = self._need_lane()
        store = FeatureStore(self.views, lane.store.samples, self._place(self._loader, key), self._memory)
        lane.restock(store)
        if bool(store.seen.any()):
            lane.learn(_first(self._loader))
        self._prefix, self._switch = prefix, PrefixSwitch(prefix)
        self._check = Check(pl_module, prefix, self._switch)
        log.info(
            "FeatureCache: '%s' to '%s' runs once a sample and view; %d of %d stored before",
            prefix[0].name, prefix[-1].name, int(store.seen.sum()), store.seen.numel(),
        )  # fmt: skip

    def _place(self, loader: Any, key: str) -> Path | None:
        return Path(self.folder) / f"{key}-{data_key(dataset_of(loader), _some(loader))}" if self.folder else None

    def _leave(self) -> None:
        if self._check is not None:
            self._check.remove()
        if self._switch is not None:
            self._switch.remove()
        self._check = self._switch = None

    def _to_device(self, trainer: Trainer, batch: Any, device: torch.device | None, dataloader_idx: int) -> Any:
        if trainer.validating:
            self._validation.arrives(lambda: _name(trainer.lightning_module, self._prefix))
        lane = self._need_lane()
        if not trainer.training or not lane.arriving:
            return self._transfer(batch, device=device, dataloader_idx=dataloader_idx)
        entry = lane.arriving.popleft()
        lane.stepping.append(entry)
        if entry.features is not None:
            entry.features = entry.features.to(trainer.strategy.root_device, non_blocking=True)
            # The class's own: callbacks that augment batches have nothing to do here.
            return type(trainer.strategy).batch_to_device(trainer.strategy, batch, device=device, dataloader_idx=dataloader_idx)
        with _at_epoch(trainer, trainer.current_epoch % self.views if self.views > 1 else trainer.current_epoch):
            moved = self._transfer(batch, device=device, dataloader_idx=dataloader_idx)
        if self.views == 1 and self._check is not None and self._had_transfer is not None:
            self._refuse_random_transfer(trainer, batch, moved, device, dataloader_idx)
        return moved

    def _refuse_random_transfer(
        self, trainer: Trainer, batch: Any, moved: Any, device: torch.device | None, dataloader_idx: int
    ) -> None:
        with _other_randomness(), _at_epoch(trainer, trainer.current_epoch + 1):
            again = self._transfer(batch, device=device, dataloader_idx=dataloader_idx)
        if not _equal(moved, again):
            raise ConfigurationError(
                "a callback augments the batches at random, so there is no one feature vector a picture: give views=k for k fixed "
                "versions of each, or leave the augmentation out."
            )

    def _keep(self, entry: Entry, output: Tensor) -> None:
        self._recorded += 1
        lane = self._need_lane()
        if self._recorded == 1:
            lane.store.write(int(lane.view), entry.index, [output, *entry.rest])

    def _need_lane(self) -> Lane:
        if self._lane is None:
            raise DataError("FeatureCache has seen no training data: fit() was given none.")
        return self._lane

    def _undo(self, trainer: Trainer) -> None:
        self._leave()
        for source in self._sources:
            vars(source).pop("dataloader", None)
        self._sources = []
        installed = vars(trainer.strategy)
        if installed.get("batch_to_device") is getattr(self, "_ours", self):
            del installed["batch_to_device"]
            if self._had_transfer is not None:
                installed["batch_to_device"] = self._had_transfer
        self._lane, self._chain, self._prefix, self._ours = None, [], [], self
        self._validation = ValidationLane(0, _changes, self._place)


def _name(module: LightningModule, prefix: list[Unit]) -> str:
    """A hash of the prefix's weights and the whole architecture, since what is behind the prefix was checked with it."""
    return weights_key(f"{prefix[-1].name} {module}", [unit.module for unit in prefix])


def _changes(loader: Any) -> bool:
    """Load a few samples twice under different randomness, and leave no trace in any generator."""
    return not _equal(_some(loader), _some(loader, 1))


def _refuse_random_data(loader: Any) -> None:
    if _changes(loader):
        raise ConfigurationError(
            "the training data are transformed at random, so there is no one feature vector a picture: give views=k for k fixed "
            "versions of each, or a deterministic transform."
        )


def _some(loader: Any, shift: int = 0) -> list[Tensor]:
    last, tensors = samples_of(loader) - 1, []
    with _other_randomness(shift):
        apply_to_collection(read(loader, sorted({round(i * last / 7) for i in range(8)}), shift), Tensor, tensors.append)
    return tensors


def _first(loader: Any) -> Any:
    with _other_randomness():
        return read(loader, [0], 0)


def _equal(a: Any, b: Any) -> bool:
    found: list[list[Tensor]] = [[], []]
    for tensors, value in zip(found, (a, b), strict=True):
        apply_to_collection(value, Tensor, tensors.append)
    return len(found[0]) == len(found[1]) and all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@contextmanager
def _other_randomness(shift: int = 0) -> Iterator[None]:
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(97 + shift)
        random.seed(97 + shift)
        np.random.seed(97 + shift)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


@contextmanager
def _at_epoch(trainer: Trainer, epoch: int) -> Iterator[None]:
    """Noise keyed by the epoch is drawn as in `epoch`."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    now = progress.processed
    progress.processed = epoch
    try:
        yield
    finally:
        progress.processed = now
