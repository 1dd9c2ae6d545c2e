"""What every layer knows, as a report."""

import lightning as L
import pytest
import torch
from _transfer import QUIET, Module, Net, loader
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.callbacks import DecafReport
from lightning_cnn.errors import ConfigurationError


class Stripes(L.LightningDataModule):
    """Four classes that differ in the colour of noise, which the first layer sees."""

    classes = ("red", "green", "blue", "white")

    def _loader(self, seed):
        labels = torch.arange(48) % 4
        images = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        images += 3 * torch.eye(4)[labels][:, :3, None, None]
        return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=seed == 0)

    def train_dataloader(self):
        return self._loader(0)

    def val_dataloader(self):
        return self._loader(1)


def report(folder, epochs=0, **settings):
    callback = DecafReport(folder=str(folder), **settings)
    trainer = L.Trainer(max_epochs=epochs, callbacks=[callback], **QUIET)
    module = Module(net=Net())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer.fit(module, datamodule=Stripes())
    return callback, trainer, module, before


def test_an_untrained_run_leaves_table_and_pictures_and_touches_nothing(tmp_path):
    callback, trainer, module, before = report(tmp_path, shots=[None, 3])
    assert {path.name for path in tmp_path.iterdir()} == {"decaf.md", "layer_accuracy.png", "neighbours.png", "projection.png"}
    assert list(callback.accuracy) == ["stem", "model.body", "model.top"]
    assert callback.accuracy["stem"]["all"][0] > 0.9 > 0.25 + callback.accuracy["stem"]["3"][1]
    assert "| stem | " in (tmp_path / "decaf.md").read_text()
    assert float(trainer.callback_metrics["decaf/stem"]) == pytest.approx(callback.accuracy["stem"]["all"][0])
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not any(part._forward_hooks for part in module.modules())


def test_named_layers_and_a_support_vector_machine(tmp_path):
    callback, *_ = report(tmp_path, layers=["model.stem"], shots=[None], kind="svm", epochs=1)
    assert callback.accuracy["model.stem"]["all"][0] > 0.9


def test_more_shots_than_there_are_drop_the_curve(tmp_path, caplog):
    callback, *_ = report(tmp_path, shots=[None, 13], layers=["model.stem"])
    assert list(callback.accuracy["model.stem"]) == ["all"]
    assert "leaves out 13 shots" in caplog.text


def test_loaders_alone_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="datamodule"):
        L.Trainer(max_epochs=0, callbacks=[DecafReport()], **QUIET).fit(Module(), loader())


def test_bad_settings_are_refused_together():
    with pytest.raises(ConfigurationError, match="2 problems"):
        DecafReport(kind="forest", shots=[0])
