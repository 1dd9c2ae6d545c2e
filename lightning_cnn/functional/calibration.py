"""Is a network as sure as it is right? Proper scores, calibration error, rejection, and the one number that mends it.

Everything a test report says comes from four numbers a picture (`Scores`), so reports of several processes are joined by concatenation.

Source: Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599 (calibration error, temperature); Brier 1950.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """One number a picture (b): the highest probability, whether it was right, and two proper scores (lower is better)."""

    confidence: Tensor
    correct: Tensor
    nll: Tensor
    brier: Tensor

    def summary(self, bins: int = 15) -> dict[str, float]:
        """Means over the pictures, and the expected calibration error."""
        return {
            "accuracy": self.correct.mean().item(),
            "ece": expected_calibration_error(self.confidence, self.correct, bins).item(),
            "brier": self.brier.mean().item(),
            "nll": self.nll.mean().item(),
        }


@dataclass(frozen=True)
class Reliability:
    """Pictures sorted into equal bins of confidence: how many, how sure, how right (NaN where a bin is empty)."""

    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def scores(log_prob: Float[Tensor, "b c"], label: Int64[Tensor, " b"]) -> Scores:
    """Confidence, correctness, negative log likelihood and Brier score of each picture; float32, or float64 when given."""
    log_prob = log_prob.to(torch.promote_types(log_prob.dtype, torch.float32))
    prob = log_prob.exp()
    confidence, answer = prob.max(-1)
    truth = label[:, None]
    # sum_c (p_c - [c = y])^2 without the one-hot matrix
    brier = prob.square().sum(-1) - 2 * prob.gather(-1, truth)[:, 0] + 1
    return Scores(confidence, (answer == label).to(prob.dtype), -log_prob.gather(-1, truth)[:, 0], brier)


def reliability(confidence: Float[Tensor, " b"], correct: Float[Tensor, " b"], bins: int = 15) -> Reliability:
    """Bins of equal width, closed on the right as in the paper."""
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins)
    mean = [torch.bincount(place, weights=value.double(), minlength=bins) / count for value in (confidence, correct)]
    return Reliability(count, *mean)


def expected_calibration_error(confidence: Float[Tensor, " b"], correct: Float[Tensor, " b"], bins: int = 15) -> Float[Tensor, ""]:
    """Mean distance of accuracy and confidence over the bins, weighted by their pictures."""
    found = reliability(confidence, correct, bins)
    gap = (found.accuracy - found.confidence).abs().nan_to_num()
    return (gap * found.count).sum() / found.count.sum()


def accuracy_by_rejection(
    confidence: Float[Tensor, " b"], correct: Float[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Share of pictures refused, least confident first, and the accuracy on those that are left."""
    order = confidence.argsort(descending=True, stable=True)
    kept = torch.arange(1, len(order) + 1, device=order.device)
    accuracy = correct[order].double().cumsum(0) / kept
    return (1 - kept / len(order)).flip(0).double(), accuracy.flip(0)


def fit_temperature(
    logits: Float[Tensor, "b c"],
    label: Int64[Tensor, " b"],
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    low: float = 1e-2,
    high: float = 1e2,
) -> float:
    """The T in [low, high] with the least negative log likelihood of `logits / T`.

    The loss is convex in 1 / T, so its slope is bisected: no step size, no failure to converge, 60 passes over the logits. `total`
    adds a number over processes that hold a part of the data each.
    """
    logits = logits.double()
    right = logits.gather(-1, label[:, None])[:, 0]
    cold, hot = 1 / high, 1 / low
    for _ in range(60):
        scale = (cold * hot) ** 0.5
        slope = total(((logits * scale).softmax(-1) * logits).sum(-1).sum() - right.sum())
        cold, hot = (cold, scale) if slope > 0 else (scale, hot)
    return 1 / (cold * hot) ** 0.5
