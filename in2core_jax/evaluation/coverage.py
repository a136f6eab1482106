"""What covers a test point: the influence that it receives from the training set, and how well such signals tell.

  mean_q = (1/N) sum_i s_qi,   maximum_q = max_i s_qi,   positive mass_q = (1/N) sum_i max(s_qi, 0)

s_qi is the influence of training example i on test point q, or its cosine. A point that receives little is not covered
(In2Core, arXiv 2408.03560, section 5). Sums are over N so that training sets of different sizes compare.

Some points receive little of anything: long ones, odd ones, those of a small gradient. What the other test points would
give them is the yardstick:

  relative maximum_q = (a_q - b_q) / (|a_q| + |b_q|),   a_q = max_i s_qi,   b_q = max_r s_qr

over test points r other than q and its copies. A point that other test points help, and no training example does, is of
a kind that the training set lacks.

Letters: Q test points, N training examples, M observations: test points, each perhaps under several training sets.
"""

from collections.abc import Callable, Sequence

import numpy as np

from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation.statistics import Interval, roc_auc


def received(scores: np.ndarray) -> dict[str, np.ndarray]:
  """Aggregates of the influence that each test point receives.

  Args:
    scores: [Q, N].

  Returns:
    {"mean", "maximum", "positive mass": float64 [Q]}; more means better covered.

  Raises:
    UserError: no training example, or scores that are not finite.
  """
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 2 or scores.shape[1] == 0:
    raise UserError(f"coverage: scores of shape {scores.shape}; need [test points, training examples], one or more")
  if not np.isfinite(scores).all():
    raise UserError("coverage: scores that are not finite; look for NaN in the weights or in the losses")
  return {
    "mean": scores.mean(axis=1),
    "maximum": scores.max(axis=1),
    "positive mass": np.maximum(scores, 0).mean(axis=1),
  }


def relative_maximum(scores: np.ndarray, among: np.ndarray, ignored: np.ndarray) -> np.ndarray:
  """The highest score that training examples give each test point, against the highest that other points would give.

  Args:
    scores: [Q, N], of training examples.
    among: [Q, Q], the same of the test points themselves; row q is about point q.
    ignored: bool [Q, Q], which columns say nothing to which row: the point itself and its copies, points without score.

  Returns:
    float64 [Q] within [-1, 1], high where the training set covers; 0 where both are 0.

  Raises:
    UserError: a point has no other beside its copies.
  """
  alone = np.flatnonzero(ignored.all(axis=1))
  if alone.size:
    raise UserError(f"coverage: test point {alone[0]} has no other to compare it with; give more evaluation examples")
  ours = received(scores)["maximum"]
  theirs = np.where(ignored, -np.inf, np.asarray(among, np.float64)).max(axis=1)
  size = np.abs(ours) + np.abs(theirs)
  return (ours - theirs) / np.where(size > 0, size, 1.0)


def deal_topics(topics: Sequence[str], size: int, folds: int, seed: int) -> list[tuple[str, ...]]:
  """Deals topics out to folds, each topic at most once: the same ones whatever the order they come in.

  Args:
    topics: names, repeats counted once.
    size: topics of a fold.
    folds: how many.
    seed: of the order.

  Raises:
    UserError: fewer topics than that, or none left to train on.
  """
  names = sorted(set(topics))
  if size < 1 or folds < 1:
    raise UserError(f"{how_many(folds, 'fold')} of {how_many(size, 'held-out topic')}: both must be at least 1")
  if len(names) < 2:
    raise UserError(
      f"coverage holds topics out, and the data has {names or 'none'}: give every record a column topic, source or "
      "category, or name one with --data_fields=...,topic=NAME"
    )
  if size * folds > len(names) or size >= len(names):
    raise UserError(
      f"{how_many(folds, 'fold')} of {how_many(size, 'held-out topic')} need {how_many(folds * size, 'topic')}, and "
      f"one more than a fold has to train on; topics with training examples and test points: {', '.join(names)}"
    )
  mixed = [names[i] for i in np.random.default_rng((seed, 31)).permutation(len(names))]
  return [tuple(sorted(mixed[start : start + size])) for start in range(0, size * folds, size)]


def area(covered: np.ndarray, uncovered: np.ndarray) -> float:
  """P(the signal of an uncovered observation < of a covered one), ties one half: 1 for a perfect signal.

  Args:
    covered: [M], a signal that is high where the training set covers. uncovered: bool [M].
  """
  return roc_auc(-np.asarray(covered, np.float64), uncovered).mean


def by_point(
  statistic: Callable[[np.ndarray], float], points: Sequence[int], level: float = 0.95, seed: int = 0, draws: int = 1000
) -> Interval:
  """Percentile bootstrap that redraws test points with all of their observations.

  The same test point under several training sets is no independent observation, as intervals over observations take it
  to be. It says what other test points would have given, and nothing about other held-out topics.

  Args:
    statistic: rows (int [m]) of the observations -> a number; NaN where they do not define it, which is left out.
    points: [M], which test point each observation is of.
    level: of the interval. seed: of the draws. draws: how many.

  Raises:
    UserError: no draw defines the statistic.
  """
  points = np.asarray(points)
  members = [np.flatnonzero(points == point) for point in np.unique(points)]
  rng = np.random.default_rng(seed)
  drawn = rng.integers(0, len(members), (draws, len(members)))
  values = np.array([statistic(np.concatenate([members[i] for i in chosen])) for chosen in drawn], np.float64)
  values = values[~np.isnan(values)]
  if not values.size:
    raise UserError("coverage: no redrawn set of test points defines the statistic; there are too few of them")
  low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
  return Interval(float(statistic(np.arange(len(points)))), float(low), float(high), len(members), level)


def area_interval(
  covered: np.ndarray, uncovered: np.ndarray, points: Sequence[int], seed: int = 0, draws: int = 1000
) -> Interval:
  """`area` with its `by_point` interval.

  Args:
    covered: [M], a signal that is high where the training set covers. uncovered: bool [M].
    points: [M], which test point each observation is of.
    seed, draws: of the bootstrap.
  """
  return by_point(_area_of(covered, uncovered), points, seed=seed, draws=draws)


def area_difference(
  a: np.ndarray, b: np.ndarray, uncovered: np.ndarray, points: Sequence[int], seed: int = 0, draws: int = 1000
) -> Interval:
  """`area` of signal a minus that of b on the same observations, with its `by_point` interval; positive: a better.

  Args:
    a, b: [M], high where the training set covers.
    uncovered: bool [M].
    points: [M], which test point each observation is of.
    seed, draws: of the bootstrap.
  """
  ours, theirs = _area_of(a, uncovered), _area_of(b, uncovered)
  return by_point(lambda rows: ours(rows) - theirs(rows), points, seed=seed, draws=draws)


def _area_of(covered: np.ndarray, uncovered: np.ndarray) -> Callable[[np.ndarray], float]:
  """rows -> `area` of these observations, NaN where they are all of one kind."""
  covered, uncovered = np.asarray(covered, np.float64), np.asarray(uncovered, bool)

  def of(rows):
    known = uncovered[rows]
    return np.nan if known.all() or not known.any() else area(covered[rows], known)

  return of
