"""The order of samples, its shares and its position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cnn.data._order import Order, shards_at_once, shuffled, windowed
from lightning_cnn.errors import CheckpointError, ConfigurationError


def order(samples=23, batch_size=4, **options):
    return Order(samples, batch_size, draw=shuffled(samples), **options)


def ranks_of(samples, batch_size, ranks, **options):
    return [order(samples, batch_size, num_replicas=ranks, rank=rank, **options).start()[1] for rank in range(ranks)]


def test_an_epoch_is_a_permutation_and_the_next_is_another():
    first, second = order(seed=5).indices(0), order(seed=5).indices(1)
    assert sorted(first) == sorted(second) == list(range(23))
    assert list(first) != list(second)
    assert list(first) == list(order(seed=5).indices(0)) != list(order(seed=6).indices(0))


def test_without_a_draw_the_order_is_the_datasets():
    assert np.concatenate(Order(10, 4).start()[1]).tolist() == list(range(10))


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 200), batch_size=st.integers(1, 9), ranks=st.integers(1, 8))
def test_every_sample_comes_exactly_once_on_any_number_of_ranks(samples, batch_size, ranks):
    if samples < ranks:
        return
    shares = ranks_of(samples, batch_size, ranks)
    assert sorted(np.concatenate([np.concatenate(share) for share in shares])) == list(range(samples))
    assert {len(share) for share in shares} == {len(order(samples, batch_size, num_replicas=ranks, rank=0))}
    sizes = [len(batch) for share in shares for batch in share]
    assert 1 <= min(sizes) and max(sizes) <= batch_size + 2
    if batch_size > 1 and samples >= 2 * ranks:
        assert min(sizes) >= 2


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(8, 200), batch_size=st.integers(1, 4), ranks=st.sampled_from([1, 2]))
def test_dropping_the_tail_leaves_full_batches_of_distinct_samples(samples, batch_size, ranks):
    delivered = [batch for share in ranks_of(samples, batch_size, ranks, drop_last=True) for batch in share]
    assert {len(batch) for batch in delivered} == {batch_size}
    assert len(set(np.concatenate(delivered))) == samples // (batch_size * ranks) * batch_size * ranks


@pytest.mark.parametrize("samples", [48, 54])
def test_the_ranks_batches_laid_end_to_end_are_the_batch_of_one_process(samples):
    (one,), (a, b, c) = ranks_of(samples, 12, 1), ranks_of(samples, 4, 3)
    assert [batch.tolist() for batch in one] == [np.concatenate(parts).tolist() for parts in zip(a, b, c, strict=True)]


def deliver(order, passes, stop=None):
    """The batches of `passes` passes, or the first `stop` of them."""
    delivered = []
    for _ in range(passes):
        for batch in order.start()[1]:
            if len(delivered) == stop:
                return delivered
            order.batch += 1
            delivered.append(batch.tolist())
    return delivered


@pytest.mark.parametrize("stop", range(13))
def test_a_new_order_that_loads_the_position_goes_on_at_the_next_batch(stop):
    """6 batches a pass: `stop` meets both sides of the end of an epoch."""
    whole, begun, resumed = deliver(order(), 4), order(), order()
    before = deliver(begun, 3, stop)
    resumed.load_state_dict(begun.state_dict())
    assert before + deliver(resumed, 2) == whole[: stop - stop % 6 + 12]


def test_a_pass_that_is_abandoned_is_followed_by_the_next_one():
    begun = order()
    begun.start()
    begun.batch += 2
    assert begun.start()[0] == 1


def test_the_trainers_epoch_wins_unless_it_is_the_interrupted_one():
    resumed = order()
    resumed.load_state_dict(order(batch=3).state_dict())
    resumed.set_epoch(0)
    assert len(resumed.start()[1]) == len(order()) - 3
    resumed.load_state_dict(order(batch=3).state_dict())
    resumed.set_epoch(1)
    assert [batch.tolist() for batch in resumed.start()[1]] == [batch.tolist() for batch in order(epoch=1).start()[1]]


def test_going_on_inside_an_epoch_of_another_order_is_refused():
    other = Order(24, 8, seed=1)
    other.load_state_dict(order(batch=2).state_dict())
    with pytest.raises(CheckpointError, match=r"seed was 0 and is 1, samples was 23 and is 24, global_batch was 4 and is 8"):
        other.start()


def test_another_order_may_start_at_the_end_of_an_epoch():
    other = Order(24, 8, seed=1)
    other.load_state_dict(order(batch=6).state_dict())
    assert other.start()[0] == 2


def test_what_cannot_work_is_refused_in_one_message():
    with pytest.raises(ConfigurationError, match=r"3 problems:(.|\n)*batch_size(.|\n)*empty(.|\n)*num_replicas"):
        Order(0, 0, rank=1)
    with pytest.raises(ConfigurationError, match=r"3 samples make no batch of 4 on each of 1 ranks"):
        len(Order(3, 4, drop_last=True))
    with pytest.raises(ConfigurationError, match=r"3 samples make no batch of 1 on each of 4 ranks"):
        len(Order(3, 1, num_replicas=4, rank=0))


@settings(max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    window=st.integers(1, 8),
    batch_size=st.integers(1, 9),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_no_batch_lies_in_the_use_of_more_shards_than_foretold(lengths, window, batch_size, ranks, seed):
    if sum(lengths) < ranks:
        return
    starts, draw = np.cumsum([0, *lengths]), windowed(lengths, window)
    for rank in range(ranks):
        _, plan = Order(sum(lengths), batch_size, seed, draw=draw, num_replicas=ranks, rank=rank).start()
        needs = [set(np.searchsorted(starts, indices, side="right")) for indices in plan]
        live = [set().union(*needs[: k + 1]) & set().union(*needs[k:]) for k in range(len(plan))]
        assert max(map(len, live)) <= shards_at_once(lengths, window, batch_size + 2)


def test_a_long_batch_lies_in_many_shards_and_a_short_one_in_two():
    assert shards_at_once([10] * 20, 1, 11) == 2
    assert shards_at_once([10] * 20, 1, 12) == 3
    assert shards_at_once([10] * 20, 4, 12) == 8
    assert shards_at_once([10, 10, 1], 1, 5) == 3
    assert shards_at_once([10] * 20, 20, 12) == 20
