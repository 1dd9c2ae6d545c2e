"""Who is in the job and who is not any more.

Every rank holds one idle TCP connection to rank 0. When a process dies the kernel closes its end, so rank 0 knows within milliseconds
and tells the others; when a machine disappears without a word, TCP keepalive gives up after `KEEPALIVE_S`. Nothing is polled, no thread
has to be scheduled in time to stay "alive", and a rank that leaves in good order says so. c10d alone says "connection closed by peer":
no rank, and only to the ranks that happen to be talking to it.
"""

import atexit
import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from lightning_cnn.errors import DistributedError

log = logging.getLogger(__name__)
KEEPALIVE_S = 6
CONNECT_S = 5
BYE, STOP = b"bye\n", b"stop\n"


class Team:
    """The ranks of one job, their store, and the list of those that were lost (`lost`, in order)."""

    _current: "Team | None" = None

    @classmethod
    def join(cls, rank: int, size: int, address: tuple[str, int], timeout_s: float, missing: Callable[[], str | None]) -> "Team":
        """This process's team: made once, shared by every Trainer of the process. `missing` says who can never come."""
        if cls._current is None or cls._current.closed or (cls._current.rank, cls._current.size) != (rank, size):
            cls._current = cls(rank, size, address, timeout_s, missing)
        return cls._current

    def __init__(self, rank: int, size: int, address: tuple[str, int], timeout_s: float, missing: Callable[[], str | None]) -> None:
        self.rank, self.size, self.closed, self.stopping = rank, size, False, False
        self.lost: list[int] = []
        self._numbers = Counter[str]()
        self._on_loss: Callable[[int], None] = lambda rank: None
        self._lock = threading.Lock()
        self._deadline, self._missing = time.monotonic() + timeout_s, missing
        self.store: Any = self._open_store(address, timeout_s)  # torch's stubs know neither bytes values nor `append`
        self._links = self._gather() if rank == 0 else {0: self._report(address[0])}
        for peer, link in self._links.items():
            threading.Thread(target=self._listen, args=(peer, link), name=f"team-{peer}", daemon=True).start()
        atexit.register(self.leave)

    def watch(self, on_loss: Callable[[int], None]) -> None:
        """Call `on_loss` with every rank that is lost from now on, and with those that were lost before anybody watched."""
        with self._lock:
            self._on_loss, before = on_loss, list(self.lost)
        for rank in before:
            on_loss(rank)

    @property
    def living(self) -> list[int]:
        return [rank for rank in range(self.size) if rank not in self.lost]

    def fresh(self, word: str) -> str:
        """A prefix for keys of the store that no earlier Trainer of this process has used; equal on all ranks, which count alike."""
        self._numbers[word] += 1
        return f"{word}/{self._numbers[word]}"

    def under(self, prefix: str) -> Any:
        """The store below a prefix, over a connection of its own: one that waits must not block another's."""
        return PrefixStore(prefix, self.store.clone())

    def error(self, doing: str = "") -> DistributedError:
        """The typed error for the ranks lost so far."""
        who = f"rank {self.lost[0]}" if len(self.lost) == 1 else f"ranks {', '.join(map(str, self.lost))}"
        return DistributedError(
            f"{who} of {self.size} died{f' while rank {self.rank} was {doing}' if doing else ''}. "
            "Look for its own last output (killed, out of memory, exception), then resume from the last checkpoint; "
            "any number of ranks may resume."
        )

    def stop(self) -> None:
        """Somebody was asked to stop: `stopping` becomes true on every rank, soon."""
        with self._lock:
            if not self.stopping:
                self.stopping = True
                for link in self._links.values():
                    _send(link, STOP)

    def leave(self, *, in_order: bool = True) -> None:
        """Say goodbye (or, `in_order=False`, let the others notice) and close."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            for link in self._links.values():
                if in_order:
                    _send(link, BYE)
                _close(link)

    def _open_store(self, address: tuple[str, int], timeout_s: float) -> TCPStore:
        # torchrun's agent already serves the store at this address; otherwise rank 0 does, and c10d's default group will share it.
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not serves:
            _close(self._dial(address))  # waits until rank 0 is there, and notices when it never will be
            try:  # the client alone would knock at a dead rank 0's door for the whole timeout
                store = TCPStore(*address, None, False, timedelta(seconds=CONNECT_S), wait_for_workers=False, multi_tenant=True)
            except RuntimeError as error:
                if not _listens(address):
                    raise self._rank_zero_gone() from error
                continue
            store.set_timeout(timedelta(seconds=timeout_s))
            return store
        return TCPStore(*address, None, True, timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=True)

    def _gather(self) -> dict[int, socket.socket]:
        token = secrets.token_bytes(16)
        with socket.create_server(("", 0), backlog=self.size) as door:
            door.settimeout(0.2)
            self.store.set("team/door", token + str(door.getsockname()[1]).encode())
            links: dict[int, socket.socket] = {}
            while len(links) < self.size - 1:
                self._check_hope([rank for rank in range(1, self.size) if rank not in links])
                try:
                    link, _ = door.accept()
                except TimeoutError:
                    continue
                link.settimeout(5)
                hello = _receive(link, 20)
                if hello[:16] == token:
                    links[int.from_bytes(hello[16:], "big")] = _keepalive(link)
        return links

    def _report(self, host: str) -> socket.socket:
        try:
            door = self.store.get("team/door")
            link = socket.create_connection((host, int(door[16:])), timeout=CONNECT_S)
        except (RuntimeError, OSError) as error:
            raise self._rank_zero_gone() from error
        _send(link, door[:16] + self.rank.to_bytes(4, "big"))
        return _keepalive(link)

    def _rank_zero_gone(self) -> DistributedError:
        return DistributedError(
            f"rank 0 of {self.size} died (or cannot be reached) while rank {self.rank} was joining. "
            "Look for its own last output, then start again."
        )

    def _dial(self, address: tuple[str, int]) -> socket.socket:
        while True:
            self._check_hope([0])
            try:
                return socket.create_connection(address, timeout=1)
            except OSError:
                time.sleep(0.05)

    def _check_hope(self, absent: list[int]) -> None:
        reason = self._missing()
        if reason is None and time.monotonic() > self._deadline:
            reason = "the time to join is over (timeout_s)"
        if reason:
            names = ", ".join(map(str, absent))
            raise DistributedError(f"rank {names} of {self.size} never joined: {reason}. Look for its own output, then start again.")

    def _listen(self, peer: int, link: socket.socket) -> None:
        left, text = False, b""
        while True:
            try:
                chunk = link.recv(64)
            except OSError:
                chunk = b""
            if not chunk:
                break
            *lines, text = (text + chunk).split(b"\n")
            for line in lines:
                left |= line == BYE.strip()
                if line == STOP.strip():
                    self.stop()
                if line.startswith(b"lost "):
                    self._lose(int(line[5:]))
        if not left and not self.closed:
            self._lose(peer)

    def _lose(self, rank: int) -> None:
        with self._lock:
            if rank in self.lost or rank == self.rank:
                return
            self.lost.append(rank)
            if self.rank == 0:
                for peer, link in self._links.items():
                    if peer != rank:
                        _send(link, b"lost %d\n" % rank)
            tell = self._on_loss
        tell(rank)


def gloo_group(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """A process group of our own (torch's stubs do not know its methods)."""
    return ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))


def _listens(address: tuple[str, int]) -> bool:
    try:
        _close(socket.create_connection(address, timeout=CONNECT_S))
    except OSError:
        return False
    return True


def _keepalive(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", (KEEPALIVE_S - 2) // 2)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return link


def _receive(link: socket.socket, size: int) -> bytes:
    data = b""
    try:
        while len(data) < size and (chunk := link.recv(size - len(data))):
            data += chunk
    except OSError:
        return b""
    return data


def _send(link: socket.socket, data: bytes) -> None:
    try:
        link.sendall(data)
    except OSError:  # the peer is gone; its own listener reports that
        return


def _close(link: socket.socket) -> None:
    try:
        link.shutdown(socket.SHUT_RDWR)
    except OSError:  # already closed by the peer
        pass
    finally:
        link.close()
