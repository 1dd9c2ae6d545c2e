"""Watch one step operation by operation: how many there are, what they compute, and where the code reads a value back."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
LIBRARIES = ("/torch/", "/lightning/", "/lightning_cnn/functional/", "contextlib.py", "/jaxtyping/", "/beartype/")


LOOP = 16  # a read that follows one at the same place after fewer operations is in a loop with it


class Reads(NamedTuple):
    """How many values were read back at one place, the operations of the loops around them, and the seconds the reads took."""

    values: int
    operations: int
    seconds: float


class StepProbe(TorchDispatchMode):
    """Use as a context around a step; it changes nothing of what is computed.

    Attributes:
        operations: how many ran, those of `reads` aside.
        flops: floating-point operations of convolutions and matrix products, by the type they were computed in.
        reads: by place in the code; only while `reading()` is true.
    """

    def __init__(self, reading: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.reading = reading
        self.operations = 0
        self.flops: dict[torch.dtype, int] = {}
        self.reads: dict[str, Reads] = {}
        self._last, self._since = "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        start = time.perf_counter()
        output = func(*args, **kwargs)
        seconds = time.perf_counter() - start
        self.operations += 1
        self._since += 1
        packet = func._overloadpacket
        if packet in flop_registry:
            dtype = next(arg.dtype for arg in args if isinstance(arg, Tensor))
            self.flops[dtype] = self.flops.get(dtype, 0) + int(flop_registry[packet](*args, **kwargs, out_val=output))
        if (packet in READS or _to_host(args, output)) and self.reading():
            self._read(_caller(), seconds)
        return output

    def _read(self, place: str, seconds: float) -> None:
        together = self._since if place == self._last and self._since < LOOP else 1
        found = self.reads.get(place, Reads(0, 0, 0.0))
        self.reads[place] = Reads(found.values + 1, found.operations + together, found.seconds + seconds)
        self.operations -= together
        self._last, self._since = place, 0


def _to_host(args: tuple, output: Any) -> bool:
    given = args[0] if args and isinstance(args[0], Tensor) else None
    return given is not None and isinstance(output, Tensor) and given.is_cuda and output.device.type == "cpu"


def _caller() -> str:
    """File and line of the innermost frame that is not a library's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in LIBRARIES):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
