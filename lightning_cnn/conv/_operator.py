"""One operator for a convolution and both its gradients, so that autograd, `torch.compile` and flop counters see one opaque step.

The three roles are closed under differentiation: each is linear in either argument, and the derivative of one is another. So
gradients of any order go through the algorithm that was chosen for their role.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_cnn.conv import _tuner
from lightning_cnn.conv._call import ROLES, Call, Role, load, run
from lightning_cnn.functional.conv.geometry import Geometry
from lightning_cnn.functional.conv.layout import is_channels_last
from lightning_cnn.functional.observed import observed

SCHEMA = (
    "(str role, Tensor a, Tensor b, Tensor? bias, SymInt[] size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "str plan, bool keep) -> Tensor"
)


def compute(role, a, b, bias, size, stride, padding, dilation, groups, plan, keep) -> Tensor:
    """`role` of (x, weight, bias), (g, weight) or (x, g); `size` is the picture of an input gradient, the kernel of a weight's."""
    call = describe(role, a, b, size, Geometry(tuple(stride), tuple(padding), tuple(dilation), groups), keep)
    result = run(algorithm_for(call, plan), call, a.detach(), b if keep else b.detach(), bias)
    if not result._is_view():
        return result
    return result.new_empty(0).set_(result)  # pyright: ignore[reportArgumentType]  # autograd lets nobody write into a view from in here


convolve = torch.library.custom_op("lightning_cnn::convolve", compute, mutates_args=(), schema=SCHEMA)


@convolve.register_fake
def _(role, a, b, bias, size, stride, padding, dilation, groups, plan, keep):
    shape = _shape(role, a, b, size, stride, padding, dilation, groups)
    layout = torch.channels_last if _last(a, b) else torch.contiguous_format
    return torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=layout)


def describe(role: Role, a: Tensor, b: Tensor, size: list[int], geometry: Geometry, keep: bool) -> Call:
    """The call that `convolve` is asked for."""
    if role == "forward":
        x, weight = tuple(a.shape), tuple(b.shape)
    elif role == "input":
        x, weight = (a.shape[0], b.shape[1] * geometry.groups, *size), tuple(b.shape)
    else:
        x, weight = tuple(a.shape), (b.shape[1], a.shape[1] // geometry.groups, *size)
    return Call(role, x, weight, geometry, a.dtype, a.device.type, _last(a, b), torch.get_num_threads(), keep)


def algorithm_for(call: Call, plan: str) -> str:
    """The name in the plan for this role, or the measured one; what refuses the call is replaced by the default."""
    if plan.startswith("auto"):
        return _tuner.tuner_for(plan).choose(call)
    names = plan.split("/")
    name = names[ROLES.index(call.role)] if len(names) == len(ROLES) else names[0]
    return "default" if min(call.y) <= 0 or load(name).refuses(call) else name


def _setup(ctx, inputs, output):
    role, a, b, bias, _, *ctx.geometry, plan, _ = inputs
    ctx.role, ctx.plan, ctx.biased = role, plan, bias is not None
    ctx.save_for_backward(a, b)


def _derivative(ctx, gradient: Tensor):
    a, b = ctx.saved_tensors
    want_a, want_b, want_bias = ctx.needs_input_grad[1:4]

    def again(role: Role, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
        size = [] if role == "forward" else list(like.shape[2:])
        return convolution(role, left, right, None, size, *ctx.geometry, ctx.plan, False)

    if ctx.role == "forward":  # y = x * w
        ga = again("input", gradient, b, a) if want_a else None
        gb = again("weight", a, gradient, b) if want_b else None
    elif ctx.role == "input":  # linear in g = a and w = b
        ga = again("forward", gradient, b, a) if want_a else None
        gb = again("weight", gradient, a, b) if want_b else None
    else:  # linear in x = a and g = b
        ga = again("input", b, gradient, a) if want_a else None
        gb = again("forward", a, gradient, b) if want_b else None
    gbias = gradient.sum((0, 2, 3)) if ctx.biased and want_bias else None
    return None, ga, gb, gbias, *[None] * 7


convolve.register_autograd(_derivative, setup_context=_setup)  # pyright: ignore[reportFunctionMemberAccess]


class _Recorded(torch.autograd.Function):
    """The operator with its derivative, but past the dispatcher."""

    backward = staticmethod(_derivative)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def forward(ctx, *inputs):  # A `setup_context` of its own would have torch bind the signature anew in each call
        output = compute(*inputs)
        _setup(ctx, inputs, output)
        return output


def convolution(role: Role, a: Tensor, b: Tensor, bias: Tensor | None, *others) -> Tensor:
    """`convolve` by the shortest way: the dispatcher's Python takes longer than a small layer."""
    if observed():
        return convolve(role, a, b, bias, *others)
    recorded = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (a, b, bias))
    return (_Recorded.apply if recorded else compute)(role, a, b, bias, *others)


@register_flop_formula(torch.ops.lightning_cnn.convolve)
def _flops(role, a, b, bias, size, stride, padding, dilation, groups, *_, **__) -> int:
    if role == "weight":
        return 2 * b[0] * b[2] * b[3] * b[1] * (a[1] // groups) * size[0] * size[1]
    taps = b[1] * b[2] * b[3]
    if role == "input":
        return 2 * a[0] * a[1] * a[2] * a[3] * taps
    high, wide = ((a[2 + i] + 2 * padding[i] - dilation[i] * (b[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    return 2 * a[0] * b[0] * high * wide * taps


def _shape(role, a, b, size, stride, padding, dilation, groups):
    if role == "input":
        return (a.shape[0], b.shape[1] * groups, *size)
    if role == "weight":
        return (b.shape[1], a.shape[1] // groups, *size)
    high, wide = ((a.shape[2 + i] + 2 * padding[i] - dilation[i] * (b.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    return (a.shape[0], b.shape[0], high, wide)


def _last(a: Tensor, b: Tensor) -> bool:
    """One operand with the channels last is enough for torch to answer so, filters' gradients included."""
    return is_channels_last(a) or is_channels_last(b)
