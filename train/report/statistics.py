"""Intervals, paired differences, and what many comparisons at once may claim."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate; no bounds where nothing can be said of them."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Paired(NamedTuple):
    """The mean of differences, their t-interval, p of "it is 0" (two-sided), and how many."""

    difference: Interval
    p: float | None
    pairs: int


def t_interval(values: Sequence[float]) -> Interval:
    """Mean +- t_{0.975, n - 1} s / sqrt(n): 95 % of such intervals hold the mean of all seeds.

    One value has no interval. The bounds are those of the formula, also where they leave [0, 1].
    """
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def wilson(hits: int, n: int) -> Interval:
    """Wilson's 95 % interval of a share: it does not shrink to a point at 0 or 1.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), Wilson, 1927.
    """
    p, z = hits / n, float(stats.norm.ppf((1 + LEVEL) / 2))
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / scale, (centre + half) / scale
    return Interval(p, 0.0 if hits == 0 else low, 1.0 if hits == n else high)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired | None:
    """Ours less theirs, seed by seed, on the seeds that both have; None when there is none.

    Differences that are all the same leave no spread to test against: p is then the limit, 0, or 1
    where all of them are 0.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    interval, n = t_interval(differences), len(differences)
    if n < 2:
        return Paired(interval, None, n)
    spread = stdev(differences) / math.sqrt(n)
    if spread == 0:
        return Paired(interval, float(interval.mean == 0), n)
    return Paired(interval, float(2 * stats.t.sf(abs(interval.mean) / spread, n - 1)), n)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p: below 0.05 holds for all of them together. None stays None."""
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats.

    One beats another when it costs no more, is no worse, and is not its equal.

    Args:
        points: (cost, quality).

    Returns:
        Indices, by growing cost; of equal points, all.
    """
    front = [
        i
        for i, (cost, good) in enumerate(points)
        if not any(c <= cost and g >= good and (c, g) != (cost, good) for c, g in points)
    ]
    return sorted(front, key=lambda i: (points[i], i))
