"""The picture of a report."""

from types import SimpleNamespace

from lightning_cnn.plot import conv_report


def row(layer, role, algorithm, seconds, speedup, shape="1x3x8x8 * 4x3x3x3 /1"):
    return SimpleNamespace(layer=layer, role=role, algorithm=algorithm, seconds=seconds, speedup=speedup, shape=shape)


def test_one_bar_a_timed_pass_and_the_speed_up_where_something_was_switched(tmp_path):
    rows = [
        row("a", "forward", "winograd4", 0.001, 2.0),
        row("a", "input", "default", 0.002, 1.0),
        row("b", "", "default", None, None),
    ]
    figure = conv_report(rows)
    figure.savefig(tmp_path / "report.png")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a forward", "a input"]
    assert [text.get_text() for text in axes.texts] == [" 2.0x"]


def test_bars_of_one_layer_that_met_two_shapes_say_which():
    rows = [row("a", "forward", "default", 0.001, 1.0, shape) for shape in ("32x3x8x8 * 4x3x3x3 /1", "5x3x8x8 * 4x3x3x3 /1")]
    (axes,) = conv_report([*rows, row("b", "forward", "default", 0.001, 1.0)]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a forward 32x3x8x8", "a forward 5x3x8x8", "b forward"]


def test_an_empty_report_is_an_empty_picture():
    assert conv_report([]).axes
