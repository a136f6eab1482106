"""Perplexity, intervals, rank agreement, AUC, LDS, and the verdict on a selection. NumPy and SciPy only.

Letters: N test examples, Q queries, M retrained subsets. Losses and nll are in nats. Every random step has a seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np
from scipy import stats

from in2core_jax.errors import UserError

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
    raise UserError(f"{name}: {a.size} values against {b.size}; both must be of the same examples in the same order")
  return a, b


def _check_level(level: float) -> None:
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
      f"tokens: {tokens.sum():.0f} response tokens in {tokens.size} examples; the test set needs responses"
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
  _check_level(level)
  values = _values(values, "values")
  count, mean = values.size, float(values.mean())
  if count == 1:
    return Interval(mean, math.nan, math.nan, 1, level, "one value, no interval")
  half = stats.t.ppf(0.5 + level / 2, count - 1) * values.std(ddof=1) / math.sqrt(count)
  return Interval(mean, mean - float(half), mean + float(half), count, level)


def bootstrap_interval(
  values: Sequence[float], weights: Sequence[float] | None = None, level: float = 0.95, seed: int = 0, draws: int = 4000
) -> Interval:
  """Percentile bootstrap of the (weighted) mean over test examples, sum w x / sum w of the redrawn examples.

  It says what other test examples would have given, and nothing about other training seeds. With values nll / tokens
  and weights tokens, `.map(math.exp)` is the interval of the token-weighted perplexity.

  Args:
    values: [N]. weights: [N], not negative; equal when None.
    level: of the interval. seed: of the draws. draws: number of redrawn sets.

  Raises:
    UserError: empty, not finite, negative weights or a level outside (0, 1).
  """
  _check_level(level)
  values = _values(values, "values")
  values, weights = _pair(values, np.ones(values.size) if weights is None else weights, "values and weights")
  if (weights < 0).any() or weights.sum() == 0:
    raise UserError("weights must not be negative, and not all 0")
  mean = float(values @ weights / weights.sum())
  if values.size == 1:
    return Interval(mean, math.nan, math.nan, 1, level, "one example, no interval")
  rng, means = np.random.default_rng(seed), np.empty(draws)
  chunk = max(1, 4_000_000 // values.size)  # 32 MB of row numbers at a time
  for start in range(0, draws, chunk):
    rows = rng.integers(0, values.size, (min(chunk, draws - start), values.size))
    drawn = weights[rows]
    total = drawn.sum(axis=1)
    sums = (drawn * values[rows]).sum(axis=1)
    means[start : start + chunk] = np.divide(sums, total, out=np.full(len(rows), mean), where=total > 0)
  low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
  return Interval(mean, float(low), float(high), values.size, level)


def paired_comparison(
  loss_a: np.ndarray, loss_b: np.ndarray, weights: np.ndarray | None = None, level: float = 0.95, seed: int = 0
) -> Interval:
  """Mean of loss_a - loss_b over the same test examples, with a bootstrap interval; negative = a is better.

  Pairing removes what makes an example hard for both models, which is most of the spread.
  """
  loss_a, loss_b = _pair(loss_a, loss_b, "loss_a and loss_b")
  return bootstrap_interval(loss_a - loss_b, weights, level, seed)


def difference_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
  """mean(a) - mean(b) of two independent groups of seeds.

  Two or more on both sides: Welch's t interval. One against several: the t interval of a new observation,
  s sqrt(1 + 1/n), as if the single one came from the same spread. One against one: no interval.
  """
  _check_level(level)
  a, b = _values(a, "a"), _values(b, "b")
  mean, count = float(a.mean() - b.mean()), a.size + b.size
  if a.size == 1 and b.size == 1:
    return Interval(mean, math.nan, math.nan, count, level, "one seed each, no interval")
  if min(a.size, b.size) == 1:
    many = a if a.size > 1 else b
    freedom, error = many.size - 1, many.std(ddof=1) * math.sqrt(1 + 1 / many.size)
  else:
    parts = np.array([a.var(ddof=1) / a.size, b.var(ddof=1) / b.size])
    error = math.sqrt(parts.sum())
    shares = parts**2 / np.array([a.size - 1, b.size - 1])
    freedom = parts.sum() ** 2 / shares.sum() if error > 0 else 1
  half = float(stats.t.ppf(0.5 + level / 2, freedom) * error)
  return Interval(mean, mean - half, mean + half, count, level)


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Interval:
  """Ratio of the geometric means of two independent groups of seeds: `difference_interval` of the logarithms."""
  return difference_interval(np.log(ours), np.log(theirs), level).map(_exp)


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
  _check_level(level)
  signal, positive = _pair(signal, positive, "signal and positive")
  positive = positive.astype(bool)
  plus, minus = signal[positive], signal[~positive]
  if plus.size == 0 or minus.size == 0:
    raise UserError(f"AUC needs both classes: {plus.size} positives and {minus.size} negatives")
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
      f"lds: {len(masks)} retrained subsets are too few for a rank correlation; use at least 3, better 64"
    )
  predicted = masks @ scores.T
  by_query = np.array([spearman(predicted[:, q], -losses[:, q]) for q in range(len(scores))])
  known = by_query[~np.isnan(by_query)]
  if known.size == 0:
    raise UserError("lds: for every query the losses or the summed scores are constant; nothing can be correlated")
  interval = confidence_interval(known, level)
  if known.size < by_query.size:
    note = f"{by_query.size - known.size} queries without an order left out"
    interval = Interval(interval.mean, interval.low, interval.high, known.size, level, note)
  return interval, by_query


# ------------------------------------------------------------------------------------- retrain and compare


@dataclass(frozen=True, eq=False)
class RetrainRow:
  """One retrained model.

  Args:
    policy: what chose its data ("full" and "random" are the yardsticks). seed: of the training and of a random policy.
    examples, tokens, response_tokens: size of the set. steps, trained_tokens: optimiser steps and response tokens seen.
    perplexity: token-weighted, on the test set. example_perplexity: exp of the mean per-example loss.
    loss_per_test_example: f64 [N], mean nats of each test example, the same examples in every row; may be empty.
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

  def as_json(self) -> dict:
    """All fields as JSON values."""
    return asdict(self) | {"loss_per_test_example": np.asarray(self.loss_per_test_example).tolist()}

  @classmethod
  def from_json(cls, stored: Mapping) -> "RetrainRow":
    """Inverse of `as_json`; other keys are ignored."""
    values = {one.name: stored[one.name] for one in fields(cls)}
    return cls(**values | {"loss_per_test_example": np.array(stored["loss_per_test_example"])})


def _by_policy(rows: Sequence[RetrainRow]) -> dict[str, list[RetrainRow]]:
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


def summarise(rows: Sequence[RetrainRow], level: float = 0.95) -> list[dict]:
  """One plain dict per policy, in order of first appearance: means over seeds, and intervals of the perplexities.

  Keys: policy, seeds, examples, tokens, response_tokens, steps, trained_tokens, and for perplexity and
  example_perplexity the mean and `_low`, `_high` (Student t over seeds; NaN with one seed), `_min`, `_max`.
  """
  table = []
  for policy, group in _by_policy(rows).items():
    summary = {"policy": policy, "seeds": len(group)}
    for name in ("examples", "tokens", "response_tokens", "steps", "trained_tokens"):
      summary[name] = round(float(np.mean([getattr(row, name) for row in group])))
    for name in ("perplexity", "example_perplexity"):
      values = [getattr(row, name) for row in group]
      interval = confidence_interval(values, level)
      summary |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
      summary |= {f"{name}_min": float(min(values)), f"{name}_max": float(max(values))}
    table.append(summary)
  return table


def verdict(rows: Sequence[RetrainRow], level: float = 0.95) -> str:
  """Plain sentences: does each policy beat random sets, and how does it compare with full data?

  A difference of log perplexities is called lower or higher only when its interval over seeds (`difference_interval`)
  excludes 0; otherwise the two cannot be told apart. With one seed on both sides the paired bootstrap over test
  examples is reported instead, and said to be silent about other seeds. Beside it belongs `many_comparisons`, which
  counts the intervals of all verdicts that are read together.
  """
  groups = _by_policy(rows)
  others = [name for name in groups if name not in (RANDOM, FULL)]
  lines = [_yardsticks(groups)]
  if not others:
    lines.append("No other policy was retrained, so there is no selection to judge.")
  for name in others:
    parts = [_compare(groups[name], groups[y], level) for y in (RANDOM, FULL) if y in groups]
    perplexities = _spread([row.perplexity for row in groups[name]], "seed")
    lines.append(f"{name}: perplexity {perplexities}" + ("; " + "; ".join(parts) if parts else "") + ".")
    if RANDOM in groups:
      lines += _token_caveat(name, groups[name], groups[RANDOM])
  return "\n".join(lines)


def many_comparisons(tables: Sequence[Sequence[RetrainRow]], level: float = 0.95) -> list[str]:
  """One sentence, for all verdicts that are read together: how many of their calls are expected to be chance.

  Args:
    tables: the rows behind each verdict. level: of its intervals.

  Returns:
    The sentence, or nothing where at most one comparison with random sets has an interval.
  """
  counts = dict.fromkeys((RANDOM, FULL), 0)
  for groups in map(_by_policy, tables):
    for yardstick in counts.keys() & groups.keys():
      judged = [name for name in groups if name not in counts]
      # One seed on both sides has no interval and calls no difference.
      counts[yardstick] += sum(len(groups[name]) > 1 or len(groups[yardstick]) > 1 for name in judged)
  if counts[RANDOM] < 2:
    return []
  return [
    f"{sum(counts.values())} comparisons, each at {level:.0%}: where nothing differs, one in {1 / (1 - level):.0f} is "
    "called a difference by chance."
  ]


def _spread(values: Sequence[float], unit: str) -> str:
  if len(values) == 1:
    return f"{values[0]:.3f} (one {unit})"
  return f"{np.mean(values):.3f} (mean of {len(values)} {unit}s, {min(values):.3f} to {max(values):.3f})"


def _yardsticks(groups: dict[str, list[RetrainRow]]) -> str:
  parts = []
  for name, label in ((FULL, "Full data"), (RANDOM, "Random sets")):
    values = [row.perplexity for row in groups.get(name, ())]
    parts.append(f"{label}: {'perplexity ' + _spread(values, 'seed') if values else 'not retrained'}.")
  return " ".join(parts)


def _compare(group: Sequence[RetrainRow], against: Sequence[RetrainRow], level: float) -> str:
  """One clause: `group` against random sets or full data."""
  label = "random" if against[0].policy == RANDOM else "full data"
  ours, theirs = ([row.perplexity for row in rows] for rows in (group, against))
  ratio = ratio_interval(ours, theirs, level)
  if math.isnan(ratio.low):
    return f"{ratio.mean:.3f} times {label}'s; one seed each cannot tell them apart{_paired(group, against, level)}"
  bounds = f"{ratio.mean:.3f} times {label}'s, {level:.0%} interval {ratio.low:.3f} to {ratio.high:.3f}"
  if ratio.high < 1 or ratio.low > 1:
    return f"{'lower (better)' if ratio.high < 1 else 'higher (worse)'} than {label} ({bounds})"
  side = ""
  if max(ours) < min(theirs) or min(ours) > max(theirs):
    word = "below" if max(ours) < min(theirs) else "above"
    side = f", though {word} every one of the {len(theirs)}" if len(theirs) > 1 else ""
  return f"cannot be told apart from {label} ({bounds}{side})"


def _paired(group: Sequence[RetrainRow], against: Sequence[RetrainRow], level: float) -> str:
  """The paired bootstrap over test examples, where both sides kept the losses.

  By example, and so said: the ratio beside it is by token, and may have the other sign.
  """
  ours, theirs = (np.asarray(rows[0].loss_per_test_example) for rows in (group, against))
  if ours.size == 0 or theirs.size == 0:
    return ""
  change = paired_comparison(ours, theirs, level=level)
  if math.isnan(change.low):
    return ""
  return (
    f" (by example and not by token, over the {change.count} test examples alone and not over seeds, the mean loss "
    f"differs by {change.mean:+.3f} nats, {level:.0%} interval {change.low:+.3f} to {change.high:+.3f})"
  )


def _token_caveat(name: str, group: Sequence[RetrainRow], random: Sequence[RetrainRow]) -> list[str]:
  ours, theirs = (float(np.mean([row.trained_tokens for row in rows])) for rows in (group, random))
  if theirs <= 0 or 0.9 <= ours / theirs <= 1.1:
    return []
  return [f"  Mind that {name} trained on {ours / theirs:.0%} of the response tokens that random did."]
