"""Batches as a function of the step: every example as often as it should be, in one shape, cheap at any step."""

import pickle
import time
from collections import Counter

import numpy as np
import pytest

from data_pipelines.plan import InOrder, Shuffled, mix

B = 4


def made(
    counts: tuple[tuple[int, ...], ...], weights: tuple[float, ...], seed: int = 0, batch_size: int = B
) -> Shuffled:
    """A plan of `counts[dataset][bucket]` examples, interleaved."""
    rows = [(d, b) for d, sizes in enumerate(counts) for b, size in enumerate(sizes) for _ in range(size)]
    order = np.random.default_rng(7).permutation(len(rows))
    datasets, buckets = np.array(rows, np.int32)[order].T
    return Shuffled(buckets, datasets, weights, batch_size, seed)


def shown(plan: Shuffled, steps: int) -> list[tuple[int, int]]:
    """Example and pass of every row of the first steps."""
    rows = [plan(step) for step in range(steps)]
    return [pair for row in rows for pair in zip(row.indices.tolist(), row.passes.tolist(), strict=True)]


def test_every_example_comes_once_an_epoch_and_what_is_left_over_begins_the_next() -> None:
    plan = made(((13, 6, 2),), (1,))  # 21 examples in three buckets, none of them a multiple of 4
    steps = plan.first_step(4)
    assert steps == 13 * 4 // B + 6 * 4 // B + 2 * 4 // B
    pairs = shown(plan, steps)
    assert len(pairs) == len(set(pairs)) == 4 * 21  # nothing is left over: 4 epochs are whole batches of each
    assert Counter(number for _, number in pairs) == {0: 21, 1: 21, 2: 21, 3: 21}
    for epoch in (1, 2, 3):  # before that, at most what does not fill a batch is missing
        missing = epoch * 21 - sum(number < epoch for _, number in shown(plan, plan.first_step(epoch)))
        assert 0 <= missing <= 3 * (B - 1)
    assert [plan.epoch(step) for step in (0, plan.first_step(1) - 1, plan.first_step(1))] == [0, 0, 1]


def test_a_batch_is_of_one_bucket_and_epochs_differ() -> None:
    counts = ((20, 12),)
    plan = made(counts, (1,))
    buckets = plan._args[0]
    for step in range(40):
        rows = plan(step)
        assert set(buckets[rows.indices]) == {rows.bucket}
    epochs = [[plan(step).indices.tolist() for step in range(8 * e, 8 * e + 8)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [sorted(row) for row in epochs[0]]
    assert [plan(step).bucket for step in range(8)] != sorted(plan(step).bucket for step in range(8))


def test_weights_are_passes_an_epoch() -> None:
    plan = made(((10, 6), (8, 8), (30, 2), (5, 0)), (1, 2.5, 0.3, 0))
    datasets = plan._args[1]
    epochs = 20
    pairs = shown(plan, plan.first_step(epochs))
    assert len(pairs) == len(set(pairs))
    counts = Counter(datasets[index] for index, _ in pairs)
    for dataset, wanted in enumerate((16 * 1, 16 * 2.5, 32 * 0.3, 0)):
        assert abs(counts[dataset] - wanted * epochs) <= 2 * B
    # With 0.3 all examples come once in ten epochs, in three parts, before any comes again.
    third = [index for index, number in pairs if datasets[index] == 2 and number == 0]
    assert len(third) == len(set(third)) == 32


def test_kept_leaves_out_and_weights_of_nothing_are_refused() -> None:
    kept = np.arange(12) % 3 > 0
    plan = Shuffled(np.zeros(12, np.int8), np.zeros(12, np.int8), (1,), B, 0, kept)
    assert sorted(index for index, _ in shown(plan, 2)) == np.flatnonzero(kept).tolist()
    with pytest.raises(ValueError, match="none of 12 examples"):
        Shuffled(np.zeros(12, np.int8), np.zeros(12, np.int8), (0,), B, 0)


def test_the_digest_tells_plans_apart_and_travels_with_them() -> None:
    plans = [made(((9, 9),), (1,)), made(((9, 9),), (1,), seed=1), made(((9, 9),), (2,)), made(((10, 8),), (1,))]
    assert len({plan.digest() for plan in plans}) == 4
    travelled = pickle.loads(pickle.dumps(plans[0]))
    assert travelled.digest() == plans[0].digest() == made(((9, 9),), (1,)).digest()
    assert shown(travelled, 12) == shown(plans[0], 12)


def test_hashes_are_these_for_good() -> None:
    """A checkpoint of today means the same batches under another release of anything."""
    assert mix(0) == 0xE220A8397B1DCDAF  # what SplitMix64 gives first, started from 0
    assert mix(1, 2, np.arange(2)).tolist() == [16613338946343043936, 13264548337748323810]
    assert made(((9, 9),), (1,))(3).indices.tolist() == [4, 15, 8, 2]


def test_in_order_gives_whole_batches_where_their_last_example_is() -> None:
    plan = InOrder(np.array([0, 1, 0, 1, 0, 1, 0, 0, 1, 1], np.int8), 2, np.arange(10) != 3)
    assert plan.steps == 4
    assert [plan(step).indices.tolist() for step in range(4)] == [[0, 2], [1, 5], [4, 6], [8, 9]]
    assert [plan(step).bucket for step in range(4)] == [0, 1, 0, 1]


def test_any_step_of_a_million_examples_is_at_hand() -> None:
    draw = np.random.default_rng(0)
    buckets, datasets = draw.integers(0, 15, 1_000_000), draw.integers(0, 2, 1_000_000)
    start = time.thread_time()
    plan = Shuffled(buckets, datasets, (1, 0.7), 96, 0)
    for step in (0, 123_456_789, 5_000):
        plan(step)
    assert time.thread_time() - start < 1.0


def _lost(count: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) >= share


@pytest.mark.parametrize("step", [1, 7, 20, 33, 34, 50])
def test_an_amended_plan_shows_what_is_left_of_every_pass_once(step: int) -> None:
    """Over two amendments, of which the second brings some examples back, in the middle or between epochs."""
    plan = made(((41, 18, 7), (12, 9, 0)), (1, 2))
    first, second = _lost(87, 0.3, 1), _lost(87, 0.4, 2)
    later = step + 11
    amended = plan.amended(step, first).amended(later, second)
    assert shown(amended, step) == shown(plan, step)
    assert shown(amended, later) == shown(plan.amended(step, first), later)
    end = amended.first_step(amended.epoch(later) + 3)
    pairs = shown(amended, end)
    assert len(pairs) == len(set(pairs)), "an example came twice in a pass"
    steps = (range(step), range(step, later), range(later, end))
    for kept, part in zip((np.ones(87, bool), first, second), steps, strict=True):
        assert kept[[index for s in part for index in amended(s).indices]].all()
    seen = set(pairs)
    datasets, always = plan._args[1], np.flatnonzero(first & second)
    # What does not fill a batch is missing of the last pass alone.
    passes = {index: (amended.epoch(end) - 1) * (1, 2)[datasets[index]] for index in always}
    assert {(index, number) for index in always for number in range(passes[index])} <= seen
    buckets = plan._args[0]
    assert all(set(buckets[amended(s).indices]) == {amended(s).bucket} for s in range(end))


def test_an_amended_plan_ends_the_epoch_under_way_with_all_that_is_left() -> None:
    plan = made(((400,),), (1,))
    kept = _lost(400, 0.1, 3)
    amended = plan.amended(60, kept)
    before = {index for step in range(60) for index in plan(step).indices}
    rest = {index for step in range(60, amended.first_step(1)) for index in amended(step).indices}
    wanted = set(np.flatnonzero(kept)) - before
    assert rest <= wanted and len(wanted) - len(rest) < B
    assert amended.epoch(60) == 0 and amended.epoch(amended.first_step(1)) == 1


def test_buckets_may_go_and_come_with_an_amendment() -> None:
    plan = made(((40, 40),), (1,))
    of_one = plan._args[0] == 1
    amended = plan.amended(30, ~of_one)
    assert {amended(step).bucket for step in range(30, 90)} == {0}
    again = amended.amended(50, np.ones(80, bool))
    pairs = shown(again, again.first_step(6))
    assert len(pairs) == len(set(pairs))
    assert {again(step).bucket for step in range(50, again.first_step(again.epoch(50) + 1))} >= {0}
    assert {again(step).bucket for step in range(again.first_step(5), again.first_step(6))} == {0, 1}


def test_with_broken_weights_a_few_of_a_pass_are_twice_or_missing() -> None:
    plan = made(((300, 0), (200, 100)), (0.3, 2.5))
    kept = _lost(600, 0.1, 4)
    amended = plan.amended(400, kept)
    counts = Counter(shown(amended, amended.first_step(12)))
    assert max(counts.values()) <= 2 and sum(count == 2 for count in counts.values()) < 10


def test_digests_of_amended_plans_are_of_the_steps_before() -> None:
    plan, kept = made(((40, 9),), (1,)), _lost(49, 0.2, 5)
    amended = plan.amended(10, kept)
    assert amended.digest(10) == plan.digest() == plan.digest(3) != amended.digest(11) == amended.digest()
    assert amended.digest() != plan.amended(9, kept).digest() != plan.amended(9, _lost(49, 0.2, 6)).digest()
    second = amended.amended(20, _lost(49, 0.2, 7))
    assert [second.digest(step) for step in (10, 20, 21)] == [plan.digest(), amended.digest(), second.digest()]
    other = second.amended(10, _lost(49, 0.2, 8))  # in place of both
    assert other.digest() == plan.amended(10, _lost(49, 0.2, 8)).digest()
    travelled = pickle.loads(pickle.dumps(second))
    assert travelled.digest() == second.digest() and shown(travelled, 60) == shown(second, 60)
    with pytest.raises(ValueError, match="none of 49"):
        plan.amended(3, np.zeros(49, bool))
