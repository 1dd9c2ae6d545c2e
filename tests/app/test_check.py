"""Nothing that a configuration names is imported, called or built unless it is on the list, judged by where it is defined."""

import pytest
from omegaconf import OmegaConf

from lightning_cnn.app._check import composition, problems, resolve
from lightning_cnn.errors import ConfigurationError

HOSTILE = """
os.system posix.system subprocess.run subprocess.Popen builtins.eval builtins.exec logging.os.system torch.load torch.hub.load
pickle.loads torch.jit.load joblib.load shutil.rmtree torch.utils.cpp_extension.load_inline timeit.timeit
code.InteractiveInterpreter pdb.run numpy.load yaml.unsafe_load lightning.pytorch.LightningModule.load_from_checkpoint
torch.serialization._legacy_load pathlib.Path.unlink pathlib.Path.write_text urllib.request.urlretrieve
torch.hub.download_url_to_file webbrowser.open runpy.run_path multiprocessing.Process torch._dynamo.eval_frame.optimize pty.spawn
asyncio.create_subprocess_shell antigravity fsspec.open lightning.fabric.utilities.cloud_io._load cProfile.run trace.Trace
doctest.testfile hydra.utils.get_method hydra.utils.instantiate torch.utils.collect_env.run
lightning.pytorch.cli.instantiate_class triton.backends.nvidia.driver.subprocess.check_output ctypes.CDLL
setuptools._distutils.spawn.spawn torch.distributed.elastic.multiprocessing.start_processes lightning_cnn.__main__
lightning_cnn.app.main.main lightning_cnn.app.main.os.system lightning_cnn.data.image_folders.Path.unlink
lightning_cnn.nn.backbones.torch.load lightning_cnn.model.classifier.torch.hub.load torchvision.datasets.utils.download_url
lightning.pytorch.callbacks.os.system torch.nn.modules.module.torch.load torch.optim.optimizer.functools.partial
lightning.Trainer.fit torchvision.models._api.sys.exit lightning_cnn.functional.counter.blake2b torch.multiprocessing.spawn
lightning_cnn lightning_cnn.model torch.nn.Module.register_forward_hook kornia.augmentation.os
timm.models.hub.load_state_dict_from_url
"""
ALLOWED = """
lightning.Trainer lightning.pytorch.callbacks.ModelCheckpoint lightning_cnn.model.Classifier torch.nn.Linear
torch.optim.SGD torchvision.models.resnet18 torchmetrics.Accuracy kornia.augmentation.RandomAffine timm.create_model
"""


@pytest.mark.parametrize("target", HOSTILE.split())
def test_a_hostile_target_is_refused(target):
    with pytest.raises(ConfigurationError):
        resolve(target)


@pytest.mark.parametrize("target", ALLOWED.split())
def test_what_people_build_is_allowed(target):
    assert resolve(target) is not None


def test_a_name_that_lies_about_its_home_is_refused(monkeypatch):
    """An alias placed inside an allowed module is judged by the object behind it."""
    import os

    import lightning_cnn.model.classifier as home

    monkeypatch.setattr(home, "harmless", os.system, raising=False)
    with pytest.raises(ConfigurationError, match="not on the list"):
        resolve("lightning_cnn.model.classifier.harmless")

    class Forged:
        __module__ = "lightning_cnn.model.classifier"

    monkeypatch.setattr(home, "forged", Forged, raising=False)
    with pytest.raises(ConfigurationError, match="not on the list"):
        resolve("lightning_cnn.model.classifier.forged")


def test_nested_partial_and_listed_targets_are_all_found():
    config = OmegaConf.create(
        {"model": {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.system", "_args_": ["x"]}]},
         "a": [{"b": {"_target_": "subprocess.run", "_partial_": True}}]}
    )  # fmt: skip
    found = list(problems(config))
    assert [text.split(":")[0] for text in found] == ["model._args_[0]", "a[0].b"]


def test_an_interpolated_target_is_refused():
    config = OmegaConf.create({"x": "os.system", "model": {"_target_": "${x}"}})
    assert "an interpolation cannot name what is built" in next(problems(config))


def test_widening_the_list_is_one_key_and_only_as_wide_as_it_says():
    assert resolve("collections.Counter", allow=("collections.",)) is not None
    with pytest.raises(ConfigurationError):
        resolve("os.system", allow=("collections.",))


@pytest.mark.parametrize(
    ("value", "fits"),
    [(3, True), (None, True), ("three", False), (3.5, False), (True, False)],
    ids=["int", "none", "str", "float", "bool"],
)
def test_values_are_held_against_annotations(value, fits):
    config = OmegaConf.create({"trainer": {"_target_": "lightning.Trainer", "max_epochs": value}})
    assert (list(problems(config)) == []) is fits


# Whole commands: what Hydra, OmegaConf or logging would run by themselves. MARK is imported, called or created by none of them.
COMMANDS = {
    "a search path that is a package": ["hydra.searchpath=[pkg://hostile]"],
    "a search path beside an honest one": ["hydra.searchpath=[file:///tmp,pkg://hostile.inner]"],
    "an added search path": ["+hydra.searchpath=['pkg://hostile']"],
    "another primary configuration": ["--config-path=FOLDER", "--config-name=train"],
    "another primary configuration, in short": ["-cp", "FOLDER"],
    "another folder of configurations": ["--config-dir=FOLDER"],
    "a callback of Hydra's": ["+hydra.callbacks.x._target_=hostile.Call"],
    "a launcher": ["hydra.launcher._target_=hostile.Call"],
    "a sweeper": ["hydra.sweeper._target_=hostile.Call"],
    "a callback behind an interpolation": ["+x=hostile.Call", "+hydra.callbacks.x._target_=${x}"],
    "a factory of logging": ["+hydra.job_logging.handlers.x={'()':hostile.Call}"],
    "a class of logging": ["+hydra.job_logging.handlers.x.class=hostile.Call"],
    "a formatter of logging": ["+hydra.hydra_logging.formatters.x.class=hostile.Call"],
    "a filter of logging": ["+hydra.job_logging.filters.x={'()':hostile.Call}"],
    "a class behind an interpolation": ["+seed2=hostile.Call", "+hydra.job_logging.handlers.x.class=${seed2}"],
    "a stream that is an import": ["hydra.job_logging.handlers.console.stream=ext://hostile"],
    "the environment of new processes": ["+hydra.job.env_set.LD_PRELOAD=hostile.so"],
    "a group from an honest folder": ["hydra.searchpath=[file://FOLDER]", "callbacks=hostile"],
    "a nested target": ["+callbacks.x={_target_:lightning_cnn.callbacks.EMA,decay:{_target_:hostile.Call}}"],
    "a partial": ["+callbacks.x={_target_:hostile.Call,_partial_:true}"],
    "positional arguments": ["+callbacks.x={_target_:torch.nn.Sequential,_args_:[{_target_:hostile.Call}]}"],
    "a whole node behind an interpolation": ["+x={_target_:hostile.Call}", "+callbacks.y=${x}"],
    "a target made of parts": ["+x=hostile", "+callbacks.y._target_=${x}.Call"],
    "a method": ["+callbacks.x._target_=lightning.Trainer.save_checkpoint"],
    "a private name": ["+callbacks.x._target_=lightning_cnn.app._build.instantiate"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=list(COMMANDS))
def test_a_hostile_command_is_refused_and_nothing_of_it_is_imported(words, tmp_path, monkeypatch):
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / "__init__.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Call: pass\n")
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "hostile.yaml").write_text("x: {_target_: hostile.Call}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError):
        composition("train", [word.replace("FOLDER", str(tmp_path)) for word in words])
    assert not (tmp_path / "executed").exists()


def test_honest_folders_and_levels_are_let_in(tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "mine.yaml").write_text("ema: {_target_: lightning_cnn.callbacks.EMA}\n")
    composition("train", [f"hydra.searchpath=[file://{tmp_path}]", "callbacks=mine", "hydra.job_logging.root.level=DEBUG"])
