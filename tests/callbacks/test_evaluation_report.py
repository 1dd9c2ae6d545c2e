"""One test run compares ways of testing: figures are those of the ways alone, costs are counted, files are written."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.callbacks import EvaluationReport, HorizontalFlip, Marginalize, TemperatureScaling
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.calibration import scores

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
X = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 3))

    def forward(self, image):
        return self.net(image)

    def test_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)


def evaluated(folder, compare, **options):
    report = EvaluationReport(compare=compare, folder=str(folder))
    trainer = L.Trainer(accelerator="cpu", **QUIET, callbacks=[report], **options)
    result = trainer.test(Model(), DataLoader(TensorDataset(X, Y), batch_size=16), verbose=False)
    return report, result


def test_each_row_is_what_that_way_of_testing_gives_alone(tmp_path):
    report, result = evaluated(tmp_path, {"flip": ["flip"], "mc": [{"mc_dropout": 10}], "both": ["flip", {"mc_dropout": 10}]})
    model = Model().eval()
    with torch.no_grad():
        plain = model(X)
        flip = ((plain.softmax(-1) + model(X.flip(-1)).softmax(-1)) / 2).log()
    for name, log_prob in (("single", plain.log_softmax(-1)), ("flip", flip)):
        expected = scores(log_prob, Y).summary()
        assert {column: report.table[name][column] for column in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert result[0]["loss"] == pytest.approx(F.cross_entropy(plain, Y).item(), rel=1e-5), "the test itself is untouched"
    assert report.table["flip"]["cost"] == 2
    late = (8 * 27 * 16 + 10 * 128 * 3) / (8 * 27 * 16 + 128 * 3)
    assert report.table["mc"]["cost"] == pytest.approx(late)
    assert report.table["both"]["cost"] == pytest.approx(2 * late)
    assert "| flip |" in (tmp_path / "evaluation.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.md", "reliability.png", "rejection.png"}


@pytest.mark.forks
def test_two_processes_write_the_report_of_one(tmp_path):
    evaluated(tmp_path / "one", {"mc": [{"mc_dropout": 4}]})
    evaluated(tmp_path / "two", {"mc": [{"mc_dropout": 4}]}, strategy="ddp_fork", devices=2)
    assert (tmp_path / "two" / "evaluation.md").read_text() == (tmp_path / "one" / "evaluation.md").read_text()


def test_what_cannot_work_is_named_with_its_row(tmp_path):
    with pytest.raises(ConfigurationError, match="mc: MCDropConnect found no DropConnect layer"):
        evaluated(tmp_path, {"mc": [{"mc_dropconnect": 3}], "flip": [HorizontalFlip()]})
    with pytest.raises(ConfigurationError, match="must not contain 'single'"):
        EvaluationReport(compare={"single": []})


def test_a_changed_forward_is_refused():
    report = EvaluationReport(compare={"flip": ["flip"]})
    trainer = L.Trainer(accelerator="cpu", **QUIET, callbacks=[Marginalize(views=["flip"]), TemperatureScaling(), report])
    with pytest.raises(ConfigurationError, match=r"(?s)Marginalize changes the forward.*TemperatureScaling changes the forward"):
        trainer.test(Model(), DataLoader(TensorDataset(X, Y), batch_size=16), verbose=False)
