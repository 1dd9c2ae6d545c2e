"""Each figure shows what it was given."""

import numpy as np

from lightning_cnn import plot


def test_a_curve_a_number_of_shots_with_its_name_and_the_chance_line():
    figure = plot.layer_accuracy(["stem", "top"], {"all": ([0.5, 0.8], [0.01, 0.01]), "5": ([0.3, 0.6], [0.02, 0.02])}, chance=0.1)
    texts = {text.get_text().strip() for text in figure.axes[0].texts}
    assert {"all", "5", "chance"} <= texts
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["stem", "top"]


def test_a_row_a_query_with_frames_that_tell_right_from_wrong():
    picture = np.zeros((4, 4, 3), np.uint8)
    figure = plot.neighbours([picture] * 2, [[picture] * 3] * 2, [[True, False, True], [False] * 3])
    assert len(figure.axes) == 8
    frames = [ax.spines["top"].get_edgecolor() for ax in figure.axes]
    assert frames[1] == frames[3] != frames[2] == frames[5]


def test_a_projection_names_each_class():
    figure = plot.projection(np.random.default_rng(0).normal(size=(6, 2)), np.array([0, 1, 0, 1, 0, 1]), ["cat", "dog", "bird"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["cat", "dog"]


def test_names_of_classes_in_one_place_are_all_readable():
    points = np.array([[0.0, 0.0], [10.0, 10.0], [5.0, 5.0], [5.1, 5.0], [5.0, 5.1]])
    names = plot.projection(points, np.arange(5), ["a", "b", "cat", "dog", "bird"]).axes[0].texts
    heights = sorted(text.get_position()[1] for text in names)
    assert min(np.diff(heights)) > 0.4


def test_a_range_test_marks_its_suggestion():
    figure = plot.lr_range([1e-4, 1e-3, 1e-2], [2.0, 1.0, 3.0], suggestion=1e-3)
    assert figure.axes[0].get_xscale() == "log"
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.001"]
