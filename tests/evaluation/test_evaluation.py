"""Perplexities, intervals, ranks, AUC, LDS against brute force."""

import math

import numpy as np
import pytest
from scipy import stats

from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics as ev

# ------------------------------------------------------------------------------------------------ perplexity


def test_perplexities():
  nll, tokens = np.array([2.0, 30.0, 0.0]), np.array([2, 10, 0])
  assert ev.perplexity(nll, tokens) == pytest.approx(math.exp(32 / 12))
  assert ev.example_perplexity(nll, tokens) == pytest.approx(math.exp((1 + 3) / 2))
  assert ev.perplexity([np.log(7) * 5], [5]) == pytest.approx(7)
  assert ev.perplexity([1e6], [1]) == math.inf
  many = np.full(100_000, 1e-3), np.ones(100_000, np.int32)  # counts far above what a low precision sum would hold
  assert ev.perplexity(*many) == pytest.approx(math.exp(1e-3), rel=1e-12)


@pytest.mark.parametrize(
  ("nll", "tokens", "match"),
  [
    ([], [], "empty"),
    ([0.0], [0], "needs responses"),
    ([np.nan], [3], "diverged"),
    ([1.0, 2.0], [1], "2 values against"),
  ],
)
def test_perplexity_refuses(nll, tokens, match):
  with pytest.raises(UserError, match=match):
    ev.perplexity(nll, tokens)


# ------------------------------------------------------------------------------------------------- intervals


def test_confidence_interval_is_students_t():
  interval = ev.confidence_interval([1.0, 2.0, 4.0])
  low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
  assert (interval.mean, interval.low, interval.high) == pytest.approx((7 / 3, low, high))
  assert interval.count == 3
  assert str(interval) == "2.333 (-1.461 to 6.128)"


def test_one_value_has_no_interval_and_says_so():
  interval = ev.confidence_interval([3.5])
  assert interval.mean == 3.5 and math.isnan(interval.low) and math.isnan(interval.high)
  assert str(interval) == "3.5 (one value, no interval)"


def test_confidence_interval_covers_the_mean_as_often_as_it_says():
  rng = np.random.default_rng(0)
  intervals = [ev.confidence_interval(rng.normal(2.0, 3.0, 4), 0.8) for _ in range(2000)]
  assert np.mean([i.low <= 2.0 <= i.high for i in intervals]) == pytest.approx(0.8, abs=0.03)


def test_level_is_checked():
  with pytest.raises(UserError, match="level=95"):
    ev.confidence_interval([1.0, 2.0], level=95)


# -------------------------------------------------------------------------------------------- rank agreement


def test_spearman():
  rng = np.random.default_rng(0)
  a = rng.integers(0, 5, 50)  # many ties
  b = a + rng.integers(0, 5, 50)
  assert ev.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
  assert ev.spearman([1, 2, 3], [10, 20, 300]) == pytest.approx(1.0)
  assert ev.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
  assert math.isnan(ev.spearman([1, 1, 1], [3, 2, 1]))


def test_top_overlap():
  a, b = [4, 3, 2, 1, 0], [4, 1, 3, 2, 0]
  assert ev.top_overlap(a, b, 0.4) == 0.5  # {0, 1} and {0, 2}
  assert ev.top_overlap(a, b, 0.5) == pytest.approx(2 / 3)  # 2.5 rounds up to 3: {0, 1, 2} and {0, 2, 3}
  assert ev.top_overlap(a, b, 1.0) == 1.0
  with pytest.raises(UserError, match="outside"):
    ev.top_overlap(a, b, 0.0)


def test_roc_auc_equals_all_pairs_and_delongs_formula():
  rng = np.random.default_rng(0)
  positive = np.arange(60) % 3 == 0
  signal = np.round(rng.normal(size=60) + positive, 1)  # rounded: with ties
  pairs = np.array([[(p > n) + 0.5 * (p == n) for n in signal[~positive]] for p in signal[positive]])
  variance = pairs.mean(axis=1).var(ddof=1) / 20 + pairs.mean(axis=0).var(ddof=1) / 40
  interval = ev.roc_auc(signal, positive)
  assert interval.mean == pytest.approx(pairs.mean())
  assert interval.high - interval.low == pytest.approx(2 * 1.959964 * math.sqrt(variance))
  assert ev.roc_auc(-signal, positive).mean == pytest.approx(1 - interval.mean)


def test_roc_auc_edges():
  perfect = ev.roc_auc([1, 2, 3, 4], [False, False, True, True])
  assert (perfect.mean, perfect.low, perfect.high) == (1.0, 1.0, 1.0) and "no width" in perfect.note
  assert ev.roc_auc([1, 1, 1, 1], [False, False, True, True]).mean == 0.5
  assert math.isnan(ev.roc_auc([1, 2, 3], [False, False, True]).low)
  with pytest.raises(UserError, match="0 positives and 2 negatives"):
    ev.roc_auc([1, 2], [False, False])


def test_lds():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(5, 30))
  masks = rng.random((40, 30)) < 0.5
  exact = 3.0 - masks @ scores.T  # additive truth: positive influence lowers the loss
  interval, by_query = ev.lds(scores, masks, exact)
  np.testing.assert_allclose(by_query, 1.0)
  assert interval.mean == pytest.approx(1.0) and interval.count == 5
  noisy = exact + rng.normal(size=exact.shape) * 3
  interval, by_query = ev.lds(scores, masks, noisy)
  expected = [stats.spearmanr(masks @ scores[q], -noisy[:, q]).statistic for q in range(5)]
  np.testing.assert_allclose(by_query, expected)
  assert 0.3 < interval.low < interval.mean < interval.high < 1
  noisy[:, 2] = 1.0
  interval, by_query = ev.lds(scores, masks, noisy)
  assert math.isnan(by_query[2]) and interval.count == 4 and interval.note == "1 query without an order left out"


def test_lds_refuses():
  with pytest.raises(UserError, match=r"need \[Q,N\]"):
    ev.lds(np.zeros((2, 5)), np.zeros((4, 6)), np.zeros((4, 2)))
  with pytest.raises(UserError, match="2 retrained subsets are too few"):
    ev.lds(np.zeros((2, 5)), np.zeros((2, 5)), np.zeros((2, 2)))
  with pytest.raises(UserError, match="constant"):
    ev.lds(np.zeros((2, 5)), np.zeros((4, 5)), np.zeros((4, 2)))
