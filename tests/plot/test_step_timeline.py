"""The stages are stacked: the top of the last one is the length of a step."""

import pytest

from lightning_cnn.plot import step_timeline


def test_stages_are_stacked_and_free_ones_left_out():
    (axes,) = step_timeline({"data": [0.001, 0.003], "copy": [0.0, 0.0], "forward": [0.010, 0.020]}, width=4).axes
    low, top = (patch.get_data() for patch in axes.patches)
    assert top.values.tolist() == pytest.approx([11.0, 23.0])
    assert top.baseline.tolist() == low.values.tolist() == pytest.approx([1.0, 3.0])
    assert low.edges.tolist() == [0, 4, 8]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["forward  15.00 ms, 88%", "data  2.00 ms, 12%"]


def test_a_stage_keeps_its_colour_whatever_others_cost():
    def colour(**stages):
        return [patch.get_facecolor() for patch in step_timeline({"data": [0.0], "copy": [0.0], **stages}).axes[0].patches]

    assert colour(data=[1.0], copy=[1.0])[1] == colour(copy=[1.0])[0]


def test_one_stall_does_not_flatten_the_picture_and_is_told():
    (axes,) = step_timeline({"data": [0.01] * 9 + [2.0]}).axes
    assert axes.get_ylim()[1] == pytest.approx(30.0)
    assert "the longest took 2,000 ms" in axes.texts[0].get_text()
    assert not step_timeline({"data": [0.01] * 9 + [0.02]}).axes[0].texts
