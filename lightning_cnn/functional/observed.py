"""Does anybody look at the operators that run? If not, a function may be called in an operator's place, which is many times cheaper."""

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled


def observed() -> bool:
    """Whether a compiler, a tracer, a dispatch mode (a counter of operations, selective checkpointing) or a profiler is at work."""
    tracing = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return tracing or _len_torch_dispatch_stack() > 0 or _profiler_enabled()
