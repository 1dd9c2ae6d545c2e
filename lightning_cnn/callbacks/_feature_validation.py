"""Validation pictures pass the frozen prefix once, too: later validations of the same fit answer with what left it then.

The pictures are loaded all the same, for metrics and callbacks that look at them. Where the answer cannot be known to be the same,
validation goes on as without a cache: random data, a loader that tells no indices, a step that runs the prefix more than once, or
weights of the prefix that a callback exchanges for the validation.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_cnn.callbacks._feature_check import Check
from lightning_cnn.callbacks._feature_lane import Entry, Lane, lane_loader, refusals, samples_of
from lightning_cnn.callbacks._feature_store import FeatureStore
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.nn.prefix import PrefixSwitch
from lightning_cnn.nn.stages import Unit

log = logging.getLogger(__name__)


class Watched(Lane):
    """Loads everything, and says which samples each batch holds."""

    def deliver(self, fetched: Any) -> Any:
        self.arriving.append(Entry(torch.tensor(fetched.index), None, []))
        return fetched.batch


class ValidationLane:
    """One validation loader, what the prefix said of its samples, and whether that may be used in the validation that runs."""

    def __init__(self, memory_bytes: int, changes: Callable[[Any], bool], place: Callable[[Any, str], Path | None]) -> None:
        self._memory, self._changes, self._place = memory_bytes, changes, place
        self.lane: Watched | None = None
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
        """The loader to validate with: `loader` itself where its batches cannot be told apart."""
        reasons = refusals(loader) or (["its data are random"] if self._changes(loader) else [])
        self.lane, self._key = None, ""
        if reasons:
            log.info("FeatureCache: validation runs as without it: %s", "; ".join(reasons))
            return loader
        self._loader, self.lane = loader, Watched(FeatureStore(1, samples_of(loader), None, self._memory))
        return lane_loader(loader, self.lane)

    def follow(self, prefix: list[Unit], switch: PrefixSwitch | None, key: str) -> None:
        """Validate with this prefix from now on; what another one said is forgotten."""
        self._prefix, self._switch = prefix, switch
        if not self._active or key == self._key:
            return
        self._key, self._unchecked = key, True
        lane = self._need_lane()
        try:
            lane.restock(FeatureStore(1, lane.store.samples, self._place(self._loader, key), self._memory))
        except ConfigurationError as error:  # data that cannot be told from others in a folder
            self._give_up(str(error))

    def begins(self, module: LightningModule) -> None:
        self._first, self._recorded = True, 0
        if self._active and self._unchecked and not bool(self._need_lane().store.seen.any()):
            self._check = Check(module, self._prefix, self._need_switch())

    def arrives(self, name: Callable[[], str]) -> None:
        """A batch is on its way; `name` hashes the weights as they are in this validation."""
        if self.lane is None or not self.lane.arriving:
            return
        entry = self.lane.arriving.popleft()
        if self._first and self._active:
            self._first, self._stale = False, name() != self._key
        if self._active and not self._stale:
            self.lane.stepping.append(entry)

    def batch_begins(self, device: torch.device) -> None:
        if not self._active or not self._need_lane().stepping:
            return
        store, switch, entry = self._need_lane().store, self._need_switch(), self._need_lane().stepping.popleft()
        self._recorded = 0
        if bool(store.seen[0, entry.index].all()):
            (features,) = store.read(0, entry.index)
            switch.features = features.to(device, non_blocking=True)
        else:
            switch.record = lambda output: self._keep(entry, output)

    def batch_ends(self) -> None:
        if not self._active:
            return
        switch = self._need_switch()
        if switch.record is not None and self._recorded != 1:
            self._give_up(f"a step ran the prefix {self._recorded} times")
        switch.features = switch.record = None

    def ends(self) -> None:
        if self._check is not None:
            self._check.remove()
            self._check, self._unchecked = None, False

    @property
    def _active(self) -> bool:
        return self.lane is not None and self._switch is not None and not self._given_up

    def _keep(self, entry: Entry, output: Tensor) -> None:
        self._recorded += 1
        if self._recorded == 1:
            try:
                self._need_lane().store.write(0, entry.index, [output])
            except ConfigurationError as error:  # too much for memory
                self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        self._given_up = reason
        log.info("FeatureCache: validation goes on as without it: %s", reason)
        self._need_lane().store.seen.zero_()

    def _need_lane(self) -> Watched:
        assert self.lane is not None  # whoever asks is active
        return self.lane

    def _need_switch(self) -> PrefixSwitch:
        assert self._switch is not None
        return self._switch
