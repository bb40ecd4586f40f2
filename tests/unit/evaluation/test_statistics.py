import numpy as np
import pytest
from scipy import stats

from f2l_vllm.evaluation import statistics

SMALL = np.array([0.01, -0.02, 0.03, 0.0, -0.01, 0.02])


def test_the_interval_of_normal_values_is_close_to_the_t_interval():
    values = np.random.default_rng(0).normal(0.7, 0.2, 400)
    estimate = statistics.mean(values)
    expected = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.ci95 == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))
    assert estimate.note is None


def test_the_interval_of_scores_near_the_ceiling_is_skewed_and_stays_below_it():
    values = np.array([1.0] * 40 + [0.9] * 8 + [0.5])
    low, high = statistics.mean(values).ci95
    assert high < 1.0
    assert values.mean() - low > high - values.mean()


def test_the_same_values_give_the_same_interval():
    assert statistics.mean(SMALL) == statistics.mean(SMALL)


def test_a_ratio_pairs_its_values():
    reference = np.random.default_rng(1).uniform(0.2, 1.0, 50)
    estimate = statistics.ratio(0.9 * reference + np.where(np.arange(50) % 2, 0.001, -0.001), reference)
    assert estimate.value == pytest.approx(0.9, abs=1e-3)
    low, high = estimate.ci95
    assert high - low < 0.01  # unpaired it would be forty times as wide


def test_a_ratio_to_nothing_is_refused():
    with pytest.raises(ValueError, match="no ratio"):
        statistics.ratio(np.ones(3), np.zeros(3))


def test_non_inferiority_is_the_one_sided_t_test():
    margin, n = 0.015, len(SMALL)
    error = SMALL.std(ddof=1) / n**0.5
    verdict = statistics.non_inferiority(SMALL, margin)
    assert verdict.p == pytest.approx(stats.t.sf((SMALL.mean() + margin) / error, n - 1))
    assert verdict.bounds[0] == pytest.approx(SMALL.mean() - stats.t.ppf(0.95, n - 1) * error)
    assert verdict.shown is (verdict.p < 0.05) is (verdict.bounds[0] > -margin) is True


def test_equivalence_is_the_worse_of_two_one_sided_tests():
    margin, n = 0.02, len(SMALL)
    error = SMALL.std(ddof=1) / n**0.5
    above, below = (stats.t.sf((margin + sign * SMALL.mean()) / error, n - 1) for sign in (1, -1))
    verdict = statistics.equivalence(SMALL, margin)
    assert verdict.p == pytest.approx(max(above, below))
    assert verdict.shown is (verdict.p < 0.05)
    half = stats.t.ppf(0.95, n - 1) * error
    assert verdict.bounds == pytest.approx((SMALL.mean() - half, SMALL.mean() + half))


@pytest.mark.parametrize(
    ("shift", "non_inferior", "equivalent"), [(0.0, True, True), (-0.2, False, False), (0.2, True, False)]
)
def test_better_is_not_inferior_and_not_equivalent(shift, non_inferior, equivalent):
    assert statistics.non_inferiority(SMALL + shift, 0.05).shown is non_inferior
    assert statistics.equivalence(SMALL + shift, 0.05).shown is equivalent


def test_one_video_has_a_mean_and_nothing_else():
    one = np.array([0.8])
    assert statistics.mean(one) == statistics.Estimate(0.8, None, "one video only")
    for test in (statistics.non_inferiority, statistics.equivalence):
        verdict = test(one, 0.05)
        assert (verdict.shown, verdict.p, verdict.note) == (None, None, "one video only")


def test_equal_values_have_no_spread_to_test():
    same = np.full(20, 0.1)
    estimate = statistics.mean(same)
    assert estimate.ci95 == pytest.approx((0.1, 0.1))
    assert estimate.note == "every video has the same value"
    for test in (statistics.non_inferiority, statistics.equivalence):
        assert test(same, 0.05).shown is None
        assert test(same, 0.05).note == "every video has the same value"


def test_two_videos_still_have_an_interval():
    low, high = statistics.mean(np.array([0.5, 1.0])).ci95
    assert 0.5 <= low <= 0.75 <= high <= 1.0


def test_verdicts_are_json_without_infinity():
    record = statistics.non_inferiority(SMALL, 0.05).as_json()
    assert record["bounds"][1] is None
    assert record["bounds"][0] == pytest.approx(SMALL.mean(), abs=0.05)
