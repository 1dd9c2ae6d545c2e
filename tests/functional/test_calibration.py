"""Calibration agrees with torchmetrics, and one temperature mends a network that is too sure."""

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_cnn.functional.calibration import (
    accuracy_by_rejection,
    expected_calibration_error,
    fit_temperature,
    reliability,
    scores,
)


def guesses(n=2000, classes=5, sharpness=1.0):
    """Logits whose true labels are drawn from their own softmax: calibrated at sharpness 1 by construction."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, classes, generator=generator)
    label = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits * sharpness, label


def test_scores_are_the_textbooks():
    logits, label = guesses()
    found = scores(logits.log_softmax(-1), label)
    torch.testing.assert_close(found.nll.mean(), F.cross_entropy(logits, label))
    torch.testing.assert_close(found.brier, (logits.softmax(-1) - F.one_hot(label, 5)).square().sum(-1))
    assert found.correct.mean() == (logits.argmax(-1) == label).float().mean()


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_agrees_with_torchmetrics(bins):
    logits, label = guesses(sharpness=2.0)
    found = scores(logits.log_softmax(-1), label)
    theirs = multiclass_calibration_error(logits.softmax(-1), label, num_classes=5, n_bins=bins)
    assert expected_calibration_error(found.confidence, found.correct, bins).item() == pytest.approx(theirs.item(), abs=1e-5)


def test_every_picture_falls_into_one_bin_even_at_the_ends():
    confidence = torch.tensor([0.0, 1e-9, 0.1, 0.5, 1.0])
    found = reliability(confidence, torch.ones(5), bins=10)
    assert found.count.tolist() == [3, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert found.accuracy[1].isnan()


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_temperature_undoes_a_known_sharpening(sharpness):
    """The standard error of 1/T is 1 / sqrt(n * variance of the loss's slope), about 0.03 of it here: five of them."""
    logits, label = guesses(sharpness=sharpness)
    temperature = fit_temperature(logits, label)
    assert temperature / sharpness == pytest.approx(1.0, abs=0.15)
    for other in (0.98 * temperature, 1.02 * temperature):
        assert F.cross_entropy(logits.double() / temperature, label) < F.cross_entropy(logits.double() / other, label)


def test_a_temperature_out_of_bounds_stops_at_the_bound():
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(1e-2, rel=1e-6), "always right: as sure as allowed"
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(1e2, rel=1e-6), "always wrong: as unsure as allowed"


def test_parts_of_the_data_with_added_slopes_give_the_temperature_of_the_whole():
    logits, label = guesses(sharpness=3.0)
    whole = fit_temperature(logits, label)
    half = fit_temperature(logits[:1000].repeat(2, 1), label[:1000].repeat(2))
    assert fit_temperature(logits[:1000], label[:1000], total=lambda slope: 2 * slope) == pytest.approx(half, rel=1e-9)
    assert whole != pytest.approx(half, rel=1e-6)


def test_refusing_the_least_confident_first():
    rejected, accuracy = accuracy_by_rejection(torch.tensor([0.9, 0.2, 0.6, 0.4]), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert rejected.tolist() == pytest.approx([0, 0.25, 0.5, 0.75])
    assert accuracy.tolist() == pytest.approx([0.5, 2 / 3, 1.0, 1.0])
