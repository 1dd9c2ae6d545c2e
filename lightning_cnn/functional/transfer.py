"""The lecture's rule for transfer learning: how much to finetune, from how much data there is and how alike it is.

Source: CS231n 2016, lecture 11, "CNNs in practice: transfer learning"; Yosinski et al. 2014, arXiv:1411.1792.
"""

from dataclasses import dataclass

from lightning_cnn.errors import raise_all

FEW = 50  # pictures a class: the lecture gives no number


@dataclass(frozen=True)
class Recipe:
    """What to train: `trained_stages` from the head (None: all), at learning-rate multiples `factors` from the head downwards."""

    name: str
    probe: str | None
    trained_stages: int | None
    factors: tuple[float, ...]
    reason: str


RULES = {
    ("few", "high"): Recipe(
        "linear", "last", 1, (1.0,),
        "little data that look like the pretraining set: a linear classifier on the top layer; finetuning would overfit",
    ),
    ("few", "low"): Recipe(
        "stages", "every", 1, (1.0,),
        "little data that look different: you are in trouble; try linear classifiers from different stages, since lower ones are more "
        "generic",
    ),
    ("many", "high"): Recipe(
        "few_stages", None, 3, (1.0, 0.1, 0.01),
        "quite a lot of data that look alike: finetune a few layers, the top at 1/10 and the next at 1/100 of the learning rate",
    ),
    ("many", "low"): Recipe(
        "all_stages", None, None, (1.0, 0.1, 0.1),
        "quite a lot of data that look different: finetune a larger number of layers, at 1/10 of the learning rate",
    ),
}  # fmt: skip


def transfer_recipe(images: int, similarity: str, classes: int = 10) -> Recipe:
    """What the lecture advises for `images` labelled pictures in `classes` classes, of "high" or "low" similarity.

    >>> transfer_recipe(200, "high").name, transfer_recipe(24_000, "low").name
    ('linear', 'all_stages')
    """
    problems = [f"images must be at least 1, got {images}"] if images < 1 else []
    problems += [f"classes must be at least 1, got {classes}"] if classes < 1 else []
    problems += [f"similarity must be 'high' or 'low', got {similarity!r}"] if similarity not in ("high", "low") else []
    raise_all(problems)
    return RULES["few" if images / classes < FEW else "many", similarity]


def similarity_of(accuracies: list[float], chance: float) -> tuple[str, str]:
    """ "high" or "low", and why, from the accuracy of a linear probe at each stage from stem to top.

    Features of a similar task grow more useful up to the top. Where the top is behind a lower stage, or no stage is far above chance,
    the top has specialised on something else.
    """
    top, best = accuracies[-1], max(accuracies)
    lower = accuracies.index(best)
    if best - chance < 0.2 * (1 - chance):
        return "low", f"no stage is far above chance ({best:.3f} against {chance:.3f})"
    if top < best - 0.02:
        return "low", f"stage {lower + 1} of {len(accuracies)} knows more ({best:.3f}) than the top ({top:.3f})"
    return "high", f"the top stage knows most ({top:.3f}; chance {chance:.3f}, first stage {accuracies[0]:.3f})"
