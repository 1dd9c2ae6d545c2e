"""The work-stealing sampler without processes: several samplers, one store, any interleaving."""

import heapq
from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from lightning_cnn.strategy._stealing import StealingLane, StealingSampler, loads_a_plan, plan


class Crew:
    """Stands for a Team: a store, a rank, and who is lost."""

    def __init__(self, store, rank, size):
        self.store, self.rank, self.size, self.lost = store, rank, size, []


def samplers(ranks, length=20, batch_size=3, epoch=0, **kwargs):
    store = HashStore()
    store.set_timeout(timedelta(seconds=2))
    options = {"seed": 0, "shuffle": True, "drop_last": False, "name": "steal"} | kwargs
    crews = [Crew(store, rank, ranks) for rank in range(ranks)]
    return [StealingSampler(length=length, batch_size=batch_size, team=crew, epoch=lambda: epoch, **options) for crew in crews]


def drain(iterators, crew, order):
    """Take batches in the given order of ranks, then whatever is left; every batch is finished at once."""
    taken = {rank: [] for rank in range(len(crew))}
    for rank in [*order, *(r for _ in range(100) for r in range(len(crew)))]:
        batch = next(iterators[rank], None)
        if batch is not None:
            taken[rank].append(batch)
            crew[rank].finished()
    return taken


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(1, 4), length=st.integers(4, 40), batch_size=st.integers(1, 7), order=st.lists(st.integers(0, 3), max_size=20))
def test_each_sample_goes_to_exactly_one_rank_and_every_rank_has_some(ranks, length, batch_size, order):
    crew = samplers(ranks, length, batch_size)
    taken = drain([iter(s) for s in crew], crew, [r for r in order if r < ranks])
    assert sorted(i for batches in taken.values() for batch in batches for i in batch) == list(range(length))
    assert all(taken.values())


def test_the_fast_rank_takes_more():
    crew = samplers(2, length=40, batch_size=2)
    iterators = [iter(s) for s in crew]
    taken = drain(iterators, crew, [0, 0, 0, 1] * 10)
    assert len(taken[0]) == 15
    assert len(taken[1]) == 5


def train(crew, paces, ahead):
    """Ranks of these seconds a batch, each asking `ahead` of its training, on one clock; batches by rank, and when the last is done."""
    iterators, taken, clock = [iter(s) for s in crew], [[] for _ in crew], []
    for _ in range(1 + ahead):
        for rank, iterator in enumerate(iterators):
            taken[rank] += [batch] if (batch := next(iterator, None)) else []
    for rank, seconds in enumerate(paces):
        heapq.heappush(clock, (seconds, rank))
    while clock:
        now, rank = heapq.heappop(clock)
        crew[rank].finished()
        taken[rank] += [batch] if (batch := next(iterators[rank], None)) else []
        if crew[rank]._hand:
            heapq.heappush(clock, (now + paces[rank], rank))
    return taken, now


@settings(max_examples=30, deadline=None)
@given(paces=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), length=st.integers(4, 60), ahead=st.integers(0, 5))
def test_who_asks_ahead_at_any_pace_leaves_no_sample_out(paces, length, ahead):
    taken, _ = train(samplers(len(paces), length, 2), paces, ahead)
    assert sorted(i for batches in taken for batch in batches for i in batch) == list(range(length))


@pytest.mark.parametrize("ahead", [1, 8])
def test_a_slow_rank_takes_no_batch_that_the_others_would_have_to_wait_for(ahead):
    """3x slower: the ideal is 75 of 100 batches in 75 s; asking ahead regardless would end 3 * ahead seconds later."""
    taken, seconds = train(samplers(2, 200, 2), [1.0, 3.0], ahead)
    assert [len(batches) for batches in taken] == [75, 25]
    assert seconds == 75


def test_the_order_is_a_function_of_seed_and_epoch():
    first, again, other = (next(iter(samplers(1, epoch=e)[0])) for e in (0, 0, 1))
    assert first == again != other


def test_a_dead_ranks_batches_come_back():
    """Rank 1 holds two batches when it dies: one claimed from the counter, one its own first."""
    crew = samplers(2, length=20, batch_size=2)
    iterators = [iter(s) for s in crew]
    held = [next(iterators[1]), next(iterators[1])]
    crew[0].team.lost.append(1)
    seen = []
    for batch in iterators[0]:
        seen.append(batch)
        crew[0].finished()
    assert sorted(i for batch in seen for i in batch) == list(range(20))
    assert all(batch in seen for batch in held)


def test_a_rank_dead_before_the_epoch_leaves_nothing_out():
    crew = samplers(3, length=20, batch_size=2)
    crew[0].team.lost.extend([1, 2])
    seen = []
    for batch in crew[0]:
        seen.extend(batch)
        crew[0].finished()
    assert sorted(seen) == list(range(20))


def test_a_batch_lost_at_the_end_of_an_epoch_comes_back_in_the_next():
    crew = samplers(2, length=8, batch_size=2)
    iterators = [iter(s) for s in crew]
    held = next(iterators[1])
    for _ in iterators[0]:
        crew[0].finished()
    crew[0].team.lost.append(1)
    second = []
    for batch in crew[0]:
        second.append(batch)
        crew[0].finished()
    assert len(second) == 5
    assert held in second


def test_what_a_slow_rank_left_to_one_who_then_dies_comes_back_in_the_next_epoch():
    crew = samplers(2, length=40, batch_size=2)
    slow, fast = (iter(s) for s in crew)
    next(slow)
    for _ in range(15):
        next(fast)
        crew[1].finished()
    crew[0].finished()
    assert next(slow, None) is None
    crew[0].team.lost.append(1)
    second = []
    for batch in crew[0]:
        second.append(batch)
        crew[0].finished()
    assert len(second) == 20 + 4


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_resume_in_mid_epoch_hands_out_the_rest_to_any_number_of_ranks(ranks):
    crew = samplers(2)
    iterators = [iter(s) for s in crew]
    done = []
    for rank in (0, 1, 0):
        done.extend(next(iterators[rank]))
        crew[rank].finished()
    next(iterators[1])  # in hand, not trained on
    state = crew[0].state_dict()
    fresh = samplers(ranks, name="resumed")
    for sampler in fresh:
        sampler.load_state_dict(state)
    taken = drain([iter(s) for s in fresh], fresh, [])
    rest = [i for batches in taken.values() for batch in batches for i in batch]
    assert sorted(rest + done) == list(range(20))
    assert fresh[0].state_dict()["done"] == list(range(7))


def test_a_finished_epochs_state_does_not_shorten_the_next():
    sampler = samplers(1)[0]
    sampler.load_state_dict({"epoch": 0, "done": list(range(7))})
    sampler._which_epoch = lambda: 1
    assert sorted(i for batch in sampler for i in batch) == list(range(20))


def test_fewer_samples_than_ranks_repeat_the_last():
    assert plan(range(2), batch_size=2, total=1, done=frozenset(), ranks=3) == {0: [0], 1: [1], 2: [1]}


def test_a_loader_that_loads_any_plan_is_stolen_from_in_its_own_order():
    """This package's loaders: the batches of both ranks are one epoch of `order`, read with that epoch's noise."""
    from lightning_cnn.data import Resumable

    lane = Resumable([(torch.full((1,), float(i)), i) for i in range(12)], batch_size=2, seed=3)
    crew = samplers(2, 12, 2, epoch=1, order=lane.order.indices)
    batches, taken = [iter(StealingLane(lane, s)) for s in crew], []
    for rank in (0, 1, 0, 0, 1, 0):
        taken.append(next(batches[rank]).index.tolist())
        crew[rank].finished()
    assert sorted(map(tuple, taken)) == sorted(map(tuple, lane.order.indices(1).reshape(-1, 2).tolist()))
    assert loads_a_plan(lane)
    assert not loads_a_plan([1, 2])
