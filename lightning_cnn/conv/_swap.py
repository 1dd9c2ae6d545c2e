"""Put an algorithm into the convolutions of somebody's model, and take it out again.

A swapped layer keeps its parameters, buffers, hooks and name: only its class changes, to a subclass of `nn.Conv2d` with another
`_conv_forward`. What the operator cannot take (a tensor subclass, a traced or batched tensor) goes the layer's original way.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_cnn.conv import _tuner
from lightning_cnn.conv._call import NAMES, ROLES, Call, Role
from lightning_cnn.conv._operator import algorithm_for, convolution, describe
from lightning_cnn.errors import NoEffectWarning, raise_all
from lightning_cnn.functional.conv.geometry import Geometry

REMEMBERED_SHAPES = 64
Choice = str | Mapping[str, str]


class SwappedConv2d(nn.Conv2d):
    """An `nn.Conv2d` that computes by plan: 'auto {...}', one algorithm, or 'forward/input/weight'."""

    _plan: str
    _stock: dict  # what was asked -> is every pass of it the default
    _calls: dict[Call, None]  # the forward calls seen, for the report

    def forward(self, input: Tensor) -> Tensor:
        """Torch's way is taken before all else where it was chosen: a small layer takes no longer than the questions of the others."""
        if not torch.compiler.is_compiling() and type(input) is Tensor and self.padding_mode == "zeros":
            own = self._parameters  # Attributes of a module cost a microsecond each; a reparametrized weight is not among these
            weight = own.get("weight")
            if weight is not None and "bias" in own and self._stock.get(self._asked(input, weight)):
                return F.conv2d(input, weight, own["bias"], self.stride, self.padding, self.dilation, self.groups)
        return super().forward(input)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _plain(input, weight) or not self._fits(input):
            return super()._conv_forward(input, weight, bias)
        if not torch.compiler.is_compiling() and self._is_stock(input, weight):
            return super()._conv_forward(input, weight, bias)
        if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if input.dtype != weight.dtype:
            return super()._conv_forward(input, weight, bias)
        batched = input if input.dim() == 4 else input[None]
        padded, padding = self._padded(batched)
        keep = not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        y = convolution("forward", padded, weight, bias, [], self.stride, padding, self.dilation, self.groups, self._plan, keep)
        return y if input.dim() == 4 else y[0]

    def _fits(self, input: Tensor) -> bool:
        """Whatever torch refuses, it shall refuse itself; and complex numbers are its own."""
        return input.dim() in (3, 4) and input.shape[-3] == self.in_channels and input.is_floating_point()

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The picture behind whatever padding is not the same number of zeros on both sides, and the zeros that are."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        if (left, top) == (right, bottom):
            return x, (top, left)
        return F.pad(x, self._reversed_padding_repeated_twice), (0, 0)

    def _asked(self, input: Tensor, weight: Tensor) -> tuple:
        """What the choice can depend on, in the cheapest form there is."""
        grad = torch.is_grad_enabled()
        return (
            input.shape, input.stride(), input.dtype, input.is_cuda, grad and input.requires_grad, grad and weight.requires_grad,
            torch._C._is_any_autocast_enabled(), torch.get_num_threads(), _tuner.Tuner.generation,
        )  # fmt: skip

    def _is_stock(self, input: Tensor, weight: Tensor) -> bool:
        """Record what is asked for, and tell whether every pass of it is the default: then the operator would only cost time."""
        if self._plan.startswith("auto") and _tuner.tuner_for(self._plan).paused:
            return True
        asked = self._asked(input, weight)
        if asked not in self._stock:
            if len(self._stock) >= REMEMBERED_SHAPES:
                self._stock.clear()
            self._stock[asked] = False
            self._look_up(asked, input, weight)
        return self._stock.get(asked, False)

    def _look_up(self, asked, input: Tensor, weight: Tensor) -> None:
        autocast, grad = torch.is_autocast_enabled(input.device.type), torch.is_grad_enabled()
        dtype = torch.get_autocast_dtype(input.device.type) if autocast and input.dtype != torch.float64 else input.dtype
        needs = (grad and input.requires_grad, grad and weight.requires_grad)
        with torch.no_grad():
            padded, padding = self._padded(input.detach() if input.dim() == 4 else input.detach()[None])
            geometry = Geometry(self.stride, padding, self.dilation, self.groups)  # pyright: ignore[reportArgumentType]
            call = describe("forward", padded.to(dtype), weight.detach().to(dtype), [], geometry, not any(needs))
        if len(self._calls) < REMEMBERED_SHAPES:
            self._calls[call] = None
        calls = [call, *(replace_role(call, role) for role, need in zip(ROLES[1:], needs, strict=True) if need)]
        if self._plan.startswith("auto"):
            known = _tuner.tuner_for(self._plan).decisions
            if all(each in known for each in calls):
                self._stock[asked] = all(known[each].algorithm == "default" for each in calls)
            else:
                del self._stock[asked]  # Ask again: the gradients' calls are measured when backward first meets them
        else:
            self._stock[asked] = all(algorithm_for(each, self._plan) == "default" for each in calls)


def swap(
    model: nn.Module,
    algorithm: Choice = "auto",
    *,
    max_error: float = 1e-5,
    max_workspace_mb: float = 256.0,
    cache: str | None = "default",
) -> nn.Module:
    """Let every `nn.Conv2d` of the model compute its convolution with `algorithm`, in place, and return the model.

    `algorithm` is a name, 'auto' (measured for each layer, shape and pass), 'forward/input/weight' for a name a pass, or a mapping
    from layer patterns to those: `{"layer1.*": "winograd4"}`; the first pattern that fits a layer counts. What an algorithm cannot do
    is done by the default, and `report` says so. `max_error` and `max_workspace_mb` bound what 'auto' may choose, `cache` is the
    folder of its memory (None: no memory). Subclasses of `nn.Conv2d` compute in their own way and are left alone.
    """
    settings = check(algorithm, max_error, max_workspace_mb, cache)
    patterns = {"*": algorithm} if isinstance(algorithm, str) else dict(algorithm)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in (nn.Conv2d, SwappedConv2d)}
    chosen = {name: next((plan for pattern, plan in patterns.items() if fnmatchcase(name, pattern)), None) for name in layers}
    unused = [pattern for pattern in patterns if layers and not any(fnmatchcase(name, pattern) for name in layers)]
    raise_all([f"No convolution is called '{pattern}'; there are: {_some(layers)}." for pattern in unused if pattern != "*"])
    if not any(chosen.values()):
        warnings.warn("swap changed nothing: the model has no plain nn.Conv2d.", NoEffectWarning, stacklevel=2)
    for name, plan in chosen.items():
        if plan is not None:
            _swap_layer(layers[name], settings.plan() if plan == "auto" else plan)
    return model


def check(algorithm: Choice, max_error: float, max_workspace_mb: float, cache: str | None) -> _tuner.Settings:
    """The settings, or one error with everything that is wrong with the arguments of `swap`."""
    problems = _problems(algorithm)
    if max_error <= 0:
        problems.append(f"max_error is a relative error and must be positive, it is {max_error}.")
    if max_workspace_mb < 0:
        problems.append(f"max_workspace_mb must not be negative, it is {max_workspace_mb}.")
    raise_all(problems)
    return _tuner.Settings(max_error, max_workspace_mb, cache)


def restore(model: nn.Module) -> nn.Module:
    """Give every swapped layer its class back, in place, and return the model; nothing of the swap is left on it."""
    for layer in model.modules():
        if type(layer) is SwappedConv2d:
            for attribute in ("_plan", "_stock", "_calls"):
                layer.__dict__.pop(attribute, None)
            layer.__class__ = nn.Conv2d  # pyright: ignore[reportAttributeAccessIssue]
    return model


def swapped(model: nn.Module) -> list[SwappedConv2d]:
    """The model's swapped layers."""
    return [layer for layer in model.modules() if type(layer) is SwappedConv2d]


def tuners(model: nn.Module) -> list[_tuner.Tuner]:
    """The tuners of the model's 'auto' layers, each once."""
    plans = {layer._plan: None for layer in swapped(model) if layer._plan.startswith("auto")}
    return [_tuner.tuner_for(plan) for plan in plans]


def replace_role(call: Call, role: Role) -> Call:
    """The gradient's call that belongs to a forward call."""
    return replace(call, role=role, keep=False)


def _swap_layer(layer: nn.Module, plan: str) -> None:
    layer.__class__ = SwappedConv2d
    layer.__dict__.update(_plan=plan, _stock={}, _calls={})


def _plain(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    if torch._C._get_tracing_state() is not None or torch._C._functorch.is_functorch_wrapped_tensor(tensors[0]):  # pyright: ignore
        return False
    if getattr(_get_current_dispatch_mode(), "as_written", False):
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type in ("cpu", "cuda") for tensor in tensors)


def _problems(algorithm: Choice) -> list[str]:
    if isinstance(algorithm, Mapping):
        return [problem for plan in algorithm.values() for problem in _problems(plan)] or (
            [] if algorithm else ["The mapping is empty."]
        )
    names = str(algorithm).split("/")
    if algorithm == "auto" or (len(names) in (1, 3) and all(name in NAMES for name in names)):
        return []
    return [
        f"There is no algorithm '{algorithm}'; choose 'auto', one of {', '.join(NAMES)}, or three of them as 'forward/input/weight'."
    ]


def _some(layers: Mapping[str, nn.Module]) -> str:
    names = list(layers)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
