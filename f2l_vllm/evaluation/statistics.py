"""What a set of numbers, one per video, shows: intervals, differences, non-inferiority, equivalence.

The video is the unit: questions about one video are not independent of each other. The methods are scipy's.

Sources: Efron (1987) for the BCa bootstrap; Schuirmann (1987) for the two one-sided tests (TOST).
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]

RESAMPLES = 9999
ALPHA = 0.05
_ONE_VIDEO = "one video only"
_NO_SPREAD = "every video has the same value"
_AT_ONCE = 4_000_000  # resampled numbers held at a time


@dataclass(frozen=True)
class Estimate:
    """A mean (or ratio) and its 95 % interval; if there can be no interval, `ci95` is None and `note` says why."""

    value: float
    ci95: tuple[float, float] | None
    note: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A test's outcome at the 5 % level; if the test cannot be made, `shown` is None and `note` says why.

    Attributes:
        shown: True when the claim is shown. False means that it is not shown, not that its opposite is.
        margin: the largest difference that counts as none.
        bounds: compared with the margin: (low, inf) of the one-sided 95 % interval, or the 90 % interval.
    """

    shown: bool | None
    margin: float
    p: float | None = None
    bounds: tuple[float, float] | None = None
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As JSON, where infinity is null."""
        record = asdict(self)
        if self.bounds is not None:
            record["bounds"] = [bound if np.isfinite(bound) else None for bound in self.bounds]
        return record


def mean(values: Values) -> Estimate:
    """The mean with a BCa bootstrap 95 % interval."""
    return _bootstrap((values,), lambda x, axis: np.mean(x, axis=axis))


def ratio(values: Values, reference: Values) -> Estimate:
    """The ratio of two paired means with a BCa bootstrap 95 % interval.

    Raises:
        ValueError: the reference's mean is not positive, so that there is no ratio.
    """
    if not reference.mean() > 0:
        raise ValueError(f"no ratio to a mean of {reference.mean():g}")
    return _bootstrap((values, reference), lambda x, y, axis: np.mean(x, axis=axis) / np.mean(y, axis=axis))


def non_inferiority(differences: Values, margin: float) -> Verdict:
    """Is the mean difference above `-margin`? A one-sided t test."""
    impossible = _no_test(differences)
    if impossible:
        return Verdict(None, margin, note=impossible)
    test = stats.ttest_1samp(differences, -margin, alternative="greater")
    low = float(test.confidence_interval(1 - ALPHA).low)
    return Verdict(bool(test.pvalue < ALPHA), margin, float(test.pvalue), (low, float("inf")))


def equivalence(differences: Values, margin: float) -> Verdict:
    """Is the mean difference between `-margin` and `margin`? Two one-sided t tests; p is the larger one."""
    impossible = _no_test(differences)
    if impossible:
        return Verdict(None, margin, note=impossible)
    above = stats.ttest_1samp(differences, -margin, alternative="greater")
    below = stats.ttest_1samp(differences, margin, alternative="less")
    p = float(max(above.pvalue, below.pvalue))
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(1 - 2 * ALPHA)
    return Verdict(p < ALPHA, margin, p, (float(interval.low), float(interval.high)))


def _no_test(values: Values) -> str | None:
    """Why no t test can be made, or None if one can."""
    if len(values) < 2:
        return _ONE_VIDEO
    return _NO_SPREAD if _constant(values) else None


def _constant(values: Values) -> bool:
    return bool(np.ptp(values) < 1e-12)


def _bootstrap(samples: tuple[Values, ...], statistic: Any) -> Estimate:
    count = len(samples[0])
    value = float(statistic(*samples, axis=0))
    if count < 2:
        return Estimate(value, None, _ONE_VIDEO)
    if all(_constant(sample) for sample in samples):
        return Estimate(value, (value, value), _NO_SPREAD)

    def interval(method: str) -> tuple[float, float]:
        # A degenerate BCa gives NaN, and a resample that scores zero has no ratio; the check below sees both.
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                samples,
                statistic,
                n_resamples=RESAMPLES,
                batch=max(1, _AT_ONCE // count),
                paired=len(samples) > 1,
                vectorized=True,
                method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval
        return float(found.low), float(found.high)

    for method, note in (("BCa", None), ("percentile", "percentile interval: too few or too equal videos for BCa")):
        low, high = interval(method)
        if np.isfinite(low) and np.isfinite(high):
            return Estimate(value, (low, high), note)
    return Estimate(value, None, "too few videos for an interval")
