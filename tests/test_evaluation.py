"""Perplexities, intervals, ranks, AUC, LDS against brute force; and what the verdict may say."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from in2core_jax import evaluation as ev
from in2core_jax.errors import UserError
from in2core_jax.evaluation import RetrainRow


def row(policy, seed, value, tokens=1000, losses=()):
  return RetrainRow(policy, seed, 10, 200, 100, 50, tokens, value, value + 1, np.asarray(losses, np.float64))


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
  assert math.isnan(ev.bootstrap_interval([3.5]).low)


def test_confidence_interval_covers_the_mean_as_often_as_it_says():
  rng = np.random.default_rng(0)
  intervals = [ev.confidence_interval(rng.normal(2.0, 3.0, 4), 0.8) for _ in range(2000)]
  assert np.mean([i.low <= 2.0 <= i.high for i in intervals]) == pytest.approx(0.8, abs=0.03)


def test_bootstrap_interval():
  rng = np.random.default_rng(1)
  values = rng.normal(5.0, 2.0, 400)
  interval = ev.bootstrap_interval(values, seed=3)
  error = values.std() / 20
  assert interval.mean == pytest.approx(values.mean())
  assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
  assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
  assert ev.bootstrap_interval(values, seed=3) == interval
  assert ev.bootstrap_interval(values, seed=4) != interval


def test_bootstrap_interval_of_a_weighted_mean_is_that_of_the_ratio():
  rng = np.random.default_rng(2)
  tokens = rng.integers(1, 50, 300)
  nll = tokens * rng.gamma(2.0, size=300)
  interval = ev.bootstrap_interval(nll / tokens, tokens, draws=3000).map(math.exp)
  rows = np.random.default_rng(9).integers(0, 300, (3000, 300))
  low, high = np.quantile(np.exp(nll[rows].sum(axis=1) / tokens[rows].sum(axis=1)), [0.025, 0.975])
  assert interval.mean == pytest.approx(ev.perplexity(nll, tokens))
  assert interval.low == pytest.approx(low, rel=0.02) and interval.high == pytest.approx(high, rel=0.02)
  with pytest.raises(UserError, match="negative"):
    ev.bootstrap_interval([1.0, 2.0], [1.0, -1.0])


def test_paired_comparison_sees_what_unpaired_cannot():
  rng = np.random.default_rng(0)
  hard = rng.normal(3.0, 2.0, 200)  # what makes an example hard for both models
  a, b = hard + rng.normal(0, 0.1, 200) - 0.05, hard + rng.normal(0, 0.1, 200)
  paired = ev.paired_comparison(a, b)
  assert paired.mean == pytest.approx(np.mean(a - b)) and paired.high < 0
  assert ev.bootstrap_interval(a).high > ev.bootstrap_interval(b).low
  with pytest.raises(UserError, match="same examples"):
    ev.paired_comparison(a, b[1:])


def test_difference_interval():
  a, b = [1.0, 1.2, 1.1], [2.0, 2.5, 2.2, 2.1]
  welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
  interval = ev.difference_interval(a, b)
  assert (interval.low, interval.high) == pytest.approx((welch.low, welch.high))
  half = stats.t.ppf(0.975, 3) * np.std(b, ddof=1) * math.sqrt(1.25)
  one = ev.difference_interval([1.0], b)
  assert (one.mean, one.low, one.high) == pytest.approx((-1.2, -1.2 - half, -1.2 + half))
  assert math.isnan(ev.difference_interval([1.0], [2.0]).low)
  same = ev.difference_interval([1.0, 1.0], [2.0, 2.0])
  assert (same.low, same.high) == (-1.0, -1.0)


def test_level_is_checked():
  for call in (ev.confidence_interval, ev.bootstrap_interval):
    with pytest.raises(UserError, match="level=95"):
      call([1.0, 2.0], level=95)


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
  assert math.isnan(by_query[2]) and interval.count == 4 and interval.note == "1 queries without an order left out"


def test_lds_refuses():
  with pytest.raises(UserError, match=r"need \[Q,N\]"):
    ev.lds(np.zeros((2, 5)), np.zeros((4, 6)), np.zeros((4, 2)))
  with pytest.raises(UserError, match="2 retrained subsets are too few"):
    ev.lds(np.zeros((2, 5)), np.zeros((2, 5)), np.zeros((2, 2)))
  with pytest.raises(UserError, match="constant"):
    ev.lds(np.zeros((2, 5)), np.zeros((4, 5)), np.zeros((4, 2)))


# --------------------------------------------------------------------------------------- retrain and compare


def test_summarise():
  table = ev.summarise([row("random", 0, 4.0), row("full", 0, 3.0), row("random", 1, 5.0)])
  assert [(t["policy"], t["seeds"], t["perplexity"]) for t in table] == [("random", 2, 4.5), ("full", 1, 3.0)]
  low, high = stats.t.interval(0.95, 1, loc=4.5, scale=0.5)
  assert (table[0]["perplexity_low"], table[0]["perplexity_high"]) == pytest.approx((low, high))
  assert (table[0]["perplexity_min"], table[0]["perplexity_max"], table[0]["example_perplexity"]) == (4.0, 5.0, 5.5)
  assert math.isnan(table[1]["perplexity_low"]) and table[1]["response_tokens"] == 100
  with pytest.raises(UserError, match="no retrained models"):
    ev.summarise([])
  with pytest.raises(UserError, match="two rows of seed 0"):
    ev.summarise([row("random", 0, 4.0), row("random", 0, 4.0)])


RANDOM = [row("random", s, p) for s, p in enumerate([4.00, 4.06, 4.12])]


def test_verdict_calls_a_clear_difference():
  rows = [row("full", s, 3.32 + s / 100) for s in range(3)] + RANDOM
  text = ev.verdict(rows + [row("proponents", s, 7.8 + s / 10) for s in range(3)])
  first, second = text.split("\n")
  assert first == (
    "Full data: perplexity 3.330 (mean of 3 seeds, 3.320 to 3.340). "
    "Random sets: perplexity 4.060 (mean of 3 seeds, 4.000 to 4.120)."
  )
  assert second.startswith(
    "proponents: perplexity 7.900 (mean of 3 seeds, 7.800 to 8.000); higher (worse) than random (1.9"
  )
  assert "higher (worse) than full data (2.37" in second
  better = ev.verdict(rows + [row("matching", s, 3.0 + s / 50) for s in range(3)])
  assert "lower (better) than random (0.7" in better and "lower (better) than full data (0.9" in better


def test_verdict_does_not_claim_what_the_interval_does_not_allow():
  text = ev.verdict(RANDOM + [row("matching", 0, 3.95)])  # below all three, within what a fourth could be
  assert "cannot be told apart from random" in text and "below every one of the 3" in text and "better" not in text
  assert "Full data: not retrained." in text and "full data's" not in text
  inside = ev.verdict(RANDOM + [row("matching", s, 4.05 + s / 50) for s in range(3)])
  assert "cannot be told apart" in inside and "every one" not in inside
  clear = ev.verdict(RANDOM + [row("matching", 0, 3.0)])
  assert "lower (better) than random" in clear


def test_verdict_with_one_seed_each():
  rng = np.random.default_rng(0)
  hard = rng.normal(3.0, 1.0, 100)
  rows = [row("random", 0, 4.0, losses=hard), row("matching", 0, 3.9, losses=hard - 0.1 + rng.normal(0, 0.1, 100))]
  text = ev.verdict(rows)
  assert "one seed each cannot tell them apart" in text
  assert "by example and not by token, over the 100 test examples alone and not over seeds, the mean loss " in text
  assert "differs by -0." in text
  assert "better" not in text


def test_verdict_minds_trained_tokens_and_nothing_to_judge():
  text = ev.verdict(RANDOM + [row("longest", 0, 3.0, tokens=1500)])
  assert "Mind that longest trained on 150% of the response tokens that random did." in text
  assert "Mind" not in ev.verdict(RANDOM + [row("matching", 0, 3.0, tokens=1080)])
  assert "no selection to judge" in ev.verdict(RANDOM)


def test_many_comparisons_are_counted_once_for_all_verdicts():
  full = [row("full", 0, 3.5)]
  one, two = [row("matching", 0, 3.0)], [row("longest", 0, 3.9)]
  (said,) = ev.many_comparisons([RANDOM + full + one + two])
  assert said == (
    "2 comparisons, each at 95%: where nothing differs, one in 20 is called a difference by chance."
  )  # those with full data have one seed each and no interval
  assert ev.many_comparisons([RANDOM + full + one]) == ev.many_comparisons([full + one + two]) == []
  assert ev.many_comparisons([RANDOM[:1] + one + two]) == ev.many_comparisons([]) == []
  budgets = [RANDOM + full + [row("full", 1, 3.6)] + one, RANDOM + one]
  (said,) = ev.many_comparisons(budgets, level=0.9)
  assert said.startswith("3 comparisons, each at 90%: where nothing differs, one in 10")


def test_verdict_is_rarely_wrong_when_nothing_differs():
  rng = np.random.default_rng(0)
  for ours in (1, 3):
    calls = 0
    for _ in range(400):
      values = np.exp(rng.normal(1.4, 0.02, 3 + ours))
      rows = [row("random" if i < 3 else "matching", i, v) for i, v in enumerate(values)]
      calls += "cannot be told apart" not in ev.verdict(rows)
    assert calls / 400 < 0.09  # 5 % by construction


def test_every_pair_of_counts_gives_a_sentence():
  for ours, theirs, full in itertools.product((1, 2), (0, 1, 3), (0, 1, 2)):
    rows = [row("p", s, 3 + s / 10) for s in range(ours)]
    rows += [row("random", s, 4 + s / 10) for s in range(theirs)] + [row("full", s, 2 + s / 10) for s in range(full)]
    text = ev.verdict(rows)
    assert "nan" not in text and "p: perplexity 3.0" in text
    assert ("random (" in text or "random's" in text) == (theirs > 0)
