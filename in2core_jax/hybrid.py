"""Gradients and hidden states together: which examples of a pool are of the kind of the queries.

  K(x, y) = (cos_M(g_x, g_y) + cos_E(e_x, e_y)) / 2

g are projected gradients in the pool's whitened metric M (`whitening`), e mean-pooled last hidden states, whitened by
the pool's covariance (`embeddings.whitening`). Each finds what the other misses: hidden states tell topic and form of a
text, gradients what of it the model does not know yet. The mean of two cosines is the cosine of both vectors, each of
unit length, put in a row: one similarity, and a kernel.

How far queries and pool are apart, in that kernel, is the maximum mean discrepancy (Gretton et al. 2012, "A kernel
two-sample test"):

  |mean of queries - mean of pool|^2 = mean K(q, q') + mean K(p, p') - 2 mean K(q, p)

Over all pairs it counts the sampling error of both means; over pairs of different examples it does not, and is 0 on
average where queries and pool are draws of one distribution. The share that is beyond chance is the second over the
first.

Letters: Q queries, N examples of the pool, W numbers of a projected gradient, D of a hidden state.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from in2core_jax import embeddings
from in2core_jax.whitening import WhitenedMetric, check_gradients, spread_rows

EMBEDDING_DAMPING = 0.05  # of the largest eigenvalue of the hidden states' covariance (docs/selection.md)
_PAIRS = 1024  # examples of the pool whose similarities with each other are averaged


@dataclasses.dataclass(frozen=True, eq=False)
class Hybrid:
  """What `hybrid` gives.

  Attributes:
    similarity: K of every query and example, f64 [Q, N].
    beyond_chance: share of the squared distance between the means of queries and pool that is beyond their sampling
      error, 0 to 1.
  """

  similarity: np.ndarray
  beyond_chance: float


def whitened_embedding(queries: np.ndarray, pool: np.ndarray, others: np.ndarray) -> np.ndarray:
  """cos_E of every query and each of some others, where the pool's hidden states have no direction in common.

  Args:
    queries: [Q, D].
    pool: [P, D], whose covariance it is.
    others: [N, D].

  Returns:
    f64 [Q, N].
  """
  image = embeddings.whitening(pool, EMBEDDING_DAMPING)
  return embeddings.cosine_to(image(queries), image(others)).astype(np.float64)


def hybrid(
  gradients: tuple[np.ndarray, np.ndarray],
  hidden: tuple[np.ndarray, np.ndarray],
  ids: Sequence[str],
  counted: np.ndarray,
) -> Hybrid:
  """Similarity of every query with every example of the pool, and how far the queries are from the pool as a whole.

  Args:
    gradients: projected, of the queries [Q, W] and of the pool [N, W].
    hidden: pooled hidden states of the same, [Q, D] and [N, D].
    ids: N example ids; which examples stand for the pool follows from them, not from the order of reading.
    counted: bool [N], which examples have a response: the others make no part of metric and mean.

  Raises:
    UserError: gradients or hidden states that are not finite, or all 0.
  """
  (target, features), (asked, told) = gradients, hidden
  check_gradients(target, features)
  pool = np.flatnonzero(counted)
  metric = WhitenedMetric.fit(features[pool], ids=[ids[row] for row in pool])
  some = pool[spread_rows([ids[row] for row in pool], _PAIRS)]

  def kernel(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return (metric.cosines(a[0], b[0]) + whitened_embedding(a[1], told[pool], b[1])) / 2

  queries, sample = (target, asked), (features[some], told[some])
  similarity = kernel(queries, (features, told))
  apart = beyond_chance(kernel(queries, queries), similarity[:, some], kernel(sample, sample))
  return Hybrid(similarity, apart)


def beyond_chance(among_queries: np.ndarray, between: np.ndarray, among_pool: np.ndarray) -> float:
  """Share of the squared distance of two means that is beyond their sampling error, 0 to 1.

  Args:
    among_queries: [Q, Q], K of the queries. between: [Q, P]. among_pool: [P, P].

  Returns:
    0 for a single query or example, which says nothing about sampling error.
  """
  if min(between.shape) < 2:
    return 0.0
  with_self = among_queries.mean() + among_pool.mean() - 2 * between.mean()
  without = sum((own.sum() - np.trace(own)) / (len(own) * (len(own) - 1)) for own in (among_queries, among_pool))
  return float(np.clip((without - 2 * between.mean()) / with_self, 0, 1)) if with_self > 0 else 0.0
