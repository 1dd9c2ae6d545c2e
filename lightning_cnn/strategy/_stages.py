"""One rank's stages of a cut network, run by torch.distributed.pipelining on batches of any size."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

# Class of the engine, and stages a rank. Not the V-shaped zero bubble: torch 2.15 cannot evaluate with it.
SCHEDULES: dict[str, tuple[Any, int]] = {
    "gpipe": (schedules.ScheduleGPipe, 1),
    "1f1b": (schedules.Schedule1F1B, 1),
    "interleaved": (schedules.ScheduleInterleaved1F1B, 2),
    "zb": (schedules.ScheduleInterleavedZeroBubble, 2),
}


def places(schedule: str, ranks: int) -> list[int]:
    """The rank of each stage.

    >>> places("1f1b", 2), places("zb", 2)
    ([0, 1], [0, 1, 0, 1])
    """
    return list(range(ranks)) * SCHEDULES[schedule][1]


def micro_batches_problem(schedule: str, micro_batches: int, ranks: int) -> str | None:
    """Why the engine would refuse this number."""
    if schedule != "gpipe" and micro_batches < ranks:
        return f"schedule={schedule!r} needs at least as many micro_batches as processes ({ranks}), got {micro_batches}"
    if SCHEDULES[schedule][1] > 1 and micro_batches % max(1, micro_batches // ranks):
        return f"schedule={schedule!r} needs micro_batches to be a multiple of the number of processes ({ranks}), got {micro_batches}"
    return None


class Runner:
    """The engine for batches of one shape: pads them to equal micro-batches, and tells every rank the network's answer."""

    def __init__(
        self,
        stages: list[nn.Module],
        picture: Tensor,
        schedule: str,
        micro_batches: int,
        device: torch.device,
        context: Callable[[], AbstractContextManager],
        loss: Callable[[Tensor, Tensor], Tensor] | None,
        group: Any = None,
    ) -> None:
        kind, each = SCHEDULES[schedule]
        rank, owners = dist.get_rank(group), places(schedule, dist.get_world_size(group))
        self.mine = [i for i, owner in enumerate(owners) if owner == rank]
        self.first, self.last, self.speaker = owners[0] == rank, owners[-1] == rank, owners[-1]
        self.micro_batches, self.device, self.group = micro_batches, device, group
        wrapped = [_InContext(stage, context) for stage in stages]
        passed = _passed(wrapped, picture, -(-len(picture) // micro_batches), trains=loss is not None)
        self.answer_like = passed[-1]
        built = [PipelineStage(wrapped[i], i, len(stages), device, passed[i], passed[i + 1], group=group) for i in self.mine]
        self.schedule = kind(built if each > 1 else built[0], micro_batches, loss_fn=loss, scale_grads=False)

    def train(self, picture: Tensor) -> tuple[Tensor, float]:
        """Forward and backward; the answer, and the sum of the losses of the micro-batches."""
        losses: list[Tensor] = []
        rows, padded = self._padded(picture)
        answer = self.schedule.step(*((padded,) if self.first else ()), **({"target": rows, "losses": losses} if self.last else {}))
        total = torch.stack(losses).detach().sum().double() if losses else torch.zeros((), dtype=torch.float64, device=self.device)
        return self._told(answer, total, len(picture))

    def evaluate(self, picture: Tensor) -> Tensor:
        answer = self.schedule.eval(*((self._padded(picture)[1],) if self.first else ()))
        return self._told(answer, torch.zeros((), dtype=torch.float64, device=self.device), len(picture))[0]

    def _padded(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers and pictures, filled up to equal micro-batches with copies of the last picture, whose answers are not used."""
        missing = -len(picture) % self.micro_batches
        rows = torch.arange(len(picture) + missing, device=picture.device)
        return rows, torch.cat([picture, picture[-1:].expand(missing, *picture.shape[1:])]) if missing else picture

    def _told(self, answer: Tensor | None, total: Tensor, count: int) -> tuple[Tensor, float]:
        """What the last stage knows, in one message to all: a message costs more than what it carries."""
        like = self.answer_like
        shape = (len(like) * self.micro_batches, *like.shape[1:])
        told = answer.detach().contiguous() if answer is not None else like.new_empty(shape)
        message = torch.cat([total.view(1).view(torch.uint8), told.flatten().view(torch.uint8)])
        dist.broadcast(message, group=self.group, group_src=self.speaker)
        return message[8:].view(like.dtype).view(shape)[:count], float(message[:8].view(torch.float64))


class _InContext(nn.Module):
    """A stage under the precision plugin's context: the engine runs outside it, so that the backward pass is not autocast."""

    def __init__(self, stage: nn.Module, context: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.stage, self.context = stage, context

    def forward(self, picture: Tensor) -> Any:
        with self.context():
            return self.stage(picture).contiguous()


def _passed(stages: list[_InContext], picture: Tensor, size: int, *, trains: bool) -> list[Tensor]:
    """Tensors like those that go into the first stage, from each to the next, and out of the last, as found with one picture.

    The engine could find them itself, but by sending objects to and fro, and not where a process has two stages.
    """
    x, found = picture[:1], [picture[:1].expand(size, *picture.shape[1:]).clone()]
    devices = [x.device] if x.is_cuda else []
    with torch.set_grad_enabled(trains), torch.random.fork_rng(devices):
        for stage in stages:
            y = stage(x)
            x = y.detach().requires_grad_(y.requires_grad)
            found.append(y.new_empty((size, *y.shape[1:])).requires_grad_(y.requires_grad))
    return found
