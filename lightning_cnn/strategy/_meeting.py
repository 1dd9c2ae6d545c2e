"""Barriers, reductions and broadcasts of ranks that train apart.

The default process group stays uninitialised: Lightning broadcasts on it before every batch, which would march all ranks in step. What
the ranks have to say goes through the job's store instead, gathered by rank 0, so that a lost worker is simply left out.
"""

import pickle
import time
from typing import Any

import torch
from torch import Tensor

from lightning_cnn.errors import DistributedError
from lightning_cnn.strategy._watched import Watched


class Meeting(Watched):
    """Mixin: what Lightning asks of all ranks at once, asked of those who are `together`; one who is not answers for itself."""

    default_group = False
    together = True
    _last_meeting = ""

    def meet(self, what: str, value: Any = None) -> list[Any]:
        """Every living rank's value, in order of rank, on every rank. All must come, in the same order of meetings."""
        if self.team is None or not self.together or self.world_size == 1:
            return [value]
        key = self.team.fresh("meet")
        if not self.is_global_zero:
            self.team.store.set(f"{key}/{self.global_rank}", pickle.dumps((what, value)))
            return pickle.loads(self._await(f"{key}/all", 0, what))
        said = {0: (what, value)} | {rank: self._hear(rank, key, what) for rank in self.team.living if rank != 0}
        said = {rank: heard for rank, heard in said.items() if heard is not None}
        if odd := [f"rank {rank} is at '{heard[0]}'" for rank, heard in said.items() if heard[0] != what]:
            raise DistributedError(f"the ranks disagree about where they are: rank 0 is at '{what}', {', '.join(odd)}")
        values = [said[rank][1] for rank in sorted(said)]
        self.team.store.set(f"{key}/all", pickle.dumps(values))
        self.team.store.delete_key(f"{self._last_meeting}/all")  # everybody here has read it
        self._last_meeting = key
        return values

    def _hear(self, rank: int, key: str, what: str) -> tuple[str, Any] | None:
        assert self.team is not None
        data = self._await(f"{key}/{rank}", rank, what)
        self.team.store.delete_key(f"{key}/{rank}")
        return pickle.loads(data) if data else None

    def _await(self, key: str, rank: int, what: str) -> bytes:
        """The value of `key`, which `rank` will set; empty when that rank was lost and training goes on without it."""
        assert self.team is not None
        deadline, pause_s = time.monotonic() + self.timeout_s, 0.0005
        while not self.team.store.check([key]):
            if any(not self.survives(lost) for lost in self.team.lost):
                raise self.team.error(f"waiting at '{what}'")
            if rank in self.team.lost:
                return b""
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"rank {rank} did not come to '{what}' within {self.timeout_s:.0f} s; raise timeout_s or see what it does"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        return self.team.store.get(key)

    def barrier(self, name: str | None = None) -> None:
        self.meet(f"barrier {name}")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        values = self.meet("broadcast", (True, obj) if self.global_rank == src else (False, None))
        return next((value for is_source, value in values if is_source), obj)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        rows = torch.stack(self._gather_tensors(tensor)) if self.together else tensor.detach().clone()[None]
        name = str(reduce_op).rsplit(".", 1)[-1].lower()
        if name in ("mean", "avg"):
            return (rows if rows.is_floating_point() else rows.float()).mean(0)
        return {"sum": lambda: rows.sum(0), "max": lambda: rows.amax(0), "min": lambda: rows.amin(0)}[name]()

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return torch.stack(self._gather_tensors(tensor))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = self.meet("decision", bool(decision))
        return min(votes) if all else max(votes)

    def _gather_tensors(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        return [value.to(tensor.device) for value in self.meet("gather", tensor.detach().cpu())]

    def _is_together(self) -> bool:
        return self.together and self.world_size > 1
