"""Validation pictures pass the frozen prefix once, too: later validations of the same fit answer with what left it then.

Where that cannot be known to be the same, validation goes on as without a cache: random data, a loader that tells no indices, a step
that runs the prefix more than once, or weights of the prefix that a callback exchanges for the validation.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_cnn.callbacks._feature_check import Check
from lightning_cnn.callbacks._feature_lane import OFF, Entry, Lane, lane_loader, read, refusals, samples_of
from lightning_cnn.callbacks._feature_store import FeatureStore
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.nn.prefix import PrefixSwitch
from lightning_cnn.nn.stages import Unit

log = logging.getLogger(__name__)


class ValidationLane:
    """One validation loader, what its samples said, and whether that may be used in the validation that runs."""

    def __init__(self, memory_bytes: int, changes: Callable[[Any], bool], place: Callable[[Any, str], Path | None]) -> None:
        self._memory, self._changes, self._place = memory_bytes, changes, place
        self.lane: Lane | None = None
        self._loader: Any = None
        self._key = ""
        self._given_up = ""
        self._stale = self._first = False
        self._check: Check | None = None
        self._recorded = 0
        self._unchecked = False
        self._switch: PrefixSwitch | None = None
        self._prefix: list[Unit] = []

    def wrapped(self, loader: Any) -> Any:
        """The loader to validate with: `loader` itself where its batches cannot be remembered."""
        reasons = refusals(loader) or (["its data are random"] if self._changes(loader) else [])
        self.lane, self._key = None, ""
        if reasons:
            log.info("FeatureCache: validation runs as without it: %s", "; ".join(reasons))
            return loader
        self._loader, self.lane = loader, Lane(FeatureStore(1, samples_of(loader), None, self._memory))
        return lane_loader(loader, self.lane)

    def follow(self, prefix: list[Unit], switch: PrefixSwitch | None, key: str) -> None:
        """Validate with this prefix from now on; what another one said is forgotten."""
        if self.lane is None:
            return
        self._switch, self._prefix = switch, prefix
        self.lane.view.fill_(OFF if switch is None or self._given_up else 0)
        if switch is not None and key != self._key:
            self._key, self._unchecked = key, True
            self.lane.restock(FeatureStore(1, self.lane.store.samples, self._place(self._loader, key), self._memory))
            if bool(self.lane.store.seen.any()):
                self.lane.learn(read(self._loader, [0], 0))

    def begins(self, module: LightningModule) -> None:
        self._first, self._recorded = True, 0
        if self.lane is not None and self._active and self._unchecked and not bool(self.lane.store.seen.any()):
            self._check = Check(module, self._prefix, self._need_switch())

    def to_device(self, batch: Any, own: Callable[[Any], Any], name: Callable[[], str]) -> Any:
        """`own` moves a batch; `name` hashes the weights as they are in this validation."""
        if self.lane is None or not self.lane.arriving:
            return own(batch)
        entry = self.lane.arriving.popleft()
        if self._first:
            self._first, self._stale = False, name() != self._key
        if self._stale or self._given_up:
            return own(batch if entry.features is None else read(self._loader, entry.index.tolist(), 0))
        self.lane.stepping.append(entry)
        return own(batch)

    def batch_begins(self, device: torch.device) -> None:
        if self.lane is None or not self.lane.stepping:
            return
        entry, switch = self.lane.stepping.popleft(), self._need_switch()
        self._recorded = 0
        if entry.features is not None:
            switch.features = entry.features.to(device, non_blocking=True)
        else:
            switch.record = lambda output: self._keep(entry, output)

    def batch_ends(self) -> None:
        if self.lane is None or not self._active:
            return
        switch = self._need_switch()
        if switch.record is not None and self._recorded != 1:
            self._give_up(f"a step ran the prefix {self._recorded} times")
        switch.features = switch.record = None

    def ends(self, loaders: Any) -> None:
        """Loader workers cost more than they bring once nothing is loaded."""
        if self._check is not None:
            self._check.remove()
            self._check, self._unchecked = None, False
        if self.lane is not None and self._active and bool(self.lane.store.seen.all()):
            loaders.flattened[0].num_workers = 0

    @property
    def _active(self) -> bool:
        return self.lane is not None and int(self.lane.view) != OFF

    def _keep(self, entry: Entry, output: Tensor) -> None:
        self._recorded += 1
        if self._recorded == 1 and self.lane is not None:
            try:
                self.lane.store.write(0, entry.index, [output, *entry.rest])
            except ConfigurationError as error:  # too much for memory
                self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        self._given_up = reason
        log.info("FeatureCache: validation goes on as without it: %s", reason)
        if self.lane is not None:
            self.lane.store.seen.zero_()

    def _need_switch(self) -> PrefixSwitch:
        assert self._switch is not None  # the view is OFF without
        return self._switch
