"""Percentile bootstrap over questions: how far a mean would move with another sample of questions.

Knows numbers only. Questions are drawn with replacement (Efron 1979); the interval of the mean lies between the
percentiles of the resampled means. It says nothing about another training seed or another data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Share of the resampled means between `low` and `high`."""

_CHUNK = 4_000_000
"""Values held at a time (32 MB), whatever the number of questions."""


@dataclass(frozen=True)
class Figure:
    """A mean with its bootstrap interval over n questions."""

    value: float
    low: float
    high: float
    n: int


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    values_Q = np.asarray(values, dtype=np.float64)
    if values_Q.ndim != 1 or values_Q.size == 0:
        raise ValueError(f"An interval needs a list of at least one value; got shape {values_Q.shape}.")
    if not np.isfinite(values_Q).all():
        raise ValueError("A value is not a finite number: its mean and interval are undefined.")
    return values_Q


def _mean(values_Q: np.ndarray) -> float:
    # The clip keeps the mean of equal values at exactly that value, despite rounding in the sum.
    return float(np.clip(values_Q.mean(), values_Q.min(), values_Q.max()))


def bootstrap_means(values_Q: Sequence[float] | np.ndarray, seed: int, resamples: int = 2000) -> np.ndarray:
    """Means of `resamples` samples of Q values, drawn with replacement: float64 [resamples].

    Depends on the values and the seed only. Raises ValueError for no value or one that is not finite.
    """
    values_Q = _checked(values_Q)
    number = len(values_Q)
    distinct_D, counts_D = np.unique(values_Q, return_counts=True)
    if len(distinct_D) == 1:
        return np.full(resamples, distinct_D[0])
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // number)
    means_R = np.empty(resamples)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        if 8 * len(distinct_D) < number:
            # The same distribution, many times faster: how often each distinct value is drawn is multinomial.
            drawn_RD = generator.multinomial(number, counts_D / number, size=rows)
            means_R[start : start + rows] = drawn_RD @ distinct_D / number
        else:
            means_R[start : start + rows] = values_Q[generator.integers(number, size=(rows, number))].mean(axis=1)
    return means_R


def _figure(value: float, means_R: np.ndarray, n: int) -> Figure:
    low, high = np.quantile(means_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(value, float(low), float(high), n)


def mean_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> Figure:
    """The mean of one value a question, with its interval; of zero width where all values are equal."""
    values_Q = _checked(values)
    return _figure(_mean(values_Q), bootstrap_means(values_Q, seed), len(values_Q))


def average_interval(groups: Sequence[Sequence[float] | np.ndarray], seed: int = 0) -> Figure:
    """Macro average: the mean of the data sets' means, each data set resampled by itself; n is the total.

    groups: one list of values a data set. Raises ValueError for no data set or an empty one.
    """
    if not groups:
        raise ValueError("An average needs at least one data set.")
    arrays = [_checked(group) for group in groups]
    # One stream a data set: with a shared one, data sets of equal size would be resampled alike.
    seeds = np.random.SeedSequence(seed).generate_state(len(arrays))
    means_GR = np.stack([bootstrap_means(a, int(s)) for a, s in zip(arrays, seeds, strict=True)])
    value = _mean(np.array([_mean(a) for a in arrays]))
    return _figure(value, means_GR.mean(axis=0), sum(len(a) for a in arrays))


def paired_difference(a_Q: Sequence[float] | np.ndarray, b_Q: Sequence[float] | np.ndarray, seed: int = 0) -> Figure:
    """The mean of b − a over the same questions, resampled in pairs. Raises ValueError when the lengths differ."""
    a_Q, b_Q = _checked(a_Q), _checked(b_Q)
    if len(a_Q) != len(b_Q):
        raise ValueError(f"{len(a_Q)} and {len(b_Q)} values: a pair needs one of the same question on both sides.")
    return mean_interval(b_Q - a_Q, seed)
