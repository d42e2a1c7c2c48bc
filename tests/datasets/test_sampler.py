"""Which records make up a batch: every one once, whatever the ranks, and as a function of the step alone."""

import random
import time

import pytest

from openrlhf.datasets.sampler import WINDOW, BatchPlan

LENGTHS = [random.Random(i).randrange(10, 500) for i in range(1000)]
SIZES = [(20, 8), (16, 8), (8, 8), (3, 8), (1, 1), (23, 1), (101, 7)]
SHARES = [(1, 1), (1, 3), (1, 8), (2, 3), (3, 2), (4, 1), (8, 8), (5, 4)]


def length(index: int) -> int:
    """Length of a record."""
    return LENGTHS[index]


def epoch_batches(plan: BatchPlan, epoch: int) -> list[list[int]]:
    """The global batches of one epoch."""
    first = epoch * plan.steps_per_epoch
    batches = [plan.global_batch(step) for step in range(first, first + plan.steps_per_epoch)]
    assert {number for number, _ in batches} == {epoch}
    return [indices for _, indices in batches]


@pytest.mark.parametrize(("n", "batch"), SIZES)
def test_every_record_comes_once_an_epoch_in_batches_of_which_the_last_may_be_smaller(n, batch):
    plan = BatchPlan(n, batch, 2, seed=1)
    for epoch in (0, 1, 2):
        batches = epoch_batches(plan, epoch)
        assert sorted(sum(batches, [])) == list(range(n))
        assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)
        assert len(batches[-1]) == (n % batch or batch)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_global_batch_does_not_depend_on_ranks_or_micro_batches(ranks, micro):
    plan = BatchPlan(20, 8, micro, seed=3)
    for step in range(6):
        _, indices = BatchPlan(20, 8, 5, seed=3).global_batch(step)
        assert plan.global_batch(step)[1] == indices
        dealt = [m for rank in range(ranks) for m in plan.share(indices, length, rank, ranks)]
        assert sorted(i for m in dealt if m.real for i in m.indices) == sorted(indices)


@pytest.mark.parametrize(("ranks", "micro"), SHARES)
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_ranks_have_equal_numbers_of_micro_batches_and_share_each_record_out_once(ranks, micro, n):
    plan = BatchPlan(20, 8, micro, seed=0)
    indices = plan.global_batch(0)[1][:n]
    shares = [plan.share(indices, length, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for m in share if m.real for i in m.indices) == sorted(indices)
    for micro_batch in (m for share in shares for m in share):
        assert 1 <= len(micro_batch.indices) <= micro and set(micro_batch.indices) <= set(indices)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_micro_batch_has_the_same_number_and_records_whatever_the_ranks(ranks):
    """Dropout is seeded by that number, so one rank and many train alike."""
    plan = BatchPlan(20, 8, 3, seed=0)
    indices = plan.global_batch(1)[1]
    alone = {m.number: m.indices for m in plan.share(indices, length, 0, 1)}
    shares = [m for rank in range(ranks) for m in plan.share(indices, length, rank, ranks)]
    assert {m.number: m.indices for m in shares if m.real} == alone
    assert len({m.number for m in shares}) == len(shares)


def test_a_rank_with_nothing_left_gets_a_copy_that_does_not_count():
    plan = BatchPlan(3, 8, 2, seed=0)
    shares = [plan.share([0, 1, 2], length, rank, 4) for rank in range(4)]
    assert [[m.real for m in share] for share in shares] == [[True], [True], [False], [False]]
    assert all(len(share[0].indices) == 1 for share in shares[2:])


def test_records_of_like_length_share_a_micro_batch():
    plan = BatchPlan(1000, 100, 10, seed=0)
    indices = plan.global_batch(0)[1]
    spread = [max(map(length, m.indices)) - min(map(length, m.indices)) for m in plan.share(indices, length, 0, 1)]
    assert sum(spread) <= max(LENGTHS) - min(LENGTHS)
    assert indices != sorted(indices, key=length)  # only inside a global batch


def test_each_epoch_and_each_seed_has_another_order():
    orders = [sum(epoch_batches(BatchPlan(50, 8, 2, seed), epoch), []) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert list(range(50)) not in orders


def test_a_batch_is_a_function_of_the_step_alone():
    plan = BatchPlan(50, 8, 2, seed=5)
    in_order = [plan.global_batch(step) for step in range(14)]
    random.seed(123)
    backwards = [BatchPlan(50, 8, 2, seed=5).global_batch(step) for step in reversed(range(14))]
    assert backwards[::-1] == in_order


def test_an_order_is_drawn_once_an_epoch_not_once_a_step():
    plan = BatchPlan(300_000, 128, 8, seed=0)
    began = time.perf_counter()
    plan.global_batch(0)
    first = time.perf_counter() - began
    began = time.perf_counter()
    for step in range(1, 101):
        plan.global_batch(step)
    assert time.perf_counter() - began < 10 * first  # drawing anew would take 100 times as long as the first


@pytest.mark.parametrize(("n", "batch"), [*SIZES, (300, 8), (256, 8), (257, 8)])
def test_grouped_by_length_every_record_comes_once_an_epoch(n, batch):
    plan = BatchPlan(n, batch, 2, 1, length)
    epochs = [epoch_batches(plan, epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(sum(batches, [])) == list(range(n)) and len(batches) == plan.steps_per_epoch
        assert sorted(len(b) for b in batches)[1:] == [batch] * (len(batches) - 1)
    assert n <= WINDOW * batch or sorted(map(sorted, epochs[0])) != sorted(map(sorted, epochs[1]))


def test_grouped_by_length_a_step_has_records_of_like_length_and_the_steps_come_in_no_order_of_it():
    drawn, grouped = (BatchPlan(1000, 4, 4, 0, of) for of in (None, length))
    spread = [
        sum(max(map(length, batch)) - min(map(length, batch)) for batch in epoch_batches(plan, 0))
        for plan in (drawn, grouped)
    ]
    assert spread[1] < spread[0] / 20
    longest = [max(map(length, batch)) for batch in epoch_batches(grouped, 0)[:WINDOW]]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_a_grouped_batch_is_a_function_of_the_step_alone_and_lengths_are_asked_for_a_window_at_a_time():
    asked = []
    plan = BatchPlan(1000, 4, 4, 0, lambda index: asked.append(index) or length(index))
    backwards = [plan.global_batch(step) for step in reversed(range(250))]
    assert len(asked) == 1000, "each window is sorted once"
    assert [BatchPlan(1000, 4, 4, 0, length).global_batch(step) for step in range(250)] == backwards[::-1]
