"""The two rules, at their corners."""

import pytest

from lightning_cnn.functional.scaling import lr_factor, staleness_factor


@pytest.mark.parametrize("rule", ["linear", "sqrt", None])
def test_one_worker_changes_nothing(rule):
    assert lr_factor(1, rule) == 1.0


def test_an_unknown_rule_is_an_error():
    with pytest.raises(KeyError):
        lr_factor(2, "cubic")


def test_older_gradients_weigh_less_and_fresh_ones_fully():
    factors = [staleness_factor(age) for age in range(6)]
    assert factors[:2] == [1.0, 1.0]
    assert factors == sorted(factors, reverse=True)
