"""Rounding: to a neighbour, right on average, and the same bits from the formula and from every compiled kernel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional import counter, rounding
from lightning_cnn.functional.rounding import as_format, round_nearest, round_stochastic

FORMATS = ["bf16", "fp16", "e4m3", "e5m2", (6, 10), (2, 14), (1, 0)]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
floats = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20).map(
    lambda words: torch.tensor(words, dtype=torch.int32).view(torch.float32)
)


def words(x):
    return x.view(INTEGERS[x.dtype.itemsize])


def neighbours(x, format):
    """The largest number of the format that is at most x, and the smallest that is at least x, found without rounding.py."""
    target = as_format(format)
    if target.finest == target.coarsest:
        unit = 2.0**target.finest
        steps = x.double() / unit
        return tuple(whole.mul(unit).clamp(target.low, target.high) for whole in (steps.floor(), steps.ceil()))
    size = target.dtype.itemsize
    every = torch.arange(2 ** (8 * size), dtype=torch.int32).to(INTEGERS[size]).view(target.dtype).double()
    every = every[every.isfinite()].unique()
    below = every[(torch.searchsorted(every, x.double(), right=True) - 1).clamp(min=0)]
    above = every[torch.searchsorted(every, x.double()).clamp(max=len(every) - 1)]
    return below, above


def test_a_thousand_tiny_updates_move_the_weight():
    """Round-to-nearest stays at 1.0 for ever; stochastic rounding arrives near 1.1 (Gupta 2015). |z| < 4: 6e-5."""
    kept = lost = torch.ones(1000)
    for step in range(1000):
        kept = round_stochastic(kept + 1e-4, grid=2.0**-8, step=step)
        lost = round_nearest(lost + 1e-4, grid=2.0**-8)
    assert torch.equal(lost, torch.ones(1000))
    assert kept.mean() == pytest.approx(1.1, abs=4 * kept.std().item() / 1000**0.5)


@every_format
@given(x=floats, step=st.integers(0, 2**40))
@settings(max_examples=30)
def test_a_finite_number_goes_to_one_of_its_two_neighbours(format, x, step):
    x = x[x.isfinite()]
    below, above = neighbours(x, format)
    for rounded in (round_stochastic(x, format, step=step).double(), round_nearest(x, format).double()):
        assert bool(((rounded == below) | (rounded == above)).all())
        assert torch.equal(rounded.signbit() | (rounded == 0), x.signbit() | (rounded == 0))


@every_format
def test_numbers_of_the_format_stay_themselves(format):
    on_grid = round_nearest(torch.randn(1000) * 3, format)
    assert torch.equal(words(round_stochastic(on_grid.float(), format, step=3)), words(on_grid))
    assert torch.equal(words(round_nearest(on_grid.float(), format)), words(on_grid))


@every_format
@given(x=floats, key=st.integers(0, 2**63 - 1), index=st.sampled_from([0, 1, 7, 2**31 - 3, 2**32 - 3, 2**40 + 1, -5]))
@settings(max_examples=30)
def test_the_compiled_kernel_and_the_formula_give_the_same_bits(format, x, key, index):
    target = as_format(format)
    fast = rounding._on_cpu(x, target, key, index, torch.empty(x.shape, dtype=target.dtype))
    assert torch.equal(words(fast), words(rounding.formula(x, target, key, index)))


@pytest.mark.parametrize("rounded", [round_nearest, round_stochastic])
def test_special_numbers(rounded):
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    special = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 3.4e38, -3.4e38])
    for format in FORMATS:
        target = as_format(format)
        assert bool(rounded(nan, format).isnan().all())
        result = rounded(special, format).double()
        assert result[2:].tolist() == [0.0, 0.0, target.high, target.low]
        assert result[2:4].signbit().tolist() == [False, True]
        expected = {"e4m3": [math.nan] * 2, "fixed": [target.high, target.low]}
        kind = "fixed" if isinstance(format, tuple) else format
        assert str(result[:2].tolist()) == str(expected.get(kind, [math.inf, -math.inf]))
    assert rounded(special[:2], grid=1.0).tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("format", ["bf16", "fp16", "e5m2", (6, 10)], ids=str)
def test_nearest_is_torchs_own_within_the_range(format):
    x = torch.randn(10_000) * torch.exp2(torch.randint(-20, 4, (10_000,)).float())
    own = (x * 1024).round() / 1024 if isinstance(format, tuple) else x.to(as_format(format).dtype)
    inside = x.abs() < 30
    assert torch.equal(round_nearest(x, format)[inside].float(), own[inside].float())


@pytest.mark.parametrize("draws", [2**19, pytest.param(10_000_000, marks=pytest.mark.soak)], ids=["2^19", "10^7"])
@every_format
def test_the_mean_is_kept(format, draws):
    """Each of 3 values, normal, tiny and subnormal: |z| < 5 of the binomial error; a right source fails 3 * 6e-7 = 2e-6 a row."""
    target = as_format(format)
    tiny = 2.0 ** max(target.finest, -126)
    for value in (0.3, tiny * 0.37, -tiny * 1.21):
        x = torch.full((draws,), value)
        below, above = (side[0].item() for side in neighbours(x[:1], format))
        if below == above:
            continue
        exact = x[0].double().item()
        chance = (exact - below) / (above - below)
        ups = (round_stochastic(x, format, seed=1).double() > below).sum().item()
        assert abs(ups - draws * chance) < 5 * (draws * chance * (1 - chance)) ** 0.5, (value, ups / draws, chance)


@pytest.mark.parametrize("format", ["bf16", (6, 10)], ids=str)
@pytest.mark.parametrize(("step", "element", "stream"), [(1, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1)])
def test_noise_is_not_correlated_between_steps_elements_and_parameters(format, step, element, stream):
    """Correlation of ups over 2^18 pairs: |z| < 5, a chance of 6e-7 a row. Neighbours share a word of noise in bf16, not a bit."""
    n = 2**18
    x = torch.full((n + element,), 1.0 + 2.0**-7 * 0.5 if format == "bf16" else 2.0**-10 * 0.5)
    a = round_stochastic(x, format)[:n].float() > x[:n]
    b = round_stochastic(x, format, step=step, stream=stream)[element:].float() > x[element:]
    together = ((a.double() - 0.5) * (b.double() - 0.5)).sum().item()
    assert abs(together) / (n**0.5 / 4) < 5


def test_a_shard_draws_the_noise_of_its_place():
    x = torch.randn(12, 10)
    whole = round_stochastic(x, "bf16", step=2)
    assert torch.equal(round_stochastic(x[7:], "bf16", step=2, index=70), whole[7:])
    columns = torch.arange(120).view(12, 10)[:, 3:6]
    assert torch.equal(round_stochastic(x[:, 3:6], "bf16", step=2, index=columns), whole[:, 3:6])


def test_several_threads_change_no_bit(monkeypatch):
    from lightning_cnn.kernels import rounding as kernel

    x = torch.randn(5000)
    for format in ("bf16", (6, 10)):
        one = round_stochastic(x, format)
        monkeypatch.setattr(kernel, "PIECE", 999)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        assert torch.equal(round_stochastic(x, format), one)


def test_the_result_can_be_written_into_a_tensor_of_any_layout():
    x = torch.randn(2, 3, 4, 4)
    for out in (torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x).to(torch.bfloat16, memory_format=torch.channels_last)):
        assert round_stochastic(x, "bf16", out=out) is out
        assert torch.equal(out, round_stochastic(x, "bf16"))


@pytest.mark.parametrize("index", [0, 2**32 - 1500])
def test_fixed_point_is_rounded_in_place_to_the_same_bits(index):
    x = torch.randn(3000)
    apart = round_stochastic(x, (6, 10), index=index)
    assert torch.equal(apart, rounding.formula(x, as_format((6, 10)), counter.key(0, "rounding", 0, 0), index))
    assert torch.equal(round_stochastic(x, (6, 10), index=index, out=x), apart)


def test_a_compiled_step_gives_the_same_bits_and_is_compiled_once():
    @torch.compile(fullgraph=True, dynamic=True)
    def update(weight, gradient, step):
        return round_stochastic(weight.float() - 1e-3 * gradient, "bf16", step=step, stream="w")

    weight, gradient = torch.randn(1000).bfloat16(), torch.randn(1000)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            expected = round_stochastic(weight.float() - 1e-3 * gradient, "bf16", step=step, stream="w")
            assert torch.equal(update(weight, gradient, torch.tensor(step)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give a format or a grid"),
        ({"format": "bf16", "grid": 0.5}, "one of the two"),
        ({"format": "fixed"}, "No number format 'fixed'"),
        ({"format": (0, 4)}, "integer_bits must be 1 or more"),
        ({"format": (20, 8)}, "both together at most 24"),
        ({"grid": 0.3}, "must be a power of two"),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        round_stochastic(torch.zeros(1), **arguments)


def test_no_gradient_flows():
    assert not round_stochastic(torch.zeros(1, requires_grad=True), "bf16").requires_grad


def test_triton_agrees_under_the_interpreter(triton_interpreter):
    triton_interpreter(
        """
        import torch
        from lightning_cnn.functional import counter, rounding
        from lightning_cnn.kernels import rounding_triton

        words = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000, -0x80000000, 0x7F7FFFFF, 1], dtype=torch.int32)
        x = torch.cat([words.view(torch.float32), torch.randn(1500) * torch.exp2(torch.randint(-40, 40, (1500,)).float())])
        for format in ("bf16", "fp16", "e5m2", (6, 10)):
            target, key = rounding.as_format(format), counter.key(1, "a")
            for index in (0, 3, 2**33 + 1):
                out = torch.empty(x.shape, dtype=torch.bfloat16 if format == "bf16" else torch.float32)
                rounding_triton.launch(x, key, index, format == "bf16", *rounding._range(target), out)
                expected = rounding.formula(x, target, key, index)
                out, expected = out.float(), expected.float()
                same = ((out == expected) & (out.signbit() == expected.signbit())) | (expected.isnan() & out.isnan())
                assert same.all(), (format, index, x[~same])
        """
    )


def test_no_generator_is_touched():
    before = torch.random.get_rng_state()
    round_stochastic(torch.ones(9), "bf16")
    assert torch.equal(before, torch.random.get_rng_state())
