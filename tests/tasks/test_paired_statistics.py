"""Intervals of shares and of paired differences, against scipy."""
import numpy as np
import pytest
import scipy.stats

from tasks.statistics import paired, wilson


@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (3, 10), (77, 100), (1, 2)])
def test_wilsons_interval_is_scipys(right, n):
    share, low, high = wilson([True] * right + [False] * (n - right))
    expected = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    assert share == right / n and (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def answers(seed, n=300):
    """Two models' answers, of which the first is the worse."""
    rng = np.random.default_rng(seed)
    reference = rng.random(n) < 0.6
    return np.where(rng.random(n) < 0.8, reference, rng.random(n) < 0.4), reference


@pytest.mark.parametrize("seed", [0, 1])
def test_paired_intervals_are_those_of_scipys_bootstrap(seed):
    correct, reference = answers(seed)
    pair = paired(correct.tolist(), reference.tolist())
    statistics = {"difference": lambda a, b, axis=-1: a.mean(axis) - b.mean(axis),
                  "ratio": lambda a, b, axis=-1: a.mean(axis) / b.mean(axis)}
    for name, statistic in statistics.items():
        expected = scipy.stats.bootstrap((correct, reference), statistic, paired=True, vectorized=True,
                                         n_resamples=9999, method="percentile", random_state=5).confidence_interval
        value, low, high = getattr(pair, name)
        assert value == pytest.approx(statistic(correct, reference))
        # Quantiles of 10,000 resamples differ from draw to draw by a few per cent of the interval.
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.05 * (high - low))
    assert pair.gained - pair.lost == correct.sum() - reference.sum()
    assert paired(correct, reference) == pair != paired(correct, reference, seed=1)


def test_pairing_tells_more_than_two_shares_do():
    correct, reference = answers(0)
    low, high = paired(correct, reference).difference[1:]
    shuffled = np.random.default_rng(0).permutation(reference)
    loose_low, loose_high = paired(correct, shuffled).difference[1:]
    assert high - low < 0.7 * (loose_high - loose_low)


def test_what_cannot_be_compared():
    assert paired([True, False], [True, False]).difference == (0, 0, 0)
    assert np.isnan(paired([True, False], [False, False]).ratio.value)
    with pytest.raises(ValueError, match="2 answers cannot be paired with 3"):
        paired([True, False], [True, False, True])
