"""Linear datamodeling scores (LDS) with intervals that also cover the retrained models, differences, noise ceiling.

Letters: M retrained subsets, N examples, Q queries. Losses are in nats. NumPy and SciPy only.
"""

import dataclasses
import functools
import math

import numpy as np
from scipy import stats

from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.evaluation.statistics import Interval

DRAWS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """Rank correlations by query, with what other draws of the subsets would have given.

  Attributes:
    by_query: f64 [Q], NaN for a query without an order, which no mean counts.
    drawn: f64 [draws, Q], the same on redrawn subsets.
    models: M.
    seed: of the draws; equal seeds redraw the same subsets and queries, so that differences are paired.
  """

  by_query: np.ndarray
  drawn: np.ndarray
  models: int
  seed: int = 0

  @functools.cached_property
  def mean(self) -> float:
    """Mean over queries."""
    return float(np.nanmean(self.by_query))

  @functools.cached_property
  def queries(self) -> Interval:
    """Student t over queries: other queries, the same M models. The queries share the models, so it is too narrow."""
    return statistics.confidence_interval(self.by_query[~np.isnan(self.by_query)])

  @functools.cached_property
  def subsets(self) -> Interval:
    """Percentile bootstrap over the M models: other subsets, the same queries."""
    return self._interval(self.drawn)

  @functools.cached_property
  def both(self) -> Interval:
    """Percentile bootstrap that redraws models and queries together; the one to judge by."""
    size = self.by_query.size
    columns = np.random.default_rng((self.seed, 1)).integers(0, size, (len(self.drawn), size))
    return self._interval(np.take_along_axis(self.drawn, columns, axis=1))

  def minus(self, other: "Measured") -> "Measured":
    """The paired difference by query and by draw.

    Raises:
      UserError: the two are not of the same subsets and queries.
    """
    ours, theirs = ((one.models, *one.drawn.shape, one.seed) for one in (self, other))
    if ours != theirs:
      raise UserError(f"models, draws, queries and seed are {ours} and {theirs}: these LDS cannot be paired")
    return Measured(self.by_query - other.by_query, self.drawn - other.drawn, self.models, self.seed)

  def _interval(self, drawn: np.ndarray) -> Interval:
    known = ~np.isnan(drawn)  # neither a query without an order nor a draw that is one subset again and again
    counts = known.sum(axis=1)
    means = np.divide(np.where(known, drawn, 0).sum(axis=1), counts, out=np.full(len(drawn), np.nan), where=counts > 0)
    low, high = np.nanquantile(means, [0.025, 0.975])
    return Interval(self.mean, float(low), float(high), int(np.sum(~np.isnan(self.by_query))))


def measure(scores: np.ndarray, masks: np.ndarray, losses: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Measured:
  """LDS by query (`statistics.lds`): Spearman over the M subsets of summed scores and minus the measured loss.

  Args:
    scores: [Q, N].
    masks: bool [M, N], which examples each subset had.
    losses: [M, Q], measured after retraining.
    seed: of the bootstrap.
    draws: of the bootstrap.

  Raises:
    UserError: whatever `statistics.lds` refuses.
  """
  _, by_query = statistics.lds(scores, masks, losses)
  predicted = np.asarray(masks, np.float64) @ np.asarray(scores, np.float64).T
  return _bootstrap(by_query, predicted, -np.asarray(losses, np.float64), seed, draws)


def agreement(first: np.ndarray, second: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Measured:
  """Spearman by query of two measurements of the same subsets, [M, Q] each: two trainings with different seeds.

  Raises:
    UserError: shapes that differ, fewer than 3 subsets, or no query with an order.
  """
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  if first.shape != second.shape or first.ndim != 2 or len(first) < 3:
    raise UserError(f"agreement: {first.shape} against {second.shape}; need [M, Q] twice with M at least 3")
  by_query = np.array([statistics.spearman(a, b) for a, b in zip(first.T, second.T, strict=True)])
  if np.isnan(by_query).all():
    raise UserError("agreement: every query has the same loss after every training; nothing can be correlated")
  return _bootstrap(by_query, first, second, seed, draws)


def ceiling(repeated: Measured) -> float:
  """LDS of a score that knows each subset's expected loss: sqrt(r), r the agreement of two trainings of a subset.

  Two noisy measurements of one quantity correlate by r, either of them with the quantity by sqrt(r) (Spearman 1904,
  attenuation; for ranks about so). NaN when r is not positive.
  """
  return math.sqrt(repeated.mean) if repeated.mean > 0 else math.nan


def _bootstrap(by_query: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int, draws: int) -> Measured:
  rows = np.random.default_rng(seed).integers(0, len(first), (draws, len(first)))
  drawn = np.stack([_spearman(first[some], second[some]) for some in rows])
  return Measured(by_query, drawn, len(first), seed)


def _spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """`statistics.spearman` of each column, f64 [Q]; NaN where one is constant."""
  a, b = (stats.rankdata(values, axis=0) for values in (first, second))
  a, b = a - a.mean(axis=0), b - b.mean(axis=0)
  scale = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
  return np.divide((a * b).sum(axis=0), scale, out=np.full(scale.shape, np.nan), where=scale > 0)
