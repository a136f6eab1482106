"""Greedy gradient matching: a set of examples whose mean (projected) gradient is that of the queries. NumPy only.

Letters: N examples of the pool, d features.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_GRAM_BYTES = 2**28  # up to 5,792 examples the whole Gram matrix fits, and beats an eighth of its columns one by one
_BLOCK_BYTES = 2**26  # of rows that are float64 at the same time
_MOST_PRODUCTS = 2000  # of all features with one vector, where there is no Gram matrix: each reads all of them


def greedy_matching(
  features: np.ndarray,
  target: np.ndarray,
  count: int,
  rows: np.ndarray | None = None,
  block: int | None = None,
  costs: np.ndarray | None = None,
  strata: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
  """Adds, one by one, the example that brings the mean feature of the selected set closest to the target.

  Step m + 1 takes argmin_j |(s + f_j) / (m + 1) - t|^2, s the sum over the m rows taken (method.md section 9), which is
  argmin_j 2 f_j.s + |f_j|^2 - 2 (m + 1) f_j.t; f_j.s grows by one column of F F^T a step and is summed in float64, as
  are |f_j|^2 and f_j.t. The columns are float64 only where all of F F^T is made first: up to 5,792 examples of which an
  eighth or more is taken. Else they are products in the dtype of the features.

  Args:
    features: f32 or f64 [N, d].
    target: [d].
    count: number of rows to take.
    rows: the pool, row numbers in order of preference among ties; all rows when None.
    block: rows that are taken between two updates of f_j.s; 1 is the rule above. When None: 1 up to 5,792
      examples, else so many that the features are read 2,000 times in all, not once a row.
    costs: f64, of each of `rows`: the step takes what decreases the distance most for its cost, and where nothing
      decreases it the rule above.
    strata: (int, the stratum of each of `rows`; int [count], the stratum of each step, which takes one of its rows).

  Returns:
    int [count], row numbers of `features` in order of choice.
  """
  rows = np.arange(len(features)) if rows is None else np.asarray(rows)
  twin = _first_copies(features, rows)  # exact copies share their numbers, so that their tie is exact
  norm, towards = _norms_and_products(features, np.asarray(target, np.float64))
  norm, towards = norm[twin], towards[twin]
  small = len(features) ** 2 * 8 <= _GRAM_BYTES
  products_fn = _products_fn(features, hold=small and count * 8 >= len(features))
  block = block or (1 if small else -(-count // _MOST_PRODUCTS))
  overlap, waiting, free = np.zeros(len(rows)), [], np.ones(len(rows), bool)
  chosen, square, along = np.empty(count, np.int64), 0.0, 0.0  # of the sum s: |s|^2 and s.t
  for step in range(count):
    distance = 2 * overlap + norm - 2 * (step + 1) * towards
    allowed = free if strata is None else free & (strata[0] == strata[1][step])
    value = distance if costs is None else _by_cost(distance, (square, along), step, costs, allowed)
    best = int(np.argmin(np.where(allowed, value, np.inf)))
    square, along = square + 2 * overlap[best] + norm[best], along + towards[best]
    chosen[step], free[best] = rows[best], False
    waiting.append(twin[best])
    if len(waiting) == block:
      overlap += products_fn(waiting)[twin]
      waiting = []
  return chosen


def _by_cost(
  distance: np.ndarray, of_sum: tuple[float, float], step: int, costs: np.ndarray, allowed: np.ndarray
) -> np.ndarray:
  """What the next step of `greedy_matching` makes least: minus the decrease of |mean - t|^2 for a unit of cost, f64."""
  square, along = of_sum
  before = square / step**2 - 2 * along / step if step else 0.0
  decrease = before - ((square + distance) / (step + 1) ** 2 - 2 * along / (step + 1))
  return -decrease / costs if np.any(decrease[allowed] > 0) else distance


def herding(kernel: np.ndarray, towards: np.ndarray, count: int) -> np.ndarray:
  """`greedy_matching` where only inner products are known: the set whose mean is closest to a target's in a kernel.

  Step m + 1 takes argmin_j 2 sum_i K_ij + K_jj - 2 (m + 1) t_j over the m rows i taken (kernel herding with the norm of
  each example: Chen, Welling, Smola 2010, "Super-samples from kernel herding"). Ties go by row.

  Args:
    kernel: K of every pair of examples, f64 [N, N].
    towards: K of every example with the target, a mean over queries, f64 [N].
    count: number of rows to take, at most N.

  Returns:
    int64 [count], in order of choice.
  """
  own, overlap, free = np.diag(kernel), np.zeros(len(towards)), np.ones(len(towards), bool)
  chosen = np.empty(count, np.int64)
  for step in range(count):
    distance = 2 * overlap + own - 2 * (step + 1) * towards
    chosen[step] = best = int(np.argmin(np.where(free, distance, np.inf)))
    free[best] = False
    overlap += kernel[best]
  return chosen


def path(features: np.ndarray, target: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """How close a set's mean feature is to its target after each row: |mean - t|^2 - |t|^2.

  Args:
    features: f32 or f64 [N, d].
    target: [d].
    rows: int [S], in order of choice.

  Returns:
    f64 [S].
  """
  target = np.asarray(target, np.float64)
  total, found = np.zeros_like(target), np.empty(len(rows))
  for step, row in enumerate(rows):
    total += features[row]
    found[step] = total @ total / (step + 1) ** 2 - 2 * (total @ target) / (step + 1)
  return found


def herding_path(kernel: np.ndarray, towards: np.ndarray, order: np.ndarray) -> np.ndarray:
  """`path` of an order of `herding`, with the same kernel [N, N] and towards [N]: f64 [S]."""
  order = np.asarray(order)
  sizes = np.arange(1, len(order) + 1)
  inside = np.asarray(kernel)[np.ix_(order, order)]
  among = np.cumsum(2 * np.tril(inside, -1).sum(axis=1) + np.diag(inside))
  return among / sizes**2 - 2 * np.cumsum(towards[order]) / sizes


def _first_copies(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """For each of `rows`, the first of them with the same features, bit for bit."""
  first: dict[bytes, int] = {}
  digests = (hashlib.blake2b(np.ascontiguousarray(features[r]), digest_size=16).digest() for r in rows)
  return np.array([first.setdefault(digest, row) for digest, row in zip(digests, rows, strict=True)], np.int64)


def _norms_and_products(features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """|f_j|^2 and f_j.t, f64 [N] each, in blocks of rows so that no f64 copy of the features exists."""
  norm, products = np.empty(len(features)), np.empty(len(features))
  for start in range(0, len(features), 1024):
    block = features[start : start + 1024].astype(np.float64)
    norm[start : start + 1024] = np.einsum("nd,nd->n", block, block)
    # As a matrix of one column: BLAS sums a matrix and a vector in another order.
    products[start : start + 1024] = (block @ target[:, None])[:, 0]
  return norm, products


def _products_fn(features: np.ndarray, hold: bool) -> Callable[[list[int]], np.ndarray]:
  """Some rows -> the sum of those columns of F F^T, f64 [N]; `hold`: from the whole F F^T, made once in float64.

  Otherwise the rows are added and multiplied in the dtype of the features, and the result alone is float64.
  """
  if not hold:
    return lambda rows: (features @ features[rows].sum(axis=0)).astype(np.float64)
  gram = products_of_pairs(features)
  return lambda rows: gram[rows].sum(axis=0)


def products_of_pairs(features: np.ndarray) -> np.ndarray:
  """F F^T, f64 [N, N], in blocks of columns so that no f64 copy of the features exists."""
  size, width = features.shape
  gram = np.zeros((size, size))
  for start in range(0, width, 4096):
    block = features[:, start : start + 4096].astype(np.float64)
    gram += block @ block.T
  return gram


class Shrunk(NamedTuple):
  """What `shrunk_target` gives.

  Attributes:
    target: f64 [d].
    kept: share of the way from the pool's mean to the queries' mean that it goes, 0 to 1.
    beyond_chance: share of that distance that is more than two samples of one distribution would be apart, 0 to 1.
  """

  target: np.ndarray
  kept: float
  beyond_chance: float


def shrunk_target(
  queries: np.ndarray, features: np.ndarray, query_weights: np.ndarray, feature_weights: np.ndarray
) -> Shrunk:
  """The queries' mean, drawn towards the pool's mean as far as its sampling error leaves open.

  t = p + max(0, 1 - V_q / |q - p|^2) (q - p), the positive-part James-Stein estimator about the pool's mean: q and p
  are the weighted means of queries and pool, V_q an estimate of the squared error of q: the sum of
  w_i^2 |x_i - mean|^2 / (1 - sum of w_i^2), with weights that sum to 1; exact copies are one draw, and a single query
  is taken to vary as examples of the pool do. Of one distribution |q - p|^2 is about V_q + V_p, so that t weighs both
  means by how well they are known: a few queries say less about their mean than a large pool of their own kind, many
  say more, and queries of another kind are believed. With V_p the same of the pool, the share beyond chance is
  max(0, 1 - (V_q + V_p) / |q - p|^2).

  Args:
    queries: [Q, d].
    features: f32 or f64 [P, d], of the pool.
    query_weights: [Q], not negative.
    feature_weights: [P], not negative.

  """
  return drawn_to(_mean_and_noise(queries, query_weights)[:2], _mean_and_noise(features, feature_weights))


def drawn_to(queries: tuple[np.ndarray, float], pool: tuple[np.ndarray, float, float]) -> Shrunk:
  """`shrunk_target` of means and their expected squared errors; the pool's with its number of equal draws."""
  (q, q_noise), (p, p_noise, draws) = queries, pool
  if not np.isfinite(q_noise):  # one query, as often as it may be there: taken to vary as one example of the pool
    q_noise = p_noise * draws
  apart = float(np.sum((q - p) ** 2))
  more_than = lambda noise: max(0.0, 1.0 - noise / apart) if apart > 0 else 0.0  # noqa: E731
  kept = more_than(q_noise)
  return Shrunk(p + kept * (q - p), kept, more_than(q_noise + p_noise))


def _mean_and_noise(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float, float]:
  """(weighted mean f64 [d], its expected squared error, of how many equal draws), without an f64 copy of all rows.

  The error of one draw is not known: infinite.
  """
  weights = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64)
  twin = _first_copies(rows, np.arange(len(rows)))
  weights = np.bincount(twin, weights, len(rows))
  step = max(1, _BLOCK_BYTES // (8 * rows.shape[1]))
  blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
  mean = sum(weights[block] @ rows[block].astype(np.float64) for block in blocks)
  spread = 0.0
  for block in blocks:
    apart = rows[block] - mean
    spread += float(weights[block] ** 2 @ np.einsum("nd,nd->n", apart, apart))
  square = float(weights @ weights)
  return mean, spread / (1.0 - square) if square < 1.0 - 1e-12 else np.inf, 1.0 / square
