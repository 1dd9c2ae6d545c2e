"""Store weights in 16 bits and train as well as in float32: every update is rounded up or down at random, right on average.

Source: Gupta et al. 2015, arXiv:1502.02551; for bfloat16 weights, Zamirai et al. 2020, arXiv:2010.06192.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_cnn.errors import NoEffectWarning, raise_all
from lightning_cnn.functional.roofline import bf16_units, fp16_units
from lightning_cnn.functional.rounding import FLOATS, as_format, round_nearest
from lightning_cnn.precision import _fused, _shadow, _states
from lightning_cnn.precision._layers import NORMS
from lightning_cnn.precision._shard import write_back

log = logging.getLogger(__name__)
HELD = {"bf16": "bf16-true", "fp16": "16-true"}  # and what Lightning calls them


class StochasticRounding(Precision):
    """Weights in "bf16" or "fp16"; any torch optimizer steps unchanged on float32 shadows, written back with stochastic rounding.

    Norm layers, buffers and the layers named in `keep` (patterns) stay float32. `states` stores the optimizer's moments as "fp32",
    "bf16" or "8bit". Adam and AdamW step in one pass on a CPU and need no shadows there; other optimizers of torch.optim step
    `bucket_mib` of shadows at a time, so that is all the memory a step adds.
    `rounding="nearest"` is there to show what is lost without.
    """

    def __init__(
        self,
        *,
        format: str = "bf16",
        states: str = "fp32",
        rounding: str = "stochastic",
        keep: Sequence[str] = (),
        bucket_mib: float = 16.0,
        seed: int = 0,
    ) -> None:
        self.format, self.states, self.rounding = format, states, rounding
        self.precision = HELD.get(format, "32-true")  # pyright: ignore[reportAttributeAccessIssue]
        self.keep, self.bucket_mib, self.seed = tuple(keep), bucket_mib, seed
        self._workspace = _shadow.Workspace()
        self._steps: list[int] = []
        self._optimizers: list[Optimizer] = []
        self._module: nn.Module | None = None
        self._known: set[Tensor] = set()
        self._low: dict[Tensor, str] = {}
        self._after: dict[Tensor, dict[str, Any]] = {}  # states of parameters that a step is in the middle of

    # What Lightning calls, in its order

    def convert_module(self, module: nn.Module) -> nn.Module:
        raise_all(self._problems(module))
        self._module, target = module, as_format(self.format)
        self._low = self._chosen(module)
        for parameter in self._low:
            if parameter.dtype != target.dtype:
                _retype(parameter, round_nearest(parameter.detach(), target))
        self._announce(module)
        return module

    def connect(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        raise_all(
            f"{type(optimizer).__name__} evaluates the model several times a step, on weights that only its float32 shadows hold. "
            "Use an optimizer that steps once a gradient."
            for optimizer in optimizers
            if isinstance(optimizer, torch.optim.LBFGS)
        )
        self._optimizers = list(optimizers)
        self._steps = self._steps if len(self._steps) == len(optimizers) else [0] * len(optimizers)
        for optimizer in optimizers:
            _states.portable(optimizer, self.states, lambda parameter, optimizer=optimizer: self._store(optimizer, parameter))
        return model, optimizers, lr_schedulers

    def forward_context(self) -> AbstractContextManager:
        """Products in the weights' format; in float32 on a CPU that would emulate them."""
        device = next((parameter.device for parameter in self._low), torch.device("cpu"))
        context = torch.autocast(device.type, as_format(self.format).dtype)
        has_units = fp16_units(device) if self.format == "fp16" else bf16_units(device)
        if device.type == "cpu" and not has_units:
            context.fast_dtype = torch.float32  # which the constructor takes on a GPU only: weights are widened where they are used
        return context

    def optimizer_step(self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        result = closure()
        self._after_closure(model, optimizer)
        if result is None and model.automatic_optimization:
            return result
        if self._module is not None and not self._known.issuperset(_shadow.parameters(optimizer)):
            self._low = self._chosen(self._module)  # a strategy has put shards in the parameters' places
        number = self._optimizers.index(optimizer)
        self._steps[number] += 1
        done = self._step_fused(optimizer)
        for run in _shadow.runs(optimizer, self._low.__contains__, self.bucket_mib, done):  # an empty one at least: schedulers count
            self._step(optimizer, run, **kwargs)
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self._steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = list(state_dict["steps"])

    def teardown(self) -> None:
        self._workspace, self._module = _shadow.Workspace(), None

    # What it does

    def _step_fused(self, optimizer: Optimizer) -> set[Tensor]:
        """Step in one pass over memory what can be, and return it."""
        done: set[Tensor] = set()
        if (self.format, self.rounding) != ("bf16", "stochastic"):
            return done
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._low and _fused.accepts(optimizer, group, parameter):
                    _fused.step(optimizer, group, parameter, self.states, **self._noise(optimizer, parameter))
                    done.add(parameter)
        return done

    def _step(self, optimizer: Optimizer, run: list[_shadow.Piece], **kwargs: Any) -> None:
        """One step of what the run holds: float32 parameters themselves, the others in their shadows' place."""
        low = [piece for piece in run if piece.parameter in self._low]
        self._workspace.reserve(2 * sum(piece.of(piece.parameter).numel() for piece in low))
        shadows = [(piece, self._workspace.shadow(piece)) for piece in low]
        for piece, shadow in shadows:
            if state := optimizer.state.get(piece.parameter):
                optimizer.state[shadow] = _states.widened(state, piece)
        pairs = [(piece.parameter, piece.parameter) for piece in run if piece.parameter not in self._low]
        with torch.no_grad(), _shadow.standing_in(optimizer, pairs + [(piece.parameter, shadow) for piece, shadow in shadows]):
            optimizer.step(**kwargs)
        for piece, shadow in shadows:
            self._put_away(optimizer, piece, shadow)

    def _put_away(self, optimizer: Optimizer, piece: _shadow.Piece, shadow: Tensor) -> None:
        noise = self._noise(optimizer, piece.parameter)
        write_back(piece.of(piece.parameter.detach()), shadow, as_format(self.format), self.rounding, index=piece.first, **noise)
        if (state := optimizer.state.pop(shadow, None)) is None:
            return
        # other pieces still need the state as it was before the step
        whole = self._after.setdefault(piece.parameter, dict(optimizer.state.get(piece.parameter, {})))
        _states.put_away(whole, state, piece, self.states, **noise)
        if piece.is_last:
            optimizer.state[piece.parameter] = self._after.pop(piece.parameter)

    def _store(self, optimizer: Optimizer, parameter: Tensor) -> None:
        if parameter in self._low and (state := optimizer.state.get(parameter)):
            _states.put_away(state, dict(state), _shadow.Piece(parameter), self.states, **self._noise(optimizer, parameter))

    def _noise(self, optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
        number = self._optimizers.index(optimizer)
        return {"seed": self.seed, "step": self._steps[number], "stream": f"{number}/{self._low[parameter]}"}

    def _chosen(self, module: nn.Module) -> dict[Tensor, str]:
        """The parameters to hold in fewer bits, and their names."""
        kept = [name for name, _ in module.named_modules() for pattern in self.keep if fnmatchcase(name, pattern)]
        chosen = {
            id(parameter)
            for name, layer in module.named_modules()
            if not isinstance(layer, NORMS) and not any(name == k or name.startswith(f"{k}.") for k in kept)
            for parameter in layer.parameters(recurse=False)
            if parameter.is_floating_point()
        }
        self._known = set(module.parameters())
        return {p: name.replace("_orig_mod.", "") for name, p in module.named_parameters() if id(p) in chosen}

    def _problems(self, module: nn.Module) -> list[str]:
        problems = []
        if self.format not in HELD:
            reason = (
                "torch has no arithmetic for parameters of 8 bits, held in 16 they would save nothing" if self.format in FLOATS else ""
            )
            problems.append(f"format={self.format!r} is not one of {', '.join(HELD)}{reason and f' ({reason})'}.")
        if self.states not in _states.STORAGES:
            problems.append(f"states={self.states!r} is not one of {', '.join(_states.STORAGES)}.")
        if self.rounding not in ("stochastic", "nearest"):
            problems.append(f'rounding={self.rounding!r} is not "stochastic" or "nearest".')
        if self.bucket_mib <= 0:
            problems.append(f"bucket_mib={self.bucket_mib} must be above 0.")
        names = [name for name, _ in module.named_modules()]
        problems += [f"keep={p!r} matches no layer of the model." for p in self.keep if not any(fnmatchcase(n, p) for n in names)]
        return problems

    def _announce(self, module: nn.Module) -> None:
        low = sum(parameter.numel() for parameter in self._low)
        whole = sum(parameter.numel() for parameter in module.parameters())
        if not low:
            warnings.warn(f"StochasticRounding found no parameter to store in {self.format}.", NoEffectWarning, stacklevel=2)
        log.info("StochasticRounding: %d of %d parameters in %s, optimizer states in %s", low, whole, self.format, self.states)


def _retype(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter data of another type: allowed before the optimizer and DDP exist."""
    if isinstance(data, DTensor):  # assigned, `data` would keep the old shard
        torch.utils.swap_tensors(parameter, nn.Parameter(data, parameter.requires_grad))
    else:
        parameter.data = data
