"""Pictures of how a network is wrong: what they show is what they were given."""

import numpy as np
import pytest
import torch

from lightning_cnn.functional.calibration import scores
from lightning_cnn.plot import confusion_matrix, rejection_curve, reliability_diagram


@pytest.fixture(scope="module")
def both():
    logits = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) * 2
    label = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    return {"single": scores((3 * logits).log_softmax(-1), label), "flip": scores(logits.log_softmax(-1), label)}


def test_confusion_matrix_writes_every_count(tmp_path):
    counts = np.array([[8, 2, 0], [0, 5, 0], [1, 0, 4]])
    made = confusion_matrix(counts, ["cat", "dog", "emu"])
    made.savefig(tmp_path / "picture.png")
    axes = made.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["1", "2", "4", "5", "8"]
    assert axes.get_title() == "accuracy 0.850, n = 20"
    np.testing.assert_allclose(axes.images[0].get_array(), counts / counts.sum(1, keepdims=True))


def test_confusion_matrix_takes_tensors_empty_rows_and_many_classes(tmp_path):
    made = confusion_matrix(torch.eye(100, dtype=torch.long) * (torch.arange(100) > 0), [f"class {k}" for k in range(100)])
    made.savefig(tmp_path / "picture.png")
    assert not made.axes[0].texts
    assert len(made.axes[0].get_xticks()) <= 50


def test_confusion_matrix_refuses_another_number_of_classes():
    with pytest.raises(ValueError, match=r"needs 2x2 counts for 2 classes; got shape \(3, 3\)"):
        confusion_matrix(np.zeros((3, 3)), ["cat", "dog"])


def test_reliability_diagram_and_rejection_curve_have_one_line_a_name(both, tmp_path):
    diagram, curve = reliability_diagram(both), rejection_curve(both)
    diagram.savefig(tmp_path / "a.png")
    curve.savefig(tmp_path / "b.png")
    for made, extra in ((diagram, 1), (curve, 0)):
        axes = made.axes[0]
        assert len(axes.lines) == 2 + extra
        assert [text.get_text().split(":")[0] for text in axes.get_legend().get_texts()] == ["single", "flip"]
    assert curve.axes[0].lines[0].get_ydata()[0] == pytest.approx(both["single"].correct.mean().item(), abs=1e-6)
