"""The picture of a report."""

from types import SimpleNamespace

from lightning_cnn.plot import conv_report


def test_one_bar_a_timed_pass_and_the_speed_up_where_something_was_switched(tmp_path):
    rows = [
        SimpleNamespace(layer="a", role="forward", algorithm="winograd4", seconds=0.001, speedup=2.0),
        SimpleNamespace(layer="a", role="input", algorithm="default", seconds=0.002, speedup=1.0),
        SimpleNamespace(layer="b", role="", algorithm="default", seconds=None, speedup=None),
    ]
    figure = conv_report(rows)
    figure.savefig(tmp_path / "report.png")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a forward", "a input"]
    assert [text.get_text() for text in axes.texts] == [" 2.0x"]


def test_an_empty_report_is_an_empty_picture():
    assert conv_report([]).axes
