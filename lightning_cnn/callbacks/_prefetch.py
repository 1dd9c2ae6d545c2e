"""One batch ahead: while the step runs, the next batch is fetched and copied to the device on a stream of its own."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_cnn.functional.batch import Batch

KEPT = ("index",)  # stays on the host: noise is keyed by it before the step starts


class SideStream:
    """Copies to a GPU from a ring of pinned buffers. `depth` batches may be under way besides the one in use."""

    def __init__(self, device: torch.device, depth: int) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.slots: deque[tuple[dict[tuple[int, torch.Size, torch.dtype], Tensor], Any]] = deque()
        self.slots.extend(({}, None) for _ in range(depth + 1))

    def send(self, batch: Any) -> tuple[Any, Any]:
        """The batch on its way, and the event that says it has arrived."""
        buffers, busy = self.slots.popleft()
        if busy is not None:
            busy.synchronize()  # the copy before the last: long done
        place = iter(range(1 << 30))
        with torch.cuda.stream(self.stream):
            sent = mapped(batch, lambda tensor: self._pinned(tensor, buffers, next(place)).to(self.device, non_blocking=True))
            event = torch.cuda.Event()
            event.record(self.stream)
        self.slots.append((buffers, event))
        return sent, event

    def receive(self, batch: Any, event: Any) -> Any:
        """Let the current stream wait for the batch, without the host; and its memory for the current stream."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        mapped(batch, lambda tensor: (tensor.record_stream(current), tensor)[1])
        return batch

    def _pinned(self, tensor: Tensor, buffers: dict[tuple[int, torch.Size, torch.dtype], Tensor], place: int) -> Tensor:
        if tensor.is_pinned() or tensor.is_cuda:
            return tensor
        key = (place, tensor.shape, tensor.dtype)
        if key not in buffers:
            buffers[key] = torch.empty_like(tensor, pin_memory=True)
        return buffers[key].copy_(tensor)


class Prefetched:
    """A loader whose next batch is already under way. Its state is that of the last batch delivered, not of those fetched ahead."""

    def __init__(self, loader: Any, lane: Any, depth: int) -> None:
        self.loader, self.lane, self.depth = loader, lane, depth
        self._state: Any = None

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while unpickling
            raise AttributeError(name)
        found = getattr(self.loader, name)
        return self._state_dict if name == "state_dict" else self._load_state_dict if name == "load_state_dict" else found

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        source = iter(self.loader)
        ahead: deque[tuple[Any, Any, Any]] = deque()
        self._fetch(source, ahead)
        while ahead:
            batch, event, self._state = ahead.popleft()
            batch = self.lane.receive(batch, event)
            if not ahead:
                self._fetch(source, ahead)  # its copy runs beside the step that begins now
            yield batch
            while len(ahead) < self.depth and self._fetch(source, ahead):
                pass
        self._state = None

    def _fetch(self, source: Iterator[Any], ahead: deque[tuple[Any, Any, Any]]) -> bool:
        try:
            batch = next(source)
        except StopIteration:
            return False
        state = self.loader.state_dict() if hasattr(self.loader, "state_dict") else None
        ahead.append((*self.lane.send(batch), state))
        return True

    def _state_dict(self) -> Any:
        return self.loader.state_dict() if self._state is None else self._state

    def _load_state_dict(self, state: Any) -> None:
        self._state = None
        self.loader.load_state_dict(state)


def mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of every tensor of a batch of any type, except of a `Batch`'s index."""
    if is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in fields(batch) if not (isinstance(batch, Batch) and field.name in KEPT)]
        changed = {name: mapped(getattr(batch, name), function) for name in names}
        made: Any = object.__new__(type(batch))
        made.__dict__.update({**vars(batch), **changed})
        return made
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)
