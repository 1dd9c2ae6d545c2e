"""`pack(model)`: a trained 1-bit model as bit-packed inference."""

import copy
import logging
import warnings
from collections import Counter
from typing import Any

from torch import fx, nn

from lightning_cnn.errors import NoEffectWarning
from lightning_cnn.kernels.bits import Geometry
from lightning_cnn.nn.low_bit import LowBitLinear
from lightning_cnn.nn.packed import NormMaxPool2d, PackedConv2d, PackedLinear, geometry_of
from lightning_cnn.nn.packed_chain import link

log = logging.getLogger(__name__)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def pack(model: nn.Module) -> nn.Module:
    """A copy of `model`, in eval mode and without gradients, whose 1-bit layers compute on packed bits; equal to it bit for bit.

    Save it with `safetensors.torch.save_file(packed.state_dict(), path)`; load into `pack` of an untrained model of the same shape.
    Batch norms that follow a packed layer alone are folded, and those before a max pool go into it; where a sign follows a norm, words
    go straight to the next packed layer. A module inside `model` that does nothing but run packed layers and add (a residual block, a
    stage of them) becomes a `PackedChain` of its class, which runs it in one go; a layer put in later is not seen there.
    What cannot be packed (groups, float inputs, other widths) stays as it is, and is logged.
    """
    packed = copy.deepcopy(model).eval().requires_grad_(False)
    layers = {name: geometry for name, module in packed.named_modules() if (geometry := geometry_of(module))}
    if not layers:
        warnings.warn("pack found no layer with 1-bit weights and 1-bit inputs that it can pack.", NoEffectWarning, stacklevel=2)
    graph = _traced(packed)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    followers = _followers(graph, packed, layers, calls)
    for name, geometry in layers.items():
        norm, seen_through, to_words = followers.get(name, (None, [], False))
        layer: Any = packed.get_submodule(name)
        kind = PackedLinear if isinstance(layer, LowBitLinear) else PackedConv2d
        _put(packed, name, kind(layer, geometry, packed.get_submodule(norm) if norm else None, to_words))
        for gone in ([norm] if norm else []) + (seen_through if to_words else []):
            _put(packed, gone, nn.Identity())
    pools = _pools_behind_norms(graph, packed, calls)
    for norm, pool in pools:
        _put(packed, pool, NormMaxPool2d(packed.get_submodule(norm), packed.get_submodule(pool)))  # pyright: ignore[reportArgumentType]
        _put(packed, norm, nn.Identity())
    chains = _link(packed)
    left = [name for name, module in packed.named_modules() if hasattr(module, "bits")]
    log.info(
        "pack: %d layers packed, %d norms folded, %d hand on words, %d max pools take a norm, %d modules run in one go; "
        "left as they are: %s",
        *(len(layers), sum(f[0] is not None for f in followers.values()), sum(f[2] for f in followers.values()), len(pools)),
        *(chains, left or "none"),
    )
    return packed


def _link(model: nn.Module) -> int:
    """Make chains of the outermost modules inside `model` that can be; returns how many."""
    return sum(1 if link(child) else _link(child) for child in model.children())


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "bits") or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.Graph:
    """The calls of a model, or of nothing where it cannot be traced. It is only looked at, so its own forward stays."""
    try:
        return _Tracer().trace(model)
    except Exception as error:
        log.info("pack: forward cannot be traced (%s); norms are not folded and every layer hands on floats", str(error).split("\n")[0])
        return fx.Graph()


def _followers(
    graph: fx.Graph, model: nn.Module, layers: dict[str, Geometry], calls: Counter
) -> dict[str, tuple[str | None, list[str], bool]]:
    """For each layer: the norm to fold, the modules between it and the next packed layers, and whether they can take words."""
    # A layer may take words only where all its calls do: it is called once, or its callers agree, which one call a layer ensures.
    nodes = [node for node in graph.nodes if node.target in layers and calls[node.target] == 1]
    return {str(node.target): _follow(node, model, layers, calls) for node in nodes}


def _follow(node: fx.Node, model: nn.Module, layers: dict[str, Geometry], calls: Counter) -> tuple[str | None, list[str], bool]:
    norm, seen_through = None, []
    kind = type(model.get_submodule(str(node.target)))
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_module" or (calls[user.target] != 1 and not _is_identity(model, user)):
            break
        module = model.get_submodule(str(user.target))
        if norm is None and not seen_through and isinstance(module, NORMS) and module.running_mean is not None:
            norm = str(user.target)
        elif _keeps_sign(module):
            seen_through.append(str(user.target))
        else:
            break
        node = user
    users = [user for user in node.users if user.op == "call_module"]
    words = bool(users) and len(users) == len(node.users)
    words = words and all(user.target in layers and type(model.get_submodule(str(user.target))) is kind for user in users)
    return norm, seen_through, words


def _pools_behind_norms(graph: fx.Graph, model: nn.Module, calls: Counter) -> list[tuple[str, str]]:
    """Norms with what pools them alone, where both are called once."""
    found = []
    for norm in graph.nodes:
        if norm.op != "call_module" or calls[norm.target] != 1 or not _is(model, norm, nn.BatchNorm2d):
            continue
        behind = _only_user(norm)
        while behind is not None and _is_identity(model, behind):
            behind = _only_user(behind)
        if behind is not None and calls[behind.target] == 1 and _is(model, behind, nn.MaxPool2d):
            pool: Any = model.get_submodule(str(behind.target))
            plain = not pool.ceil_mode and not pool.return_indices and pool.dilation in (1, (1, 1))
            if plain and model.get_submodule(str(norm.target)).running_mean is not None:
                found.append((str(norm.target), str(behind.target)))
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    user = next(iter(node.users), None)
    return user if len(node.users) == 1 and user is not None and user.op == "call_module" else None


def _is(model: nn.Module, node: fx.Node, kind: type[nn.Module]) -> bool:
    return type(model.get_submodule(str(node.target))) is kind


def _is_identity(model: nn.Module, node: fx.Node) -> bool:
    return _is(model, node, nn.Identity)


def _keeps_sign(module: nn.Module) -> bool:
    if isinstance(module, nn.Hardtanh):
        return module.min_val < 0 <= module.max_val
    return isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d))
