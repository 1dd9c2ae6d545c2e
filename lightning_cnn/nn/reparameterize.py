"""Merge what is linear for inference: batch norm into the convolution before it, parallel convolutions and skips into one.

    conv + bn                    -> conv
    conv3x3(x) + conv1x1(x) + x  -> conv3x3(x)

Exact in real arithmetic. Source: Ding et al. 2021, "RepVGG", arXiv:2101.03697, section 3.3.
"""

import copy
import operator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_cnn.errors import ConfigurationError, UnsupportedLayerError

Kind = TypeVar("Kind", bound=nn.Module)
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")


def reparameterize(model: nn.Module) -> fx.GraphModule:
    """A copy of `model` for inference, with fewer layers and, up to rounding, the same outputs; `model` itself is not touched.

    Branches are merged where they add up before any nonlinearity: convolutions with the same input, stride, groups and centre, batch norms
    alone, and the input itself.

    Raises:
        ConfigurationError: the model is in training mode, in which batch norm is not linear.
        UnsupportedLayerError: `torch.fx` cannot trace it; or nothing can be merged.
    """
    if model.training:
        raise ConfigurationError("reparameterize() is for inference, and the model is in training mode. Call model.eval() first.")
    try:
        traced = fx.symbolic_trace(copy.deepcopy(model))
    except Exception as error:
        raise UnsupportedLayerError(f"torch.fx cannot trace {type(model).__name__}: {error}. {_advice(model)}") from error
    merged = 0
    while _one_merge(traced):
        merged += 1
    if not merged:
        raise UnsupportedLayerError(
            f"{type(model).__name__} has no batch norm after a convolution and no parallel convolutions to merge."
        )
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


def _advice(model: nn.Module) -> str:
    """The parts that have convolutions, by name: of a LightningModule, its network."""
    parts = [name for name, part in model.named_children() if any(isinstance(layer, nn.Conv2d) for layer in part.modules())]
    if not parts:
        return "Give a part of it that is a plain network."
    return (
        "Give the part that is a plain network: " + " or ".join(f"model.{name} = reparameterize(model.{name})" for name in parts) + "."
    )


def _one_merge(traced: fx.GraphModule) -> bool:
    return any(_merge_norm(traced, node) or _merge_sum(traced, node) for node in traced.graph.nodes)


def _merge_norm(traced: fx.GraphModule, node: fx.Node) -> bool:
    """A batch norm goes into its convolution."""
    norm = _module(traced, node, nn.BatchNorm2d)
    before = node.args[0] if norm is not None and node.args else None
    conv = _alone(traced, before)
    if norm is None or conv is None or norm.running_mean is None or not isinstance(before, fx.Node):
        return False
    _put(traced, before, fuse_conv_bn_eval(conv, norm))
    node.replace_all_uses_with(before)
    traced.graph.erase_node(node)
    return True


def _merge_sum(traced: fx.GraphModule, node: fx.Node) -> bool:
    """A sum of two linear maps of the same input goes into the one that is a convolution."""
    if node.target not in ADD or len(node.args) != 2 or node.kwargs:
        return False
    for host, guest in (node.args, node.args[::-1]):
        conv = _alone(traced, host)
        if conv is None or not isinstance(host, fx.Node) or not _centred(conv):
            continue
        kernel = _as_kernel(traced, guest, host.args[0], conv)
        if kernel is None:
            continue
        weight, bias = kernel
        _put(traced, host, _summed(conv, weight, bias))
        node.replace_all_uses_with(host)
        traced.graph.erase_node(node)
        if isinstance(guest, fx.Node) and not guest.users and guest.op != "placeholder":
            traced.graph.erase_node(guest)
        return True
    return False


def _as_kernel(traced: fx.GraphModule, guest: object, source: object, conv: nn.Conv2d) -> tuple[Tensor, Tensor] | None:
    """What `guest` does to `source`, as a kernel no larger than `conv`'s and a bias."""
    keeps = tuple(conv.stride) == (1, 1) and conv.in_channels == conv.out_channels
    identity = _identity(conv) if keeps else None
    zero = conv.weight.new_zeros(conv.out_channels)
    if guest is source:
        return (identity, zero) if identity is not None else None
    if not isinstance(guest, fx.Node) or not guest.args or guest.args[0] is not source:
        return None
    other, norm = _alone(traced, guest), _module(traced, guest, nn.BatchNorm2d)
    if (
        norm is not None
        and identity is not None
        and norm.running_mean is not None
        and norm.running_var is not None
        and len(guest.users) == 1
        and _used_once(traced, guest)
    ):
        factor = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
        return identity * factor.view(-1, 1, 1, 1), (0 if norm.bias is None else norm.bias) - norm.running_mean * factor
    form = (conv.stride, conv.groups, conv.out_channels)
    same = other is not None and _centred(other) and (other.stride, other.groups, other.out_channels) == form
    if not same or other is None or any(a > b for a, b in zip(other.kernel_size, conv.kernel_size, strict=True)):
        return None
    return other.weight, zero if other.bias is None else other.bias


def _identity(conv: nn.Conv2d) -> Tensor:
    """The 1x1 kernel that gives each channel back, in as many groups as `conv` has."""
    width = conv.in_channels // conv.groups
    return torch.eye(width, dtype=conv.weight.dtype, device=conv.weight.device).repeat(conv.groups, 1)[..., None, None]


def _summed(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    made = copy.deepcopy(conv)
    (r, s), (down, across) = weight.shape[-2:], conv.kernel_size
    rows, columns = (down - r) // 2, (across - s) // 2
    made.weight = nn.Parameter((conv.weight + F.pad(weight, (columns, columns, rows, rows))).detach())
    made.bias = nn.Parameter((bias if conv.bias is None else conv.bias + bias).detach())
    return made


def _centred(conv: nn.Conv2d) -> bool:
    """Odd, padded with zeros by half, not dilated: so that smaller ones fit into its middle."""
    half = tuple(k // 2 for k in conv.kernel_size)
    return all(k % 2 for k in conv.kernel_size) and conv.padding == half and set(conv.dilation) == {1} and conv.padding_mode == "zeros"


def _alone(traced: fx.GraphModule, node: object) -> nn.Conv2d | None:
    """The convolution of a node that is read once and called once."""
    conv = _module(traced, node, nn.Conv2d)
    if type(conv) is not nn.Conv2d or not isinstance(node, fx.Node):
        return None
    return conv if len(node.users) == 1 and len(node.args) == 1 and _used_once(traced, node) else None


def _module(traced: fx.GraphModule, node: object, kind: type[Kind]) -> Kind | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = traced.get_submodule(str(node.target))
    return module if isinstance(module, kind) else None


def _used_once(traced: fx.GraphModule, node: fx.Node) -> bool:
    module = traced.get_submodule(str(node.target))
    calls = [n for n in traced.graph.nodes if n.op == "call_module" and traced.get_submodule(str(n.target)) is module]
    return len(calls) == 1


def _put(traced: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    parent, _, name = str(node.target).rpartition(".")
    setattr(traced.get_submodule(parent), name, module)
