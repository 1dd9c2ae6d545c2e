"""Look at a composed configuration before anything in it is imported by name, called or built.

Every `_target_` must resolve to something on the allow-list (judged on the object found, not on the name written), and every argument
must exist in its signature and fit its annotation. All problems are reported at once.
"""

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, Node, OmegaConf

from lightning_cnn.errors import ConfigurationError, raise_all

CLASSES = (
    "lightning_cnn.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.", "lightning.pytorch.strategies.",
    "lightning.pytorch.profilers.", "lightning.pytorch.plugins.precision.", "lightning.pytorch.plugins.io.",
    "lightning.pytorch.trainer.trainer.", "torch.nn.modules.", "torch.optim.", "torchmetrics.", "kornia.augmentation.",
    "torchvision.models.", "torchvision.transforms.",
)  # fmt: skip
FUNCTIONS = ("lightning_cnn.", "torchvision.models.", "timm.models._factory.")
NEVER = ("lightning_cnn.app.main", "lightning_cnn.app._check")
LOGGERS = ("logging.Formatter", "logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "colorlog.ColoredFormatter")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"  # Hydra's own
RESERVED = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}


def composition(verb: str, overrides: Sequence[str]) -> None:
    """Compose `conf/VERB.yaml` with `overrides` as Hydra will, and check all of it, Hydra's own node included.

    Raises:
        ConfigurationError: an unknown key, a `_target_` that is not allowed, an argument that does not exist or fit; all of them.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    raise_all(_word_problems(overrides))
    words = [word for word in overrides if not word.startswith("-")]
    try:
        config = _composed(verb, words)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(_explained(str(error), verb, words)) from error
    allowed = tuple(f"{package.rstrip('.')}." for package in config.get("allow_packages") or ())
    found = [*_unknown_keys(config, verb), *problems(config, allow=allowed), *_setting_problems(config.hydra)]
    raise_all(found)


def _composed(verb: str, words: Sequence[str]) -> DictConfig:
    """As Hydra composes for a sweep, whose swept keys keep their defaults; Hydra's own node stays in."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    GlobalHydra.instance().clear()
    try:
        engine = Hydra.create_main_hydra2(verb, create_config_search_path("pkg://lightning_cnn.conf"))
        return engine.config_loader.load_configuration(verb, list(words), run_mode=RunMode.MULTIRUN, validate_sweep_overrides=False)
    finally:
        GlobalHydra.instance().clear()


def _word_problems(words: Sequence[str]) -> Iterator[str]:
    """What would let Hydra read, or import, before or beside what is checked here."""
    for word in words:
        if word.startswith(("--config", "-cp", "-cn", "-cd")):
            yield f"{word}: another primary configuration would not be checked; give hydra.searchpath=[file://FOLDER] instead"
        if word.lstrip("+~").startswith("hydra.searchpath"):
            for scheme, place in re.findall(r"([\w+.-]+)://([^\s,'\"\]]*)", word):
                if scheme != "file" and f"{scheme}://{place}" != "pkg://lightning_cnn.conf":
                    yield f"{scheme}://{place}: a search path would be imported before it is checked; only file://FOLDER is read"


def _setting_problems(hydra: DictConfig) -> Iterator[str]:
    """Hydra's settings that run something without a `_target_`: factories of logging, and the environment of new processes."""
    for group in ("hydra_logging", "job_logging"):
        yield from _logging_problems(OmegaConf.to_container(hydra[group], resolve=False), f"hydra.{group}")
    if hydra.job.env_set:
        yield f"hydra.job.env_set: {dict(hydra.job.env_set)}: set the environment where you start the program"


def _logging_problems(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, below in value.items():
            if key in ("()", "class", "factory") and below not in LOGGERS:
                yield f"{path}.{key}: {below!r} is no class that a configuration may log with; choose one of {', '.join(LOGGERS)}"
            yield from _logging_problems(below, f"{path}.{key}")
    elif isinstance(value, list):
        for position, below in enumerate(value):
            yield from _logging_problems(below, f"{path}[{position}]")
    elif isinstance(value, str) and value not in STREAMS and ("ext://" in value or (value.startswith("${") and value != LOG_FILE)):
        yield f"{path}: {value!r} could name anything that Python can import; write the plain value"


def problems(node: Any, path: str = "", allow: tuple[str, ...] = ()) -> Iterator[str]:
    """Every problem at and below `node`, as sentences that begin with the path of the key."""
    if isinstance(node, ListConfig):
        for position in range(len(node)):
            yield from problems(node._get_node(position), f"{path}[{position}]", allow)
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
        return
    if "_target_" in node and path.partition(".")[0] != "hydra":
        yield from _target_problems(node, path, allow)
    if "_target_" in node and path.partition(".")[0] == "hydra":
        yield from _hydra_problems(node, path)
    for key in map(str, node):
        if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            yield from problems(node._get_node(key), f"{path}.{key}" if path else key, allow)


def resolve(target: str, allow: tuple[str, ...] = ()) -> Any:
    """The object that `target` names, imported only from allowed packages and allowed only by where it was defined.

    >>> resolve("torch.utils.collect_env.run")
    Traceback (most recent call last):
    lightning_cnn.errors.ConfigurationError: 'torch.utils.collect_env.run' is not on the list of what a configuration may build...
    """
    refusal = (
        f"{target!r} is not on the list of what a configuration may build. "
        "If you trust it, widen the list: allow_packages=[PACKAGE], or build it in Python"
    )
    roots = {prefix.partition(".")[0] for prefix in (*CLASSES, *FUNCTIONS, *allow)}
    if not isinstance(target, str) or target.partition(".")[0] not in roots or not _plain(target):
        raise ConfigurationError(refusal)
    found = _walk(target)
    home = f"{getattr(found, '__module__', None)}."
    prefixes = (*allow, *(CLASSES if isinstance(found, type) else FUNCTIONS))
    honest = _is_at(found, home.rstrip("."))
    if not isinstance(found, type | types.FunctionType) or not honest or not home.startswith(prefixes) or home.startswith(NEVER):
        raise ConfigurationError(refusal)
    return found


def _plain(target: str) -> bool:
    """Dotted public names only: importing `x.__main__` would run it."""
    return all(word.isidentifier() and not word.startswith("_") for word in target.split("."))


def _walk(target: str) -> Any:
    words = target.split(".")
    found: Any = import_module(words[0])
    for position, word in enumerate(words[1:], 2):
        if isinstance(found, types.ModuleType) and found.__name__ == ".".join(words[: position - 1]) and not hasattr(found, word):
            try:
                import_module(".".join(words[:position]))
            except ModuleNotFoundError as error:
                hint = _hint(word, dir(found))
                raise ConfigurationError(
                    f"{target!r} does not exist: {'.'.join(words[: position - 1])} has no {word!r}{hint}"
                ) from error
        if not hasattr(found, word):
            raise ConfigurationError(f"{target!r} does not exist: no {word!r} in it{_hint(word, dir(found))}")
        found = getattr(found, word)
    return found


def _is_at(found: Any, module: str) -> bool:
    """Whether the object is what its own `__module__` and `__qualname__` say, so that neither can be borrowed."""
    place: Any = sys.modules.get(module)
    for word in getattr(found, "__qualname__", "?").split("."):
        place = getattr(place, word, None)
    return place is found


def _target_problems(node: DictConfig, path: str, allow: tuple[str, ...]) -> Iterator[str]:
    if OmegaConf.is_interpolation(node, "_target_"):
        yield f"{path}._target_: an interpolation cannot name what is built; write the name itself"
        return
    try:
        found = resolve(node._target_, allow)
    except ConfigurationError as error:
        yield f"{path}: {error}"
        return
    yield from _argument_problems(node, path, found)


def _argument_problems(node: DictConfig, path: str, found: Any) -> Iterator[str]:
    parameters = inspect.signature(found).parameters
    hints = _hints(found)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in node:
        name = str(key)
        if name in RESERVED:
            continue
        if name not in parameters and not open_ended:
            hint = _hint(name, parameters) or "; it takes " + ", ".join(parameters)
            yield f"{path}.{name}: {node._target_} has no such argument{hint}"
        elif name in hints and not OmegaConf.is_interpolation(node, name) and not OmegaConf.is_missing(node, name):
            value = node[name]
            plain = OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value
            if not _fits(plain, hints[name]):
                yield f"{path}.{name}: {node._target_} takes {_named(hints[name])}, got {plain!r}"
    if not node.get("_partial_") and not node.get("_args_"):
        for p in parameters.values():
            if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in node:
                yield f"{path}: {node._target_} needs {p.name!r}; add {path}.{p.name}=..."


def _hydra_problems(node: DictConfig, path: str) -> Iterator[str]:
    """Hydra builds its launcher, sweeper and callbacks itself; only its own plugins and our sweep report may stand there."""
    target = node._get_node("_target_")
    target = target._value() if isinstance(target, Node) else None  # the text itself, an interpolation unresolved
    allowed = ("hydra._internal.core_plugins.", "hydra_plugins.", "lightning_cnn.app.sweep.", "optuna.samplers.")
    if not isinstance(target, str) or not target.startswith(allowed):
        yield f"{path}: {target!r} is not a launcher, sweeper or callback that this program lets Hydra build"


def _unknown_keys(config: DictConfig, verb: str) -> Iterator[str]:
    known = {*_known_keys(verb), "hydra"}
    for key in config:
        if str(key) not in known:
            yield f"{key}: no such key at the top level{_hint(str(key), known) or '; known: ' + ', '.join(sorted(known))}"


def _known_keys(name: str) -> set[str]:
    """Keys and groups of a primary configuration and of those it starts from."""
    from importlib.resources import files

    primary = yaml.safe_load(files("lightning_cnn.conf").joinpath(f"{name}.yaml").read_text())
    entries = primary.pop("defaults", ())
    groups = {str(word) for entry in entries if isinstance(entry, dict) for word in entry}
    return {*primary, *groups}.union(*(_known_keys(entry) for entry in entries if isinstance(entry, str) and entry != "_self_"))


def _explained(message: str, verb: str, words: Sequence[str]) -> str:
    """Hydra's sentence about a key that does not exist, with the nearest one that does."""
    first = message.strip()
    if "Could not override" not in first:
        return first
    *parents, key = first.split("'")[1].lstrip("+~").split(".")
    if parents and parents[0] not in _known_keys(verb):
        return f"{first}{_hint(parents[0], _known_keys(verb))}"
    rest = _composed(verb, [word for word in words if not word.lstrip("+~").startswith(".".join([*parents, key]))])
    node = OmegaConf.select(rest, ".".join(parents)) if parents else rest
    return f"{first}{_hint(key, node if isinstance(node, DictConfig) else ())}"


def _hint(word: str, known: Any) -> str:
    close = get_close_matches(word, [str(k) for k in known], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _hints(found: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(found.__init__ if isinstance(found, type) else found)
    except (NameError, TypeError, AttributeError):  # names under TYPE_CHECKING: nothing to check against
        return {}


def _named(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_named(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value fits an annotation; annotations that are not plain types accept anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, dict) and "_target_" in value:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    if origin in (list, tuple, set, Sequence) or hint in (list, tuple):
        inner = [a for a in arguments if a is not Ellipsis]
        return isinstance(value, list | tuple) and (len(inner) != 1 or all(_fits(v, inner[0]) for v in value))
    if origin in (dict, Mapping) or hint is dict:
        return isinstance(value, dict)
    return True
