"""Train in 16-bit fixed point: weights, activations, gradients and updates all live on the grid <integer_bits, fraction_bits>.

Source: Gupta et al. 2015, arXiv:1502.02551; Courbariaux et al. 2014, arXiv:1412.7024 (10-bit activations, 12-bit updates).
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cnn.errors import ConfigurationError, NoEffectWarning, raise_all
from lightning_cnn.functional.rounding import Format, as_format, round_nearest, round_stochastic
from lightning_cnn.precision import _shadow, _shard
from lightning_cnn.precision._layers import NORMS

log = logging.getLogger(__name__)
QUANTITIES = ("weights", "activations", "gradients", "updates")
BUCKET_MIB = 16.0  # of parameters that are copied at a time, to tell their updates
SATURATED = 0.01  # share of values outside the range from which a layer is warned about


class FixedPoint(Precision):
    """Round the quantities in `of` onto `<integer_bits, fraction_bits>` (the sign is an integer bit), at every step.

    `weights` are rounded after a step, `updates` before they are added; `activations` are the outputs of layers with weights, and
    `gradients` those of activations and of weights. `formats` gives a quantity a format of its own. Norm layers stay float32. The share
    of values that fell outside the range is logged a layer as `overflow/QUANTITY/LAYER`, every `log_every_n_steps` of the Trainer.
    """

    precision = "32-true"

    def __init__(
        self,
        *,
        integer_bits: int = 6,
        fraction_bits: int = 10,
        rounding: str = "stochastic",
        of: Sequence[str] = QUANTITIES,
        formats: Mapping[str, tuple[int, int]] | None = None,
        seed: int = 0,
    ) -> None:
        self.rounding, self.of, self.seed = rounding, tuple(of), seed
        self.formats = {name: (integer_bits, fraction_bits) for name in self.of} | dict(formats or {})
        self.overflow: dict[str, Tensor] = {}
        self._warned: set[str] = set()
        self._step = 0
        self._calls: dict[str, int] = {}
        self._hooks: list[Any] = []
        self._names: dict[Tensor, str] = {}

    # What Lightning calls, in its order

    def convert_module(self, module: nn.Module) -> nn.Module:
        raise_all([*self._problems(), *_shard.problems(module, "FixedPoint")])
        self.teardown()
        for name, layer in _layers(module):
            for own, parameter in layer.named_parameters(recurse=False):
                self._names[parameter] = f"{name}.{own}".lstrip(".")
                if "weights" in self.formats and parameter.device.type != "meta":
                    parameter.data.copy_(round_nearest(parameter.data, _format(self.formats["weights"])))
            if {"activations", "gradients"} & self.formats.keys():
                self._hooks.append(layer.register_forward_hook(self._hook(name)))
        if not self._names:
            warnings.warn("FixedPoint found no layer with weights to round.", NoEffectWarning, stacklevel=2)
        told = ", ".join(f"{name} {_format(bits).name}" for name, bits in self.formats.items())
        log.info("FixedPoint: %d parameters, %s rounding of %s", len(self._names), self.rounding, told)
        return module

    def optimizer_step(self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError("LBFGS evaluates the model several times a step, between which nothing is rounded. Use another.")
        result = closure()
        if "gradients" in self.formats:
            self._round_gradients(optimizer)
        self._after_closure(model, optimizer)
        if result is None and model.automatic_optimization:
            return result
        for run in _shadow.runs(optimizer, lambda _: False, BUCKET_MIB):
            here = [piece.parameter for piece in run]
            with _shadow.standing_in(optimizer, zip(here, here, strict=True)):
                self._round_step(optimizer, here, **kwargs)
        self._step += 1
        self._calls.clear()
        self._report_overflow(model)
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["step"]

    def teardown(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._names.clear()

    # What it does

    def round(self, x: Tensor, quantity: str, name: str, *, index: int = 0, nearest: bool = False, out: Tensor | None = None) -> Tensor:
        """x on the grid of a quantity, in `out` or new memory; what falls outside its range is counted."""
        target = _format(self.formats[quantity])
        self._count(f"{quantity}/{name}", x, target)
        if nearest or self.rounding == "nearest":
            rounded = round_nearest(x, target).to(x.dtype)
            return rounded if out is None else out.copy_(rounded)
        out = torch.empty_like(x) if out is None else out
        return round_stochastic(x, target, seed=self.seed, step=self._step, stream=f"{quantity}/{name}", index=index, out=out)

    @torch.no_grad()
    def _round_gradients(self, optimizer: Optimizer) -> None:
        for parameter in _shadow.parameters(optimizer):
            if parameter in self._names and parameter.grad is not None:
                self.round(parameter.grad, "gradients", self._names[parameter], out=parameter.grad.detach())

    @torch.no_grad()
    def _round_step(self, optimizer: Optimizer, bucket: list[Tensor], **kwargs: Any) -> None:
        before = [parameter.detach().clone() for parameter in bucket]
        optimizer.step(**kwargs)
        for parameter, old in zip(bucket, before, strict=True):
            name = self._names.get(parameter)
            if name is None:
                continue
            value = here = parameter.detach()
            if "updates" in self.formats:
                value = old.add_(self.round(here.sub_(old), "updates", name, out=here))
            if "weights" in self.formats:
                value = self.round(value, "weights", name, out=here)
            here.copy_(value)

    def _hook(self, name: str) -> Callable[..., Any]:
        @torch.compiler.disable
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            call = self._calls[name] = self._calls.get(name, -1) + 1 if layer.training else 0
            return _Round.apply(output, self, f"{name}/{call}" if call else name, not layer.training)  # pyright: ignore[reportReturnType]

        return hook

    @torch.no_grad()
    def _count(self, name: str, x: Tensor, target: Format) -> None:
        low, high = target.low, target.high + 2.0**target.finest / 2
        if name not in self.overflow:
            self.overflow[name] = torch.zeros(2, device=x.device, dtype=torch.float64)
        self.overflow[name][1] += x.numel()
        if x.device.type == "cpu" and x.numel():  # one quick pass nearly always; a GPU would have to wait for the answer
            smallest, largest = x.aminmax()
            if low <= smallest and largest <= high:
                return
        self.overflow[name][0] += torch.count_nonzero((x < low) | (x > high))

    def _report_overflow(self, model: LightningModule) -> None:
        trainer = model.trainer
        if self._step % vars(trainer)["log_every_n_steps"] and not trainer.is_last_batch:
            return
        shares = {f"overflow/{name}": (outside / total).item() for name, (outside, total) in self.overflow.items() if total}
        self.overflow.clear()
        for logger in trainer.loggers:
            logger.log_metrics(shares, step=self._step)
        worst = max(shares, key=shares.__getitem__, default=None)
        if worst is not None and shares[worst] > SATURATED and worst not in self._warned:
            self._warned.add(worst)
            quantity = worst.split("/")[1]
            target = _format(self.formats[quantity])
            warnings.warn(
                f"{shares[worst]:.1%} of {worst.removeprefix('overflow/')} lie outside {target.name}, "
                f"[{target.low:g}, {target.high:g}], and saturate. Give {quantity} more integer_bits, or scale "
                "the input or the loss.",
                stacklevel=2,
            )

    def _problems(self) -> Iterator[str]:
        if self.rounding not in ("stochastic", "nearest"):
            yield f'rounding={self.rounding!r} is not "stochastic" or "nearest".'
        for name, bits in self.formats.items():
            if name not in QUANTITIES:
                yield f"{name!r} is no quantity to round; choose of {', '.join(QUANTITIES)}."
            try:
                _format(bits)
            except ConfigurationError as error:
                yield str(error)


class _Round(torch.autograd.Function):
    """Activations rounded on the way forward, their gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plugin: FixedPoint, name: str, nearest: bool) -> Tensor:
        ctx.plugin, ctx.name = plugin, name
        return plugin.round(x, "activations", name, index=_place(x), nearest=nearest) if "activations" in plugin.formats else x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        if "gradients" in ctx.plugin.formats:
            gradient = ctx.plugin.round(gradient, "gradients", f"{ctx.name}.output", index=_place(gradient))
        return gradient, None, None, None


def _format(bits: Sequence[int]) -> Format:
    integer, fraction = bits  # a configuration file gives a list
    return as_format((integer, fraction))


def _place(x: Tensor) -> int:
    """The position of this rank's first element in the global batch."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() * x.numel() if ready else 0


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        if not isinstance(layer, NORMS) and any(True for _ in layer.parameters(recurse=False)):
            yield name.replace("_orig_mod.", ""), layer


def courbariaux(*, seed: int = 0) -> FixedPoint:
    """Courbariaux 2014: 10 bits where numbers are multiplied, 12 bits where updates are accumulated."""
    formats = {"weights": (2, 10), "updates": (2, 10), "activations": (5, 5), "gradients": (1, 9)}
    return FixedPoint(of=(), formats=formats, seed=seed)
