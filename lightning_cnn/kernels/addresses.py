# pyright: reportCallIssue=false, reportMissingParameterType=false, reportArgumentType=false, reportReturnType=false
# (numba's intrinsics are called without their first parameter)
"""Memory by address: a kernel called with integers starts in a microsecond, one called with arrays in ten."""

from types import FunctionType
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ADDRESS = ir.IntType(64)


def load(b: Any, address: Any, kind: Any, align: int) -> Any:
    """The value of LLVM type `kind` at `address`."""
    value = b.load(b.inttoptr(address, ir.PointerType(kind)))
    value.align = align
    return value


def store(b: Any, value: Any, address: Any, align: int) -> None:
    b.store(value, b.inttoptr(address, ir.PointerType(value.type))).align = align


def after(b: Any, address: Any, distance: int) -> Any:
    return b.add(address, ir.Constant(ADDRESS, distance))


@intrinsic
def word_at(typingctx, address):
    """The uint64 at `address`."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return load(b, arguments[0], ADDRESS, 8)

    return types.uint64(types.intp), build


@intrinsic
def float_at(typingctx, address):
    """The float32 at `address`."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return load(b, arguments[0], ir.FloatType(), 4)

    return types.float32(types.intp), build


@intrinsic
def set_word(typingctx, address, word):
    """Write the uint64 `word` to `address`."""

    def build(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        store(b, arguments[1], arguments[0], 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.uint64), build


def compiled(loop: Any) -> Any:
    """A function that other kernels call."""
    return njit(loop, boundscheck=False, nogil=True, error_model="numpy", cache=True)


def both(loop: Any) -> tuple[Any, Any]:
    """The loop for one thread and for several.

    The second bears a name of its own: numba's cache on disk knows a function by its name and its argument types, not by `parallel`,
    and would hand out the one for the other.
    """
    twin = FunctionType(loop.__code__, loop.__globals__, f"{loop.__name__}_threads")
    twin.__module__, twin.__qualname__ = loop.__module__, f"{loop.__qualname__}_threads"
    return tuple(
        njit(f, parallel=parallel, nogil=True, boundscheck=False, error_model="numpy", cache=True)
        for f, parallel in ((loop, False), (twin, True))
    )  # pyright: ignore[reportReturnType]
