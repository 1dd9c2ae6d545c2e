"""Members that differ in their weights or statistics: `Ensemble(checkpoints)` and `MCBatchNorm(K)`."""

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_cnn.callbacks._views import Place, View
from lightning_cnn.callbacks.snapshot_ensemble import SnapshotEnsemble
from lightning_cnn.errors import CheckpointError, raise_all
from lightning_cnn.functional.batch import image_key, read

State = Mapping[str, Tensor]


class Ensemble(View):
    """One member a checkpoint (Lightning's, or a bare state dict); the model's own weights are a member only if they are listed.

    `checkpoints` are files or patterns (`runs/*/best.ckpt`, as `ModelSoup` takes them; a checkpoint written under `EMA` holds the
    average), or the word "snapshots": the members of the Trainer's `SnapshotEnsemble(answer=False)`, which is the model itself as long as
    there are none.

    Members are loaded one after the other into the model, which is as it was after each forward. `batched=True` runs them at once with
    `torch.func.vmap`: worth it for small networks on a GPU, and not to be combined with noise inside the network.
    """

    def __init__(self, checkpoints: Sequence[str | Path] | Literal["snapshots"], batched: bool = False) -> None:
        self.checkpoints, self.snapshots, self.batched = _listed(checkpoints), checkpoints == "snapshots", batched
        self.count = len(self.checkpoints)
        self.states: list[State] = []

    def problems(self, place: Place) -> list[str]:
        if self.snapshots:
            return _snapshot_problems(place)
        if not self.checkpoints:
            return ["Ensemble has no checkpoints. Give at least one path."]
        files = [file for given in self.checkpoints for file in _files(given)]
        self.count = len(files)
        return [f"Ensemble: checkpoint '{path}' does not exist." for path in files if not path.is_file()]

    def attach(self, place: Place) -> None:
        with torch.inference_mode(False):  # evaluation starts inside inference mode, whose tensors may go nowhere else
            if self.snapshots:
                members = _snapshots(place.trainer)[0].served or [dict(place.module.state_dict())]  # type: ignore[union-attr]
                self.states = [_fitting(member, "snapshot", place) for member in members]
            else:
                self.states = [_state(file, place) for given in self.checkpoints for file in _files(given)]
        self.count = len(self.states)

    def weights(self, target: nn.Module, member: int) -> Any:
        return _loaded(target, self.states[member])

    def stacked(self) -> dict[str, Tensor]:
        """The members' weights, one axis more."""
        return {name: torch.stack([state[name] for state in self.states]) for name in self.states[0]}


class MCBatchNorm(View):
    """`k` members whose batch norms have the statistics of one training batch each.

    The first `k` batches of `data` (any iterable of batches), or of the train loader of the Trainer's datamodule.

    Source: Teye et al. 2018, "Bayesian uncertainty estimation for batch normalized deep networks", arXiv:1802.06455.
    """

    def __init__(self, k: int = 10, data: Iterable[Any] | None = None) -> None:
        self.count, self.data = k, data
        self.states: list[State] = []

    def problems(self, place: Place) -> list[str]:
        found = []
        if not any(True for _ in _batch_norms(place.target)):
            found.append(
                f"MCBatchNorm found no batch norm with running statistics in {type(place.target).__name__}. Leave this view out."
            )
        if self.data is None and getattr(place.trainer, "datamodule", None) is None:
            found.append("MCBatchNorm needs training batches: pass a datamodule to the Trainer, or give MCBatchNorm(k, data=loader).")
        return found

    def attach(self, place: Place) -> None:
        data = self.data if self.data is not None else place.trainer.datamodule.train_dataloader()  # type: ignore[union-attr]
        self.states = []
        for _, batch in zip(range(self.count), data, strict=False):
            self.states.append(_statistics(place, batch))
        if len(self.states) < self.count:
            raise_all([f"MCBatchNorm({self.count}) needs as many training batches; there are {len(self.states)}. Choose a smaller k."])
        if place.trainer is not None:  # every rank shuffles for itself, but the members are the same networks everywhere
            self.states = place.trainer.strategy.broadcast(self.states)

    def weights(self, target: nn.Module, member: int) -> Any:
        return _loaded(target, self.states[member])


def _batch_norms(target: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for name, layer in target.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            yield name, layer


def _statistics(place: Place, batch: Any) -> State:
    norms = dict(_batch_norms(place.target))
    before = {name: (layer.momentum, layer.training) for name, layer in norms.items()}
    own = {key: value.clone() for key, value in _running(norms).items()}
    for layer in norms.values():
        layer.momentum, layer.training = 1.0, True
    try:
        _forward(place, batch)
        with torch.inference_mode(False):
            return {key: value.detach().clone() for key, value in _running(norms).items()}
    finally:
        for name, layer in norms.items():
            layer.momentum, layer.training = before[name]
        for key, value in _running(norms).items():
            value.copy_(own[key])


def _running(norms: Mapping[str, _BatchNorm]) -> dict[str, Tensor]:
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    return {f"{name}.{kind}" if name else kind: getattr(layer, kind) for name, layer in norms.items() for kind in kinds}


def _forward(place: Place, batch: Any) -> None:
    with torch.no_grad():
        if place.trainer is None or place.module is None:
            place.target(read(batch, image_key(batch)))
            return
        batch = place.trainer.strategy.batch_to_device(batch, place.module.device)
        batch = place.trainer.precision_plugin.convert_input(batch)
        with place.trainer.precision_plugin.forward_context():
            place.module(read(batch, image_key(batch)))


def _listed(checkpoints: Sequence[str | Path] | str) -> list[str | Path]:
    return [checkpoints] if isinstance(checkpoints, str) else list(checkpoints)


def _files(given: str | Path) -> list[Path]:
    """The files of a pattern in the order of their names; what is no pattern is one file, there or not."""
    named = sorted(glob.glob(str(given))) if glob.has_magic(str(given)) and not Path(given).is_file() else []  # noqa: PTH207
    return [Path(name) for name in named] or [Path(given)]


def _snapshots(trainer: Any) -> list[Any]:
    return (
        [callback for callback in vars(trainer)["callbacks"] if isinstance(callback, SnapshotEnsemble)] if trainer is not None else []
    )


def _snapshot_problems(place: Place) -> list[str]:
    found = _snapshots(place.trainer)
    if len(found) != 1:
        return [f"Ensemble('snapshots') takes the members of the Trainer's SnapshotEnsemble, and there are {len(found)}. Give it one."]
    return (
        ["SnapshotEnsemble answers for its members itself, and Marginalize would too: give it answer=False."] if found[0].answer else []
    )


def _state(path: Path, place: Place) -> State:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"Ensemble: checkpoint '{path}' cannot be read: {error}") from error
    return _fitting(saved.get("state_dict", saved), f"checkpoint '{path}'", place)


def _fitting(state: State, what: str, place: Place) -> State:
    """The tensors of `state` that are weights of the target; all of them must be there."""
    saved = {_plain(name): value for name, value in state.items()}
    prefix = f"{_plain(place.name)}." if place.name else ""
    if prefix and any(name.startswith(prefix) for name in saved):
        saved = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    own = {name: value for name, value in place.target.state_dict().items() if isinstance(value, Tensor)}
    wrong = [name for name, value in own.items() if _plain(name) not in saved or saved[_plain(name)].shape != value.shape]
    if wrong:
        raise CheckpointError(
            f"Ensemble: {what} lacks {len(wrong)} of {len(own)} weights of {type(place.target).__name__}, "
            f"or has them in another shape: {', '.join(wrong[:3])}... It belongs to another network."
        )
    return {name: saved[_plain(name)].to(value.device, value.dtype, copy=True) for name, value in own.items()}


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")  # torch.compile's part of a name


@contextmanager
def _loaded(target: nn.Module, state: State) -> Iterator[None]:
    own = {name: value for name, value in target.state_dict().items() if name in state}
    before = {name: value.clone() for name, value in own.items()}
    try:
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(before[name])
