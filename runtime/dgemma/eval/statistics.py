"""Confidence intervals of shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # quantile of the normal distribution for a two-sided 95 % interval


@dataclass(frozen=True, slots=True)
class Share:
    """A share of attempts, and its 95 % interval low .. high; all in 0 .. 1."""

    share: float
    low: float
    high: float
    tries: int


def wilson(right: float, tries: float, z: float = Z) -> tuple[float, float]:
    """Return the ends of Wilson's score interval, without continuity correction.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22:209.
    """
    if tries <= 0:
        return 0.0, 1.0
    share = right / tries
    middle = share + z * z / (2 * tries)
    reach = z * math.sqrt(share * (1 - share) / tries + z * z / (4 * tries * tries))
    scale = 1 + z * z / tries
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def share_of(items: Sequence[Sequence[bool]]) -> Share:
    """Return the Share of right tries; each item has one try or several with different seeds.

    Tries of one item are correlated, so they count less than tries of different items: Wilson's interval is calculated
    for the number of tries divided by the design effect (Kish 1965, Survey Sampling). This is the variance between the
    items' shares over the variance for independent tries, limited to 1 .. the number of tries per item. Where all tries
    are right, or all wrong, it cannot be estimated, and each item counts as one try.
    """
    tries = sum(map(len, items))
    if tries == 0:
        return Share(0.0, 0.0, 1.0, 0)
    most = max(map(len, items))
    share = sum(map(sum, items)) / tries
    effect = float(most)
    if 0 < share < 1 and len(items) > 1:
        between = sum(len(item) * (sum(item) / len(item) - share) ** 2 for item in items if item) / (len(items) - 1)
        effect = min(max(between / (share * (1 - share)), 1.0), float(most))
    low, high = wilson(share * tries / effect, tries / effect)
    return Share(share, low, high, tries)


def mean_of(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean of all values, and the half width of its 95 % interval by the normal approximation.

    Groups are strata with chosen sizes, such as levels. Differences between them are no error of the mean, so only the
    variance within each group is used (Cochran 1977, Sampling Techniques, chapter 5). Groups of one value are joined to
    one group; for a single value in all the half width is 0.
    """
    alone = [value for group in groups if len(group) == 1 for value in group]
    error, count = 0.0, sum(map(len, groups))
    for group in [*(group for group in groups if len(group) > 1), alone]:
        if len(group) > 1:
            middle = sum(group) / len(group)
            error += len(group) * sum((value - middle) ** 2 for value in group) / (len(group) - 1)
    return sum(map(sum, groups)) / count, Z * math.sqrt(error) / count
