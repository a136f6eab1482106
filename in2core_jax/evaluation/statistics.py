"""Perplexity, intervals, rank agreement, AUC, LDS, and what is kept of a retrained model. NumPy and SciPy only.

Letters: N test examples, Q queries, M retrained subsets. Losses and nll are in nats. Every random step has a seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np
from scipy import stats

from in2core_jax.errors import UserError, how_many

RANDOM, FULL = "random", "full"  # the two policies that the others are judged against


@dataclass(frozen=True)
class Interval:
  """An estimate with its two-sided interval; NaN bounds mean that there is none, and `note` says why."""

  mean: float
  low: float
  high: float
  count: int
  level: float = 0.95
  note: str = ""

  def map(self, function: Callable[[float], float]) -> "Interval":
    """The interval of an increasing function of the estimate, such as exp of a mean loss."""
    return Interval(function(self.mean), function(self.low), function(self.high), self.count, self.level, self.note)

  def __str__(self) -> str:
    if math.isnan(self.low):
      return f"{self.mean:.4g} ({self.note or 'no interval'})"
    return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


def _values(values, name: str) -> np.ndarray:
  """f64 [N], not empty, finite."""
  array = np.asarray(values, np.float64).reshape(-1)
  if array.size == 0:
    raise UserError(f"{name}: no values; the evaluation or test set is empty")
  bad = np.flatnonzero(~np.isfinite(array))
  if bad.size:
    raise UserError(
      f"{name}: {bad.size} of {array.size} are NaN or infinite (first at {bad[0]}); training may have diverged"
    )
  return array


def _pair(a, b, name: str) -> tuple[np.ndarray, np.ndarray]:
  a, b = _values(a, name), _values(b, name)
  if a.size != b.size:
    raise UserError(
      f"{name}: {how_many(a.size, 'value')} against {b.size}; both must be of the same examples in the same order"
    )
  return a, b


def check_level(level: float) -> None:
  """Refuses a level that is no share.

  Raises:
    UserError: it is outside (0, 1).
  """
  if not 0 < level < 1:
    raise UserError(f"level={level} is outside (0, 1); 0.95 is a 95 % interval")


# ------------------------------------------------------------------------------------------------ perplexity


def _exp(value: float) -> float:
  with np.errstate(over="ignore"):
    return float(np.exp(value))


def _with_tokens(nll_sum, tokens) -> tuple[np.ndarray, np.ndarray]:
  nll_sum, tokens = _pair(nll_sum, tokens, "nll_sum and tokens")
  if (tokens < 0).any() or tokens.sum() == 0:
    raise UserError(
      f"tokens: {tokens.sum():.0f} response tokens in {how_many(tokens.size, 'example')}; the test set needs responses"
    )
  return nll_sum[tokens > 0], tokens[tokens > 0]


def perplexity(nll_sum: np.ndarray, tokens: np.ndarray) -> float:
  """Token-weighted perplexity, exp(sum nll / sum tokens).

  Args:
    nll_sum: [N], summed negative log-likelihood of each example's response tokens, nats.
    tokens: [N], response tokens; examples with 0 count for nothing.

  Returns:
    Perplexity, at least 1 for a language model; inf when it overflows.

  Raises:
    UserError: no examples, no response tokens, or values that are not finite.
  """
  nll_sum, tokens = _with_tokens(nll_sum, tokens)
  return _exp(nll_sum.sum() / tokens.sum())


def example_perplexity(nll_sum: np.ndarray, tokens: np.ndarray) -> float:
  """Per-example perplexity, exp(mean over examples of nll / tokens): short responses count as much as long ones."""
  nll_sum, tokens = _with_tokens(nll_sum, tokens)
  return _exp(np.mean(nll_sum / tokens))


# ------------------------------------------------------------------------------------------------- intervals


def confidence_interval(values: Sequence[float], level: float = 0.95) -> Interval:
  """Student t interval of the mean, mean +- t(n - 1) s / sqrt(n); for values over seeds.

  One value has no interval: NaN bounds, and the note says so.
  """
  check_level(level)
  values = _values(values, "values")
  count, mean = values.size, float(values.mean())
  if count == 1:
    return Interval(mean, math.nan, math.nan, 1, level, "one value, no interval")
  half = stats.t.ppf(0.5 + level / 2, count - 1) * values.std(ddof=1) / math.sqrt(count)
  return Interval(mean, mean - float(half), mean + float(half), count, level)


# -------------------------------------------------------------------------------------------- rank agreement


def spearman(a: np.ndarray, b: np.ndarray) -> float:
  """Spearman's rank correlation, ties by mean rank; NaN when either side is constant (it has no order)."""
  a, b = _pair(a, b, "spearman")
  if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
    return math.nan
  return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def top_overlap(a: np.ndarray, b: np.ndarray, fraction: float = 0.5) -> float:
  """Share of a's top `fraction` that is in b's too; chance level is `fraction`. Ties in row order.

  Raises:
    UserError: a fraction outside (0, 1] or different lengths.
  """
  a, b = _pair(a, b, "top_overlap")
  if not 0 < fraction <= 1:
    raise UserError(f"fraction={fraction} is outside (0, 1]; 0.5 compares the top halves")
  count = max(1, math.floor(fraction * a.size + 0.5))
  tops = [set(np.argsort(-x, kind="stable")[:count].tolist()) for x in (a, b)]
  return len(tops[0] & tops[1]) / count


def roc_auc(signal: np.ndarray, positive: np.ndarray, level: float = 0.95) -> Interval:
  """Area under the ROC curve with DeLong's interval: P(signal of a positive > of a negative), ties one half.

  Variance from the placements V of positives among negatives and the reverse: var(V+)/n+ + var(V-)/n- (DeLong 1988,
  by mid-ranks as Sun and Xu 2014), normal interval cut at [0, 1].

  Args:
    signal: [N], higher should mean positive. positive: bool [N]. level: of the interval.

  Raises:
    UserError: only one class is there.
  """
  check_level(level)
  signal, positive = _pair(signal, positive, "signal and positive")
  positive = positive.astype(bool)
  plus, minus = signal[positive], signal[~positive]
  if plus.size == 0 or minus.size == 0:
    raise UserError(f"AUC needs both classes: {how_many(plus.size, 'positive')} and {how_many(minus.size, 'negative')}")
  ranks = stats.rankdata(signal)
  above = (ranks[positive] - stats.rankdata(plus)) / minus.size
  below = 1 - (ranks[~positive] - stats.rankdata(minus)) / plus.size
  area = float(above.mean())
  if min(plus.size, minus.size) == 1:
    return Interval(area, math.nan, math.nan, signal.size, level, "one example of a class, no interval")
  half = stats.norm.ppf(0.5 + level / 2) * math.sqrt(above.var(ddof=1) / plus.size + below.var(ddof=1) / minus.size)
  note = "perfect separation: DeLong's interval has no width, other data can differ" if area in (0.0, 1.0) else ""
  return Interval(area, max(0.0, area - half), min(1.0, area + half), signal.size, level, note)


def lds(scores: np.ndarray, masks: np.ndarray, losses: np.ndarray, level: float = 0.95) -> tuple[Interval, np.ndarray]:
  """Linear datamodeling score: for each query, Spearman of summed scores against minus the measured loss.

  Positive influence lowers the loss, so a perfect predictor scores +1. The interval is Student's t over queries; the
  queries share the M retrained models, so it does not cover what other subsets would have given.

  Args:
    scores: [Q, N]. masks: bool [M, N], which examples each subset had. losses: [M, Q], measured after retraining.
    level: of the interval.

  Returns:
    The interval of the mean over queries, and f64 [Q] by query (NaN where losses or sums are constant; left out of the
    mean, and the note counts them).

  Raises:
    UserError: shapes do not fit, fewer than 3 subsets, or no query has an order.
  """
  scores, masks, losses = np.asarray(scores, np.float64), np.asarray(masks, np.float64), np.asarray(losses, np.float64)
  if scores.ndim != 2 or masks.shape != (len(losses), scores.shape[1]) or losses.shape[1:] != (len(scores),):
    raise UserError(f"lds: scores {scores.shape}, masks {masks.shape}, losses {losses.shape}; need [Q,N], [M,N], [M,Q]")
  if len(masks) < 3:
    raise UserError(
      f"lds: {how_many(len(masks), 'retrained subset[s] [is|are]')} too few for a rank correlation; use at least 3, "
      "better 64"
    )
  predicted = masks @ scores.T
  by_query = np.array([spearman(predicted[:, q], -losses[:, q]) for q in range(len(scores))])
  known = by_query[~np.isnan(by_query)]
  if known.size == 0:
    raise UserError("lds: for every query the losses or the summed scores are constant; nothing can be correlated")
  interval = confidence_interval(known, level)
  if known.size < by_query.size:
    note = f"{how_many(by_query.size - known.size, 'quer[y|ies]')} without an order left out"
    interval = Interval(interval.mean, interval.low, interval.high, known.size, level, note)
  return interval, by_query


# ----------------------------------------------------------------------------------------- retrained models


_OF_TEST_EXAMPLES = ("loss_per_test_example", "test_tokens", "test_groups")


@dataclass(frozen=True, eq=False)
class RetrainRow:
  """One retrained model.

  Args:
    policy: what chose its data ("full" and "random" are the yardsticks). seed: of the training and of a random policy.
    examples, tokens, response_tokens: size of the set. steps, trained_tokens: optimiser steps and response tokens seen.
    perplexity: token-weighted, on the test set. example_perplexity: exp of the mean per-example loss.
    loss_per_test_example: f64 [N], mean nats of each test example, the same examples in every row; may be empty.
    test_tokens: int [N], response tokens of these examples; may be empty.
    test_groups: int [N], equal for test examples that are drawn as a whole (copies, perhaps a topic); may be empty.
  """

  policy: str
  seed: int
  examples: int
  tokens: int
  response_tokens: int
  steps: int
  trained_tokens: int
  perplexity: float
  example_perplexity: float
  loss_per_test_example: np.ndarray = field(default_factory=lambda: np.zeros(0))
  test_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
  test_groups: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

  def as_json(self) -> dict:
    """All fields as JSON values."""
    return asdict(self) | {name: np.asarray(getattr(self, name)).tolist() for name in _OF_TEST_EXAMPLES}

  @classmethod
  def from_json(cls, stored: Mapping) -> "RetrainRow":
    """Inverse of `as_json`; other keys are ignored, and arrays that an older version did not keep are empty."""
    values = {one.name: stored[one.name] for one in fields(cls) if one.name not in _OF_TEST_EXAMPLES}
    return cls(**values | {name: np.array(stored.get(name, ())) for name in _OF_TEST_EXAMPLES})


def by_policy(rows: Sequence[RetrainRow]) -> dict[str, list[RetrainRow]]:
  """The rows of each policy, in order of first appearance.

  Raises:
    UserError: no rows, or two of one policy and seed.
  """
  if not rows:
    raise UserError("no retrained models to compare; run the evaluate stage with at least one policy")
  groups: dict[str, list[RetrainRow]] = {}
  for row in rows:
    group = groups.setdefault(row.policy, [])
    if row.seed in {other.seed for other in group}:
      raise UserError(
        f"policy {row.policy} has two rows of seed {row.seed}; counting one run twice narrows the interval"
      )
    group.append(row)
  return groups
