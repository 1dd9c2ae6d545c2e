"""The stages are stacked: the top of the last one is the length of a step."""

import pytest

from lightning_cnn.plot import step_timeline


def test_stages_are_stacked_and_free_ones_left_out():
    (axes,) = step_timeline({"data": [0.001, 0.003], "copy": [0.0, 0.0], "forward": [0.010, 0.020]}, width=4).axes
    low, top = (patch.get_data() for patch in axes.patches)
    assert top.values.tolist() == pytest.approx([11.0, 23.0])
    assert top.baseline.tolist() == low.values.tolist() == pytest.approx([1.0, 3.0])
    assert low.edges.tolist() == [0, 4, 8]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["forward 15.00 ms", "data 2.00 ms"]
