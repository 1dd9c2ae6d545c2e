"""Build a network by name and load weights into it, saying what was loaded, skipped and missing."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_cnn.errors import CheckpointError, ConfigurationError
from lightning_cnn.nn import networks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """Names of the tensors that were loaded, skipped (another shape here), unused (no place here) and missing (not in the file)."""

    source: str
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        for word in ("skipped", "unused", "missing"):
            names = getattr(self, word)
            if names:
                reason = " for their shape" if word == "skipped" else ""
                parts.append(f"{len(names)} {word}{reason} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})")
        return "; ".join(parts)


def build(architecture: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A randomly initialised network: one of `nn.networks`, else torchvision's, else timm's when it is installed.

    Raises:
        ConfigurationError: nobody knows the name, or the network cannot take that many channels.
    """
    if architecture in networks.__all__:
        return getattr(networks, architecture)(num_classes=num_classes, in_channels=in_channels)
    from torchvision.models import get_model, list_models

    if architecture in list_models():
        if in_channels not in (1, 3):
            raise ConfigurationError(f"torchvision's {architecture} takes 3 channels; got in_channels={in_channels}. Use a timm model.")
        extra = {"init_weights": True, "aux_logits": False} if architecture in ("inception_v3", "googlenet") else {}
        return get_model(architecture, weights=None, num_classes=num_classes, **extra)
    if find_spec("timm") is not None:
        import timm

        if timm.is_model(architecture):
            return timm.create_model(architecture, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    raise ConfigurationError(_unknown(architecture, [*networks.__all__, *list_models()]))


def load(network: nn.Module, weights: str, *, architecture: str) -> Loaded:
    """Load `weights` into `network` in place: a local `.pth`/`.pt`/`.ckpt`/`.safetensors` file, or a name of torchvision's enum.

    Tensors of another shape (a head for another number of classes) are skipped and reported.

    Raises:
        CheckpointError: the file is missing, unreadable, or shares no tensor with the network.
        ConfigurationError: the name is not one of torchvision's weights for this architecture.
    """
    state = _from_file(Path(weights)) if _looks_like_a_file(weights) else _from_enum(architecture, weights)
    own = network.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    if not fitting:
        raise CheckpointError(
            f"{weights} holds none of the tensors of {architecture}: it has {', '.join(list(state)[:3])}, ..., "
            f"the network {', '.join(list(own)[:3])}, ... Give the weights of this architecture."
        )
    network.load_state_dict(fitting, strict=False)
    report = Loaded(
        source=weights,
        loaded=tuple(fitting),
        skipped=tuple(sorted(name for name in state if name in own and name not in fitting)),
        unused=tuple(name for name in state if name not in own),
        missing=tuple(name for name in own if name not in state and not name.endswith("num_batches_tracked")),
    )
    log.info("%s: %s", architecture, report)
    return report


def normalisation(architecture: str, weights: str | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, for pictures in [0, 1], that pretrained weights expect (ImageNet's when unknown)."""
    if weights and not _looks_like_a_file(weights):
        transform = _enum(architecture, weights).transforms()
        return list(transform.mean), list(transform.std)
    return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _looks_like_a_file(weights: str) -> bool:
    return Path(weights).suffix in (".pth", ".pt", ".ckpt", ".safetensors") or "/" in weights


def _from_file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"weights: there is no file {path}. Give a .pth or .safetensors file, or a torchvision name such as DEFAULT."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"weights: {path} cannot be read as plain tensors: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"weights: {path} holds {type(state).__name__}, not names with tensors. Save model.state_dict().")
    # A DataParallel or LightningModule wrapper leaves one common prefix on every name.
    for prefix in ("module.", "network.", "model."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _enum(architecture: str, weights: str):
    from torchvision.models import get_model_weights

    try:
        known = get_model_weights(architecture)
    except ValueError as error:
        raise ConfigurationError(f"weights={weights!r}: torchvision has no weights for {architecture}. Give a file.") from error
    if weights not in known.__members__:
        raise ConfigurationError(f"weights={weights!r}: torchvision has {', '.join(known.__members__)} for {architecture}.")
    return known[weights]


def _from_enum(architecture: str, weights: str) -> Mapping[str, Tensor]:
    return _enum(architecture, weights).get_state_dict(progress=True, check_hash=True)


def _unknown(architecture: str, known: list[str]) -> str:
    close = get_close_matches(architecture, known, 3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see torchvision.models.list_models()"
    timm = "" if find_spec("timm") else " More networks come with: pip install timm."
    return f"architecture={architecture!r} is not a network of lightning_cnn, torchvision or timm; {hint}{timm}"
