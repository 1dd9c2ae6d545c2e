"""Linear classifiers on features: how much a layer knows about a task.

Source: Donahue et al. 2014, "DeCAF", arXiv:1310.1531, section 4; Alain & Bengio 2016, arXiv:1610.01644 (probes at every layer).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cnn.errors import ConfigurationError, DataError, raise_all
from lightning_cnn.functional import counter

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5  # one split of 2,400 samples chose a C ten times too large; five folds found the best one


@dataclass(frozen=True)
class Probe:
    """`accuracy` on the test set, the inverse regularisation `C` that the training data chose, and the answers."""

    accuracy: float
    C: float
    predicted: np.ndarray
    classifier: object


@dataclass(frozen=True)
class LinearForm:
    """A fitted probe as tensors: `weight @ (x - mean) / std + bias` are the logits of `classes`."""

    classes: tuple[int, ...]
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor


def linear_form(features: Tensor, labels: Tensor, *, strengths: Sequence[float] = (1e-3, 1e-2), seed: int = 0) -> LinearForm:
    """Logistic regression on standardised features, as tensors to start a layer from; of two classes each gets half the logit."""
    x, y = _checked(features, labels)
    scaler, model = _classifier("logistic", _chosen(x, y, "logistic", strengths, seed)).fit(x, y)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:
        weight, bias = (np.concatenate([-part, part]) / 2 for part in (weight, bias))
    numbers = (torch.from_numpy(np.asarray(part)).float() for part in (scaler.mean_, scaler.scale_, weight, bias))
    return LinearForm(tuple(model.classes_.tolist()), *numbers)


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    kind: str = "logistic",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> Probe:
    """Fit multinomial logistic regression ("logistic") or a linear support vector machine ("svm") on standardised features.

    The regularisation is chosen on held-out parts of the training data, then the classifier is fitted to all of them.
    """
    raise_all([f"kind must be 'logistic' or 'svm', got {kind!r}"] if kind not in ("logistic", "svm") else [])
    if not strengths:
        raise ConfigurationError("strengths must not be empty.")
    x, y = _checked(train, train_labels)
    best = _chosen(x, y, kind, strengths, seed)
    classifier = _classifier(kind, best).fit(x, y)
    predicted = classifier.predict(test.flatten(1).double().numpy())
    return Probe(float((predicted == test_labels.numpy()).mean()), best, predicted, classifier)


def shots(labels: Tensor, per_class: int | None, seed: int = 0) -> Tensor:
    """Indices of `per_class` random samples of each class (None: all), nested: 5 shots are among the 20 of the same seed."""
    order = counter.permutation(counter.key(seed, "shots"), len(labels))
    if per_class is None:
        return order
    taken: set[int] = set()
    for label in labels.unique().tolist():
        mine = order[labels[order] == label]
        if len(mine) < per_class:
            raise DataError(f"class {label} has {len(mine)} samples, {per_class} were asked for.")
        taken.update(mine[:per_class].tolist())
    return order[[position for position, index in enumerate(order.tolist()) if index in taken]]


def _checked(features: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    x, y = features.flatten(1).double().numpy(), labels.numpy()
    if len(set(y.tolist())) < 2:
        raise DataError(f"a probe needs at least two classes, the training labels hold {sorted(set(y.tolist()))}.")
    return x, y


def _chosen(x: np.ndarray, y: np.ndarray, kind: str, strengths: Sequence[float], seed: int) -> float:
    if len(strengths) == 1:
        return strengths[0]
    folds = _folds(x, y, seed)
    if not folds:
        return strengths[len(strengths) // 2]
    scores = [sum(_classifier(kind, C).fit(x[a], y[a]).score(x[b], y[b]) for a, b in folds) for C in strengths]
    return strengths[scores.index(max(scores))]  # of equals the most regularised


def _folds(x: np.ndarray, y: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedKFold

    rarest = int(np.unique(y, return_counts=True)[1].min())
    if rarest < 2:
        return []
    return list(StratifiedKFold(min(FOLDS, rarest), shuffle=True, random_state=seed).split(x, y))


def _classifier(kind: str, C: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    model = LogisticRegression(C=C, max_iter=500, tol=1e-3) if kind == "logistic" else LinearSVC(C=C, max_iter=2000)
    return make_pipeline(StandardScaler(), model)
