"""`lightning-cnn export`: a checkpoint as one file that runs without this package."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lightning_cnn.app import _build
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.files import replacing
from lightning_cnn.functional.batch import image_key, read

ATOL = 1e-3  # of a logit: a compiled graph adds in another order


def run(config: DictConfig, folder: Path) -> float:
    """Write `out`, load it back, compare it with the model on real pictures; returns the largest difference of a logit.

    `.pt2` is a program of `torch.export`, `.onnx` a graph for any runtime (extra `export`), `.safetensors` the weights alone. Programs take
    uint8 pictures (b c h w), any b, and give logits (b k); class names are stored in the file.

    Raises:
        ConfigurationError: another suffix, or the extra is not installed.
        RuntimeError: the written file does not answer as the model does.
    """
    config = _build.resolved(config, folder)
    out = Path(config.out or folder / "model.pt2")
    data = _build.data(config)
    model = _build.restored(config, data).eval()
    pictures = _some_pictures(data)
    again = _writer(out)(model, pictures, out)
    with torch.inference_mode():
        difference = float((again(pictures) - model(pictures)).abs().max())
    if not difference <= ATOL:
        raise RuntimeError(
            f"{out} answers differently: a logit is off by {difference:.1e}, more than {ATOL:g}. Please report the network."
        )
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MB, largest difference of a logit {difference:.1e} on {len(pictures)} pictures")
    print(folder)
    return difference


def _some_pictures(data) -> Tensor:
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    return read(batch, image_key(batch))[:8]


def _writer(out: Path):
    writers = {".pt2": _program, ".onnx": _onnx, ".safetensors": _weights}
    if out.suffix not in writers:
        raise ConfigurationError(f"out={out}: the suffix says the format; choose one of {', '.join(writers)}.")
    return writers[out.suffix]


def _described(model: Any) -> dict[str, str]:
    return {"classes": json.dumps(list(getattr(model, "classes", ())))}


def _program(model: Any, pictures: Tensor, out: Path):
    batch = torch.export.Dim("b", min=1)
    program = torch.export.export(model, (pictures,), dynamic_shapes=({0: batch},))
    with replacing(out, ConfigurationError) as file:
        torch.export.save(program, file, extra_files=_described(model))
    return torch.export.load(out).module()


def _onnx(model: Any, pictures: Tensor, out: Path):
    try:
        import onnx  # pyright: ignore[reportMissingImports]  (an extra)
        from onnx.reference import ReferenceEvaluator  # pyright: ignore[reportMissingImports]

        program = torch.onnx.export(model, (pictures,), dynamic_shapes=({0: torch.export.Dim("b", min=1)},), dynamo=True, verbose=False)
    except ImportError as error:
        raise ConfigurationError(f'out={out}: {error.name} is missing; pip install "lightning-cnn[export]".') from error
    assert program is not None
    graph = program.model_proto
    onnx.helper.set_model_props(graph, _described(model))
    with replacing(out, ConfigurationError) as file:
        onnx.save(graph, file)
    answer = ReferenceEvaluator(str(out))
    return lambda images: torch.from_numpy(answer.run(None, {answer.input_names[0]: images.numpy()})[0])


def _weights(model: Any, pictures: Tensor, out: Path):
    from safetensors.torch import load_model, save_model

    with replacing(out, ConfigurationError) as file:
        save_model(model, file.name, metadata=_described(model))
    again = type(model)(**model.hparams).eval()
    load_model(again, str(out))
    return again
