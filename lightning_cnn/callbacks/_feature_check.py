"""On one real batch, prove that answering with stored features is the same as running the prefix."""

import pickle
import random
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.nn.prefix import PrefixSwitch
from lightning_cnn.nn.stages import Unit


class Check:
    """Waits for the first recorded forward pass, watches it, and repeats it with the features and no picture.

    No generator may move while the prefix runs: then it is a function of the picture. And the two answers must be equal bit by bit:
    then nothing behind the prefix looks past it (a skip connection, a functional layer).
    """

    def __init__(self, model: nn.Module, prefix: list[Unit], switch: PrefixSwitch) -> None:
        self.prefix, self.switch, self.busy = prefix, switch, False
        cut = prefix[-1].name.split(".")
        above = [".".join(cut[:i]) for i in range(len(cut))]
        self.outermost: nn.Module | None = None
        self.random = _random_state()
        self.features: list[Tensor] = []
        self.buffers: dict[str, Tensor] = {}
        modules = [model.get_submodule(name) for name in above]
        self.handles = [module.register_forward_pre_hook(self._before) for module in modules]
        self.handles += [module.register_forward_hook(self._after, with_kwargs=True) for module in modules]

    @property
    def done(self) -> bool:
        return not self.handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _before(self, module: nn.Module, args: Any) -> None:
        if self.busy or self.outermost is not None or self.switch.record is None:
            return
        # Distributed strategies call the LightningModule with training_step in place of its forward.
        if getattr(module.forward, "__func__", None) is not type(module).forward:
            return
        self.outermost, self.random = module, _random_state()
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        record = self.switch.record

        def both(output: Tensor) -> None:
            if any(before != after for before, after in zip(self.random, _random_state(), strict=True)):
                raise UnsupportedLayerError(
                    f"the prefix up to '{self.prefix[-1].name}' draws random numbers, so its answer for a picture is not one answer: "
                    "put the layer that does into evaluation mode."
                )
            self.features.append(output)
            record(output)

        self.switch.record = both

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.busy or module is not self.outermost:
            return
        self.busy = True
        self.remove()
        if len(self.features) != 1:
            return  # said at the end of the step
        record, self.switch.record = self.switch.record, None
        self.switch.features = self.features[0]
        try:
            self._same_without_the_picture(module, args, kwargs, output)
        finally:
            self.switch.features, self.switch.record = None, record

    def _same_without_the_picture(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        cut = self.prefix[-1].name
        try:
            with torch.no_grad(), torch.random.fork_rng():
                torch.set_rng_state(torch.frombuffer(bytearray(self.random[0]), dtype=torch.uint8))
                if torch.cuda.is_available():
                    torch.cuda.set_rng_state(torch.frombuffer(bytearray(self.random[1]), dtype=torch.uint8))
                again = self._call(module, _blank(args), _blank(kwargs))
        except Exception as error:
            raise UnsupportedLayerError(
                f"behind '{cut}' something needs more than its output ({type(error).__name__}: {error}): its features are not enough."
            ) from error
        if not _equal(output, again):
            raise UnsupportedLayerError(
                f"behind '{cut}' something looks past it (a skip connection or a functional layer), so its features are not enough."
            )

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        # On copies of the buffers as they were: running statistics move once a step, not three times.
        return torch.func.functional_call(module, {name: buffer.clone() for name, buffer in self.buffers.items()}, args, kwargs)


def _blank(value: Any) -> Any:
    """Pictures shrunk to one pixel, as cached batches bring them."""
    return apply_to_collection(value, Tensor, lambda t: t.new_zeros((*t.shape[:2], *([1] * (t.dim() - 2)))) if t.dim() >= 4 else t)


def _random_state() -> tuple[bytes, bytes, int, int]:
    """torch on the CPU and on CUDA, Python's `random`, numpy."""
    cuda = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_available() else b""
    return torch.get_rng_state().numpy().tobytes(), cuda, hash(random.getstate()), hash(pickle.dumps(np.random.get_state()))


def _equal(a: Any, b: Any) -> bool:
    found: list[list[Tensor]] = [[], []]
    for tensors, value in zip(found, (a, b), strict=True):
        apply_to_collection(value, Tensor, tensors.append)
    return len(found[0]) == len(found[1]) and all(torch.equal(x, y) for x, y in zip(*found, strict=True))
