"""evaluation/intervals.py: the bootstrap against a plain loop, its coverage, and its edges."""

import random
import time
import tracemalloc
import warnings

import numpy as np
import pytest

from evaluation import intervals
from evaluation.intervals import Figure, average_interval, bootstrap_means, mean_interval, paired_difference


def plain_means(values: list[float], resamples: int, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [sum(draw.choices(values, k=len(values))) / len(values) for _ in range(resamples)]


# The first is drawn value by value, the second by counts of its distinct values.
SAMPLES = {
    "all different": np.random.default_rng(0).gamma(2.0, size=60).tolist(),
    "few distinct": [0.0] * 70 + [0.5] * 20 + [1.0] * 30,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_resampled_means_are_distributed_as_in_a_plain_loop(name):
    values = SAMPLES[name]
    ours, plain = bootstrap_means(values, seed=3, resamples=20_000), plain_means(values, 20_000, seed=4)
    assert ours.shape == (20_000,) and ours.dtype == np.float64
    error = np.std(values) / len(values) ** 0.5
    step = 0.5 / 120  # between two means of the few distinct values
    for share in (0.025, 0.25, 0.5, 0.75, 0.975):
        assert np.quantile(ours, share) == pytest.approx(np.quantile(plain, share), abs=max(0.06 * error, 1.01 * step))
    assert ours.std() == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_interval_is_the_middle_95_percent_of_the_resampled_means(name):
    figure, means = mean_interval(SAMPLES[name], seed=5), np.sort(bootstrap_means(SAMPLES[name], seed=5))
    assert figure.value == pytest.approx(sum(SAMPLES[name]) / len(SAMPLES[name]))
    assert means[48] <= figure.low <= means[51] and means[1948] <= figure.high <= means[1951]
    assert figure.n == len(SAMPLES[name])


def test_the_interval_of_a_share_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        figure = mean_interval((generator.random(120) < 0.4).astype(float), seed=trial)
        hits += figure.low <= 0.4 <= figure.high
    assert 0.90 <= hits / 300 <= 0.99


def test_the_interval_of_a_paired_difference_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        difficulty = generator.normal(size=80)
        a, b = difficulty + generator.normal(size=80), difficulty + 0.3 + generator.normal(size=80)
        figure = paired_difference(a, b, seed=trial)
        hits += figure.low <= 0.3 <= figure.high
    assert 0.90 <= hits / 300 <= 0.99


def test_one_seed_gives_one_answer_whatever_was_computed_before():
    values = SAMPLES["all different"]
    first = mean_interval(values, seed=7)
    np.random.seed(0)
    np.random.random(10)
    bootstrap_means(values, seed=8)
    assert mean_interval(values, seed=7) == first
    assert mean_interval(values, seed=8) != first


@pytest.mark.parametrize("values", [[0.3], [0.1] * 10, [0.1] * 1000, [0.0] * 3])
def test_equal_values_have_an_interval_of_no_width_and_no_warning(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_interval(values) == Figure(values[0], values[0], values[0], len(values))
        assert average_interval([values, values]) == Figure(values[0], values[0], values[0], 2 * len(values))


def test_many_questions_need_little_memory_and_give_what_one_chunk_gives(monkeypatch):
    values = np.random.default_rng(3).random(2_000)
    whole = bootstrap_means(values, seed=1, resamples=100)
    monkeypatch.setattr(intervals, "_CHUNK", 7_000)
    np.testing.assert_allclose(bootstrap_means(values, seed=1, resamples=100), whole, rtol=1e-12)
    monkeypatch.undo()
    tracemalloc.start()
    bootstrap_means(np.random.default_rng(3).random(100_000), seed=1, resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6  # at once it would be 320 MB


def test_a_share_over_a_hundred_thousand_questions_takes_no_time():
    start = time.perf_counter()
    figure = mean_interval((np.arange(100_000) % 4 == 0).astype(float))
    assert time.perf_counter() - start < 2
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * (0.1875 / 100_000) ** 0.5, rel=0.1)


def test_the_average_weighs_data_sets_alike_and_resamples_each_by_itself():
    small, large = [0.0, 1.0] * 20, [1.0] * 900
    figure = average_interval([small, large], seed=0)
    assert (figure.value, figure.n) == (0.75, 940)
    alone = mean_interval(small)
    assert figure.high - figure.low == pytest.approx((alone.high - alone.low) / 2, rel=0.1)
    # Two independent copies: the error of their mean is that of one over √2. Resampled alike it would be the same.
    values = SAMPLES["all different"]
    twice, once = average_interval([values, values]), mean_interval(values)
    assert twice.high - twice.low == pytest.approx((once.high - once.low) / 2**0.5, rel=0.1)


def test_a_paired_difference_is_b_minus_a_and_sees_through_what_both_share():
    generator = np.random.default_rng(4)
    difficulty = generator.normal(scale=10, size=50)
    a, b = difficulty, difficulty + 0.5 + 0.1 * generator.normal(size=50)
    figure = paired_difference(a, b)
    assert figure.value == pytest.approx(np.mean(b) - np.mean(a))
    assert 0.4 < figure.low < 0.5 < figure.high < 0.6
    assert paired_difference(b, a).value == pytest.approx(-figure.value)


def test_undefined_intervals_are_errors():
    for empty in ([], np.zeros((2, 2))):
        with pytest.raises(ValueError, match="at least one"):
            mean_interval(empty)
    with pytest.raises(ValueError, match="at least one"):
        average_interval([[1.0], []])
    with pytest.raises(ValueError, match="at least one data set"):
        average_interval([])
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match="2 and 1 values"):
        paired_difference([1.0, 2.0], [1.0])
