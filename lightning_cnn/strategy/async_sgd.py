"""Asynchronous SGD with a parameter server: workers push gradients and pull weights whenever they are ready."""

import logging
import pickle
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_cnn.errors import ConfigurationError, DistributedError, raise_all
from lightning_cnn.strategy._apart import Apart
from lightning_cnn.strategy._doctor import Diagnosis
from lightning_cnn.strategy._schedule import known_to_schedulers
from lightning_cnn.strategy._server import Shard, flatten, parts, settings_of, shares
from lightning_cnn.strategy._team import gloo_group

log = logging.getLogger(__name__)
WIRE = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}
SWITCH_S = 0.0005  # how long a push may wait for the interpreter while this rank's own training holds it (Python's default: 5 ms)
PUSH, PULL, JOIN, PAUSE, STATE = range(5)


class AsyncSGD(Apart):
    """Downpour: `servers` ranks also hold a shard of the weights and run the user's own optimizer on it; nobody waits for anybody.

    `staleness=s` makes it stale-synchronous: no worker gets more than s updates ahead of the slowest. Every worker talks to every
    server over a two-rank group of its own, so a lost worker takes down its own links and nothing else; the loss of rank 0 or of
    another server ends the job with an error that names it.

    Source: Dean et al. 2012 (DistBelief, section 4.1); Ho et al. 2013 (stale-synchronous parallel); Zhang et al. 2016 (learning rate
    over staleness), arXiv:1511.05950. Departs: workers pull after every push, and the server takes lr from the pusher's schedule.
    """

    def __init__(
        self,
        *,
        staleness: int | None = None,
        scale_by_staleness: bool = False,
        servers: int = 1,
        compression: Literal["fp16", "bf16"] | None = None,
        steal: bool = True,
        timeout_s: float = 1800.0,
    ) -> None:
        raise_all(
            [f"staleness must be None (unbounded) or at least 0, got {staleness}"] * (staleness is not None and staleness < 0)
            + [f"servers must be at least 1, got {servers}"] * (servers < 1)
            + [f"compression must be one of {tuple(WIRE)}, got {compression!r}"] * (compression not in WIRE)
            + [f"timeout_s must be positive, got {timeout_s}"] * (timeout_s <= 0)
        )
        super().__init__(steal=steal, timeout_s=timeout_s)
        self.staleness, self.scale_by_staleness, self.servers, self.compression = staleness, scale_by_staleness, servers, compression
        self.shard: Shard | None = None
        self._links: dict[int, Any] = {}
        self._switch_s = sys.getswitchinterval()
        self._serving: list[threading.Thread] = []

    def survives(self, rank: int) -> bool:
        return rank >= self.servers

    def examine(self, trainer: Trainer, model: LightningModule) -> Diagnosis:
        found = super().examine(trainer, model)
        if self.servers > trainer.world_size:
            found.problems.append(f"servers={self.servers} needs as many ranks; the job has {trainer.world_size}")
        return found

    # -- starting -----------------------------------------------------------------------------------------------------------------

    def start(self, trainer: Trainer) -> None:
        """Each server copies its shard of the loaded optimizer; then every worker links to every server."""
        assert self.team is not None
        optimizer, self._session = self._only_optimizer(), self.team.fresh("push")
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._shares = shares([p.numel() for p in self._parameters], min(self.servers, len(self._parameters)))
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._parameters) else torch.float32
        self._versions, self.pushed = [0] * len(self._shares), 0
        if self.global_rank < len(self._shares):
            mine = self._parameters[self._shares[self.global_rank]]
            # One clock for the job: two servers that saw the workers arrive in different orders could make them wait for each other.
            bound = self.staleness if self.is_global_zero else None
            sys.setswitchinterval(SWITCH_S)
            self.shard = Shard(optimizer, mine, self.world_size, bound, self.scale_by_staleness)
            for worker in range(self.world_size):
                if worker != self.global_rank:
                    self._serving.append(threading.Thread(target=self._serve, args=(worker, self.shard), daemon=True))
                    self._serving[-1].start()
        others = [server for server in range(len(self._shares)) if server != self.global_rank]
        self._links = {server: link for server in others if (link := self._link(server, self.global_rank))}
        self._step, self._optimizer = optimizer.__dict__.get("step"), optimizer
        optimizer.step = self._remote_step  # type: ignore[method-assign]

    def _only_optimizer(self) -> Optimizer:
        optimizers = [o.optimizer if isinstance(o, LightningOptimizer) else o for o in self.optimizers]
        if len(optimizers) != 1 or isinstance(optimizers[0], LBFGS):
            raise ConfigurationError(
                f"AsyncSGD runs one first-order optimizer; configure_optimizers gave {[type(o).__name__ for o in optimizers]}. "
                "Return one optimizer (parameter groups are fine)."
            )
        return optimizers[0]

    def _link(self, server: int, worker: int) -> Any:
        """A group of two ranks, the server being 0; None when the worker is lost before it comes."""
        assert self.team is not None
        store = self.team.under(f"{self._session}/{server}/{worker}")
        here = int(worker == self.global_rank)
        if here:
            store.set("here", "")
        while not store.check(["here"]):
            if worker in self.team.lost or self.team.closed:
                return None
            time.sleep(0.01)
        return gloo_group(store, here, 2, self.timeout_s)

    # -- the worker's side --------------------------------------------------------------------------------------------------------

    @known_to_schedulers
    def _remote_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Stands in for `optimizer.step`, so that clipping, precision, accumulation and manual optimisation work as always."""
        output = None
        if closure is not None:
            with torch.enable_grad():
                output = closure()
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look at it
        self.pushed += 1
        self._exchange(PUSH)
        return output

    def _exchange(self, kind: int) -> None:
        """Push to (or pull from) all servers at once and take their weights."""
        for server, link in self._links.items():
            link.send([self._message(kind, self._shares[server], self._versions[server])], 0, 0).wait()
        if self.shard is not None and kind == JOIN:
            self.shard.join(self.global_rank)
        if self.shard is not None and kind == PUSH:
            here = self._shares[self.global_rank]  # applied before waiting for anybody: two servers must not wait for each other
            push = self._gradient(here).to(self._dtype), self._versions[self.global_rank], self._present(here)
            self.shard.push(self.global_rank, *push, settings_of(self._optimizer))
        answers = {server: self._answer(server) for server in self._links}
        if self.shard is not None:
            answers[self.global_rank] = self.shard.answer(self.global_rank)
        for server, (flat, self._versions[server]) in answers.items():
            with torch.no_grad():
                mine = self._parameters[self._shares[server]]
                for parameter, part in zip(mine, parts(flat, mine), strict=True):
                    parameter.copy_(part)

    def _answer(self, server: int) -> tuple[Tensor, int]:
        numel = sum(p.numel() for p in self._parameters[self._shares[server]])
        answer = torch.empty(8 + numel * self._dtype.itemsize, dtype=torch.uint8)
        self._links[server].recv([answer], 0, 0).wait()
        return answer[8:].view(self._dtype), int(answer[:8].view(torch.int64))

    def _message(self, kind: int, share: slice, seen: int) -> Tensor:
        """Header (float64: kind, version seen, which parameters have a gradient, the groups' settings), then the gradient."""
        header = torch.tensor([kind, seen, *self._present(share), *settings_of(self._optimizer)], dtype=torch.float64)
        body = self._gradient(share) if kind == PUSH else torch.zeros(sum(p.numel() for p in self._parameters[share]), dtype=self._wire)
        return torch.cat([header.view(torch.uint8), body.view(torch.uint8)])

    @property
    def _wire(self) -> torch.dtype:
        return WIRE[self.compression] or self._dtype

    def _gradient(self, share: slice) -> Tensor:
        return flatten([p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters[share]]).to("cpu", self._wire)

    def _present(self, share: slice) -> list[bool]:
        return [p.grad is not None for p in self._parameters[share]]

    # -- the server's side --------------------------------------------------------------------------------------------------------

    def _serve(self, worker: int, shard: Shard) -> None:
        """Answer one worker until its link breaks."""
        count, numel = len(shard.masters), sum(m.numel() for m in shard.masters)
        header = 2 + count + len(settings_of(shard.optimizer))
        message = torch.empty(8 * header + numel * self._wire.itemsize, dtype=torch.uint8)
        try:
            link = self._link(self.global_rank, worker)
            while link:
                link.recv([message], 1, 0).wait()
                kind, seen, *rest = message[: 8 * header].view(torch.float64).tolist()
                if kind == PAUSE:
                    shard.pause(worker)
                    continue
                if kind == STATE:
                    state = torch.frombuffer(bytearray(pickle.dumps(shard.state())), dtype=torch.uint8)
                    link.send([torch.tensor([len(state)])], 1, 0).wait()
                    link.send([state], 1, 0).wait()
                    continue
                if kind == JOIN:
                    shard.join(worker)
                if kind == PUSH:
                    gradient = message[8 * header :].view(self._wire).to(self._dtype)
                    shard.push(worker, gradient, int(seen), [bool(there) for there in rest[:count]], rest[count:])
                flat, version = shard.answer(worker)
                link.send([torch.cat([torch.tensor([version]).view(torch.uint8), flat.to(self._dtype).view(torch.uint8)])], 1, 0).wait()
        except RuntimeError as error:  # gloo's only error: the worker is gone, in order or not; the team knows which
            log.debug("link to worker %d ended: %s", worker, error)
        finally:
            shard.pause(worker)

    # -- meeting ------------------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        self._exchange(JOIN)

    def pause(self) -> None:
        for server, link in self._links.items():
            link.send([self._message(PAUSE, self._shares[server], 0)], 0, 0).wait()
        if self.shard is not None:
            self.shard.pause(self.global_rank)

    def settle(self) -> None:
        """Everybody takes the servers' weights; running statistics are averaged; what was pushed must have been applied."""
        assert self.lightning_module is not None
        buffers = [b for b in self.lightning_module.buffers() if b.is_floating_point()]
        said = self.meet("settle", (self.global_rank, self.pushed, [b.cpu() for b in buffers]))
        self._exchange(PULL)
        for index, buffer in enumerate(buffers):
            buffer.copy_(torch.stack([others[index] for _, _, others in said]).mean(0))
        shards = [s for s in self.meet("applied", self.shard and (self.shard.applied, self.shard.ages)) if s is not None]
        self._account({rank: pushed for rank, pushed, _ in said}, shards)

    def _account(self, pushed: dict[int, int], shards: list[tuple[Counter[int], Counter[int]]]) -> None:
        assert self.team is not None
        for applied, _ in shards:
            if wrong := [f"rank {r}: {n} pushed, {applied[r]} applied" for r, n in pushed.items() if applied[r] != n]:
                raise DistributedError(f"updates were lost or applied twice ({'; '.join(wrong)}); report this with the log")
        self.report = {
            "pushed": pushed,
            "applied": dict(shards[0][0]),
            "staleness": dict(sorted(shards[0][1].items())),
            "lost": self.team.lost,
        }
        log.info("AsyncSGD: pushed %s, applied %s, staleness %s, lost ranks %s", *self.report.values())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the servers hold, as the user's own optimizer would have saved it. Only rank 0 writes checkpoints, so only it asks."""
        state = super().optimizer_state(optimizer)
        if self.shard is None or not self.is_global_zero:
            return state
        shards = {0: self.shard.state()} | {server: self._fetch_state(server) for server in self._links}
        whole = {self._shares[server].start + i: value for server, shard in shards.items() for i, value in shard.items()}
        return {**state, "state": dict(sorted(whole.items()))}

    def _fetch_state(self, server: int) -> dict[int, Any]:
        link, size = self._links[server], torch.zeros(1, dtype=torch.int64)
        link.send([self._message(STATE, self._shares[server], 0)], 0, 0).wait()
        link.recv([size], 0, 0).wait()
        data = torch.empty(int(size), dtype=torch.uint8)
        link.recv([data], 0, 0).wait()
        return pickle.loads(data.numpy().tobytes())

    def teardown(self) -> None:
        if self._links or self.shard is not None:
            self._optimizer.__dict__.pop("step", None)
            if self._step is not None:
                self._optimizer.step = self._step  # type: ignore[method-assign]
        self._links = {}  # closing the worker's end of a link ends the server's thread at the other end
        for thread in self._serving:
            thread.join(timeout=5)
        if self.shard is not None:
            sys.setswitchinterval(self._switch_s)
        self._serving, self.shard = [], None
        super().teardown()
