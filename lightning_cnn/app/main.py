"""`lightning-cnn VERB [key=value ...]`: find the verb, compose its configuration with Hydra, check it, run it.

Nothing heavy is imported before the configuration has passed its check, so `--help` and tab completion answer at once.
"""

import importlib
import logging
import os
import re
import sys
import warnings
from pathlib import Path

VERBS = {
    "train": "train a model, test it, and leave a report: train experiment=transfer data.root=FOLDER",
    "test": "test a checkpoint: test ckpt_path=last|best|PATH",
    "predict": "label pictures: predict ckpt_path=last input=FOLDER",
    "pack": "write a folder of pictures into one contiguous file: pack data.root=FOLDER out=FILE",
    "summary": "receptive field, parameters and multiply-adds by layer: summary model.architecture=resnet18",
    "export": "write a checkpoint as one file that runs elsewhere: export ckpt_path=best out=model.pt2|.onnx|.safetensors",
    "bench": "measure against the peers: bench [loading|...]",
}
VERB = "LIGHTNING_CNN_VERB"  # for the other processes of a strategy: Lightning starts them with sys.argv, where Hydra allows no verb
USAGE = """\
lightning-cnn VERB [key=value ...]      (-m sweeps: lightning-cnn train -m seed=1,2,3)

{verbs}

lightning-cnn VERB --help     the verb's menu, every group and key
lightning-cnn VERB --cfg job  the composed configuration, without running it
eval "$(lightning-cnn -sc install=bash)"   tab completion (also zsh, fish)"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the exit code is 0 when it worked and 2 when what was asked cannot work."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] and words[0] in ("-sc", "--shell-completion"):
        return _complete(words)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if "=" in words[0] and "LOCAL_RANK" in os.environ and VERB in os.environ:
        words = [os.environ[VERB], *words]
    verb, *rest = words
    if verb not in _available():
        print(f"lightning-cnn has no verb {verb!r}{_did_you_mean(verb, _available())}\n\n{_usage()}", file=sys.stderr)
        return 2
    return _run(verb, rest)


def _available() -> list[str]:
    return [verb for verb in VERBS if Path(__file__).with_name(f"{verb}.py").exists()]


def _usage() -> str:
    return USAGE.format(verbs="\n".join(f"  {verb:<9}{VERBS[verb]}" for verb in _available()))


def _did_you_mean(word: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _run(verb: str, overrides: list[str]) -> int:
    from lightning_cnn.app import _check, _checkpoint
    from lightning_cnn.errors import LightningCNNError

    try:
        if verb == "bench":
            from lightning_cnn.app import bench

            overrides = bench.words(overrides)
        if not any(word.startswith(("-h", "--help", "--hydra-help", "--info", "-i", "--version", "-sc")) for word in overrides):
            overrides = _checkpoint.with_overrides_of_its_run(verb, overrides)
            _check.composition(verb, overrides)
        _hydra(verb, overrides)
    except LightningCNNError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _hydra(verb: str, overrides: list[str]) -> None:
    import hydra
    from omegaconf import DictConfig

    def task(config: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        sys.argv = [program, verb, *overrides]  # what a strategy starts its other processes with
        folder = Path(HydraConfig.get().runtime.output_dir)
        module = importlib.import_module(f"lightning_cnn.app.{verb}")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its notes on hardware and products are not this run's
        for noise in ("Experiment logs directory", "`isinstance\\(treespec", ".*does not have many workers", ".*no `val_dataloader`"):
            warnings.filterwarnings("ignore", message=noise)
        return module.run(config, folder)

    program = sys.argv[0]
    sys.argv = [f"lightning-cnn {verb}", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # a traceback of ours says more than Hydra's shortened one
    hydra.main(version_base="1.3", config_path="pkg://lightning_cnn.conf", config_name=verb)(task)()


def _complete(words: list[str]) -> int:
    """Answer the shell: complete the verb here, and everything after it with Hydra's own completion."""
    line = os.environ.get("COMP_LINE", "")
    match = re.match(r"\s*\S+\s+(\S+)\s", line)
    if "query" not in " ".join(words) or (match and match[1] in _available()):
        verb = match[1] if match else "train"
        if match:
            os.environ["COMP_LINE"] = "lightning-cnn " + line[match.end() :]
            os.environ["COMP_POINT"] = str(max(0, int(os.environ.get("COMP_POINT", len(line))) - match.end() + len("lightning-cnn ")))
        _hydra(verb, words)
        return 0
    print("\n".join(verb for verb in _available() if verb.startswith(line.split(" ", 1)[-1].strip())))
    return 0
