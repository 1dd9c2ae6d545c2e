"""Evaluate and predict with a faster copy of the network: folded, laid out, packed, compiled, each only where it pays and agrees.

Source: Ding et al. 2021, arXiv:2101.03697, section 3.3 (folding); the PyTorch performance tuning guide (channels_last); mallopt(3).
"""

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_cnn.callbacks import _changes
from lightning_cnn.callbacks._forward import unwrap, wrap
from lightning_cnn.callbacks._trials import CALLS, Allowance, Change, Trial, Undo, choose, compared, timed
from lightning_cnn.callbacks.evaluation_report import EvaluationReport
from lightning_cnn.callbacks.marginalize import Marginalize
from lightning_cnn.callbacks.snapshot_ensemble import SnapshotEnsemble
from lightning_cnn.callbacks.temperature_scaling import TemperatureScaling
from lightning_cnn.errors import ConfigurationError, LightningCNNError, NoEffectWarning, raise_all
from lightning_cnn.functional.roofline import bf16_units
from lightning_cnn.nn.low_bit import LowBitConv2d
from lightning_cnn.nn.pack import pack
from lightning_cnn.nn.reparameterize import reparameterize

log = logging.getLogger(__name__)
SWITCHES = ("memory", "packed", "folded", "channels_last", "autocast", "compile")


class FastInference(Callback):
    """In validate, test and predict, and not inside of fit, the network's part that holds the weights is answered by a copy of it.

    At the first batch each switch is timed on top of those kept so far, and stays when it is `least` times faster and the output
    differs by at most `max_error` of the largest. The network itself is not touched. Trials are made only while they take no more than
    a share of the batches ahead.

    Args:
        switches: Which to try, of `SWITCHES`, in this order; `compile` only when asked for here: it costs seconds to minutes.
        module: Name of the submodule to answer for; by default the child with most weights.
        trial_share: Of the time that the batches ahead take without changes, what all trials may take.

    Attributes:
        trials: What was tried, with its times.
        error: Largest difference of the first batch's output, over the largest output.

    Raises:
        ConfigurationError: at `setup`, beside callbacks whose members differ inside of the network: the copy would answer for all.
    """

    def __init__(
        self,
        *,
        switches: Sequence[str] = SWITCHES[:-1],
        module: str | None = None,
        least: float = 1.01,
        max_error: float = 0.01,
        trial_share: float = 0.1,
    ) -> None:
        unknown = [name for name in switches if name not in SWITCHES]
        problems = [f"switches: {', '.join(unknown)} not known; choose of {', '.join(SWITCHES)}"] if unknown else []
        problems += [f"least must be at least 1, got {least}"] if least < 1 else []
        problems += [f"max_error must be positive, got {max_error}"] if max_error <= 0 else []
        problems += [f"trial_share must be positive, got {trial_share}"] if trial_share <= 0 else []
        raise_all(problems)
        self.switches, self.module, self.least, self.max_error = tuple(switches), module, least, max_error
        self.trial_share = trial_share
        self.trials: list[Trial] = []
        self.error = 0.0
        self._fast: Callable[..., Any] | None = None
        self._target: nn.Module | None = None
        self._batches = 0.0
        self._kept: dict[str, Undo] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise_all(_members_inside(trainer), ConfigurationError)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            return
        target = self._place(pl_module)
        raise_all(_wrapped_inside(trainer, pl_module, target), ConfigurationError)
        self._target, self._fast, self.trials, self.error, self._batches = target, None, [], 0.0, _batches_of(trainer)
        wrap(target, self, self._answer, innermost=True)  # views and temperatures of the same module go around the copy

    on_validation_start = on_predict_start = on_test_start

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    on_validation_end = on_predict_end = on_test_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _place(self, pl_module: LightningModule) -> nn.Module:
        if self.module:
            return pl_module.get_submodule(self.module)
        children = _changes.parts(pl_module)
        if not children:
            raise ConfigurationError(f"FastInference found no child with weights in {type(pl_module).__name__}. Name one: module=.")
        return max(children, key=lambda child: sum(p.numel() for p in child.parameters()))

    def _answer(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        if self._fast is None:
            self._fast = self._chosen(forward, inputs)
        return self._fast(*inputs)

    def _chosen(self, forward: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[..., Any]:
        """The fastest of what was tried on these inputs, or `forward` itself."""
        device = next(leaf.device for leaf in inputs if isinstance(leaf, Tensor))
        reference, best, network = forward(*inputs), forward, self._target
        call_s = min(timed(lambda: forward(*inputs), device, 1))
        allowance = Allowance(call_s * self._batches, self.trial_share)
        for name in self.switches:
            reason = _unfit(name, self._target, device) or allowance.refuses(CALLS * call_s)
            if reason:
                self.trials.append(Trial(name, note=reason))
            elif name == "memory":
                change = Change(name, _changes.keep_memory, lambda: forward(*inputs))
                trials, self._kept = choose([change], self.least, device, allowance, call_s)
                self.trials += trials
            else:
                best, network = self._tried(name, best, network, inputs, reference)
        log.info("FastInference: %s; outputs differ by %.1e of the largest.", "; ".join(map(str, self.trials)), self.error)
        if not any(trial.kept for trial in self.trials):
            tried = "; ".join(map(str, self.trials)) or "it was given no switch"
            warnings.warn(f"FastInference changed nothing: {tried}.", NoEffectWarning, stacklevel=2)
        return best

    def _tried(
        self, name: str, best: Callable[..., Any], network: Any, inputs: tuple[Any, ...], reference: Any
    ) -> tuple[Callable[..., Any], Any]:
        """One switch on top of those kept so far: how to call what is fastest now, and the network in it."""
        device = reference.device if isinstance(reference, Tensor) else inputs[0].device
        try:
            made, run = _made(name, network, best)
            error = _difference(run(*inputs), reference)
            before, after, steady = compared(lambda: best(*inputs), lambda: run(*inputs), device)
        except (LightningCNNError, RuntimeError) as failure:
            self.trials.append(Trial(name, note=f"cannot be used: {str(failure).splitlines()[0]}"))
            return best, network
        kept = steady and before >= self.least * after and error <= self.max_error
        self.trials.append(Trial(name, before, after, kept, f"is off by {error:.1e}" if error > self.max_error else ""))
        if not kept:
            return best, network
        self.error = error
        return run, made

    def _remove(self) -> None:
        if self._target is not None:
            unwrap(self._target, self)
        self._target = self._fast = None
        for undo in self._kept.values():
            undo()
        self._kept = {}


def _batches_of(trainer: Trainer) -> float:
    """How many this validation, test or prediction has."""
    word = {TrainerFn.VALIDATING: "val", TrainerFn.TESTING: "test", TrainerFn.PREDICTING: "predict"}[trainer.state.fn]  # pyright: ignore[reportArgumentType]
    return sum(getattr(trainer, f"num_{word}_batches"))


def _members_inside(trainer: Trainer) -> list[str]:
    """Callbacks that let the network answer with other weights or with noise inside it, batch by batch."""
    found: list[tuple[str, str]] = []
    for other in vars(trainer)["callbacks"]:
        if isinstance(other, SnapshotEnsemble) and other.answer:
            found.append(("SnapshotEnsemble", "its members"))
        views = other.views if isinstance(other, Marginalize) else []
        views = [view for row in other.compare.values() for view in row] if isinstance(other, EvaluationReport) else views
        found += [(type(other).__name__, repr(view)) for view in views if view.inside]
    return [
        f"{name} averages over {what}, which differ inside of the network; FastInference's one copy would answer for all of them, "
        "without the difference. Leave FastInference out (speed=null), or test without these members."
        for name, what in found
    ]


def _wrapped_inside(trainer: Trainer, pl_module: LightningModule, target: nn.Module) -> list[str]:
    """Callbacks that work on a part of what the copy stands for."""
    parts = {id(module) for module in target.modules()} - {id(target)}
    return [
        f"{type(other).__name__}(module={other.module!r}) works inside of the part that FastInference answers for. "
        f"Give both the same module, or FastInference a smaller one."
        for other in vars(trainer)["callbacks"]
        if isinstance(other, Marginalize | TemperatureScaling) and other.module
        if id(pl_module.get_submodule(other.module)) in parts
    ]


def _unfit(name: str, network: Any, device: torch.device) -> str:
    if name == "memory" and (device.type != "cpu" or not _changes.keeps_memory()):
        return "is for CPUs and glibc"
    if name == "packed" and not any(isinstance(m, LowBitConv2d) for m in network.modules()):
        return "needs 1-bit layers"
    if name == "autocast" and not bf16_units(device):
        return "has no bfloat16 units here"
    return ""


def _made(name: str, network: Any, best: Callable[..., Any]) -> tuple[nn.Module, Callable[..., Any]]:
    """The changed copy, and how it is called."""
    if name == "autocast":

        def run(*inputs: Any) -> Any:
            with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
                return best(*inputs).float()

        return network, run
    plain = copy.deepcopy(network).eval()
    plain.__dict__.pop("forward", None)  # the way back to this callback
    if name == "packed":
        plain = pack(plain)
    elif name == "folded":
        plain = reparameterize(plain)
    elif name == "channels_last":
        plain = plain.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    else:
        plain.compile()
    return plain, plain


def _difference(one: Any, other: Any) -> float:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        raise ConfigurationError("FastInference answers for modules that give one tensor; name one with module=.")
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-12))
