"""The table is there after the first batch, in the logger's folder, and taken of one picture."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import ArchitectureSummary
from lightning_cnn.conv import swap
from lightning_cnn.conv._swap import tuners


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(callback, model=None, **options):
    data = [{"image": torch.rand(4, 3, 8, 8), "label": torch.tensor([0, 1, 0, 1])}] * 2
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], **quiet, **options).fit(
        model or Net(), DataLoader(data, batch_size=None)
    )
    return callback


def test_the_table_and_the_picture_are_in_the_logger_s_folder(tmp_path):
    callback = fitted(ArchitectureSummary(), logger=CSVLogger(tmp_path, name="", version=""), precision="bf16-mixed")
    assert (tmp_path / "architecture.txt").read_text() == f"{callback.found}\n"
    assert (tmp_path / "architecture.png").read_bytes()[:4] == b"\x89PNG"
    assert callback.found["net.0"].output == (1, 8, 6, 6)
    assert callback.found.multiply_adds == 36 * 8 * 27 + 16


def test_without_a_logger_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fitted(ArchitectureSummary(), logger=False).found is not None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_its_own(tmp_path):
    fitted(ArchitectureSummary(folder=str(tmp_path / "here")), logger=False)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["architecture.png", "architecture.txt"]


def test_swapped_convolutions_are_counted_as_torch_computes_them_and_measured_for_no_new_shape():
    """The pass over one picture must not set the tuner to work."""
    model = swap(Net(), "auto", cache=None, max_error=0.03)  # a tuner of this test's own
    alone, together = (fitted(ArchitectureSummary(), logger=False, model=each).found for each in (Net(), model))
    assert together.multiply_adds == alone.multiply_adds
    assert together["net.0"].seen == alone["net.0"].seen
    assert together["net.0"].kind == "SwappedConv2d"
    (tuner,) = tuners(model)
    assert {call.x[0] for call in tuner.decisions} == {4}
