"""Figures of several seeds as one."""

import statistics
from typing import Optional, Sequence


def mean_or_none(values: Sequence[Optional[float]]) -> Optional[float]:
    """None where a value is missing (the mean of the rest would be of other runs), or all are."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def deviation_or_none(values: Sequence[Optional[float]]) -> Optional[float]:
    """The sample standard deviation; None for a single value, or where one is missing."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None
