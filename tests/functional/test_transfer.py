"""The lecture's table, and the similarity that chooses its column."""

import re

import pytest

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.transfer import similarity_of, transfer_recipe


@pytest.mark.parametrize(
    ("images", "similarity", "name", "stages", "says"),
    [
        (100, "high", "linear", 1, "linear classifier on the top layer"),
        (100, "low", "stages", 1, "different stages"),
        (10_000, "high", "few_stages", 3, "finetune a few layers"),
        (10_000, "low", "all_stages", None, "larger number of layers"),
    ],
)
def test_the_four_cells_of_the_lecture(images, similarity, name, stages, says):
    recipe = transfer_recipe(images, similarity)
    assert (recipe.name, recipe.trained_stages) == (name, stages)
    assert says in recipe.reason


def test_images_are_counted_a_class():
    assert transfer_recipe(2000, "high", classes=2).name == "few_stages"
    assert transfer_recipe(2000, "high", classes=200).name == "linear"


def test_bad_arguments_are_refused_together():
    with pytest.raises(ConfigurationError, match=r"2 problems(?s:.)*images(?s:.)*'high' or 'low', got 'medium'"):
        transfer_recipe(0, "medium")


@pytest.mark.parametrize(
    ("accuracies", "answer", "why"),
    [
        ([0.5, 0.6, 0.8, 0.85], "high", "the top stage knows most"),
        ([0.5, 0.8, 0.7, 0.6], "low", r"stage 2 of 4 knows more \(0.800\) than the top"),
        ([0.1, 0.12, 0.15], "low", "far above chance"),
    ],
)
def test_similar_tasks_need_the_top(accuracies, answer, why):
    found, reason = similarity_of(accuracies, chance=0.1)
    assert found == answer
    assert re.search(why, reason)
