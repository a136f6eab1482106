"""Gradients and hidden states together: which examples of a pool are of the kind of the queries.

  K(x, y) = (cos_M(g_x, g_y) + cos_E(e_x, e_y) + cos_L(l_x, l_y)) / 3

g are projected gradients in the pool's whitened metric M (`whitening`); e are the last hidden states, averaged over an
example's tokens, and l those of its last token, each whitened by the pool's covariance (`embeddings.whitening`). Each
finds what the others miss: averages tell what a text is about, the last token what kind of turn has ended, gradients
what of it the model does not know yet. The mean of cosines is the cosine of all vectors, each of unit length, put in a
row: one similarity, and a kernel.

Letters: Q queries, N examples of the pool, W numbers of a projected gradient, V views of D hidden numbers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from in2core_jax import embeddings
from in2core_jax.two_samples import Apart, apart
from in2core_jax.whitening import Measured, WhitenedMetric, check_gradients, spread_rows

EMBEDDING_DAMPING = 0.05  # of the largest eigenvalue of the hidden states' covariance (docs/selection.md)
VIEWS = ("mean", "last")  # poolings of the hidden states
NEIGHBOURS = 3  # queries that speak together
_PAIRS = 1024  # examples of the pool whose similarities with each other are averaged


def smoothed(similarity: np.ndarray, among: np.ndarray, count: int = NEIGHBOURS) -> np.ndarray:
  """Each query's similarities, averaged with those of the queries most like it: less chance in a single query's word.

  Args:
    similarity: of queries and examples, [Q, N].
    among: of the queries, [Q, Q].
    count: of queries that speak together, the query itself among them; all where there are fewer.

  Returns:
    f64 [Q, N].
  """
  order = among.copy()
  np.fill_diagonal(order, np.inf)  # itself comes first
  nearest = np.argsort(-order, axis=1, kind="stable")[:, :count]
  return np.asarray(similarity, np.float64)[nearest].mean(axis=1)


def whitened_embedding(queries: np.ndarray, pool: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Mean over the views of the cosine of hidden states where the pool's have no direction in common.

  Args:
    queries: [Q, V, D].
    pool: [P, V, D], whose covariances they are.
    others: [N, V, D].

  Returns:
    f64 [Q, N]; a view in which the pool's hidden states do not differ tells nothing apart, and is 0.
  """
  total = np.zeros((len(queries), len(others)))
  for view in range(pool.shape[1]):
    if np.ptp(pool[:, view], axis=0).any():
      image = embeddings.whitening(pool[:, view], EMBEDDING_DAMPING)
      total += embeddings.cosine_to(image(queries[:, view]), image(others[:, view]))
  return total / pool.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class HybridMetric:
  """K of a pool; make one with `fit`.

  Attributes:
    metric: of its gradients.
    pool: N gradients in that metric.
    hidden: views of the hidden states of the same examples, [N, V, D].
    counted: int, rows of the examples that metric and mean are of.
    some: int, the rows of them whose similarities with each other stand for all.
  """

  metric: WhitenedMetric
  pool: Measured
  hidden: np.ndarray
  counted: np.ndarray
  some: np.ndarray

  @classmethod
  def fit(cls, features: np.ndarray, hidden: np.ndarray, ids: Sequence[str], counts: np.ndarray) -> "HybridMetric":
    """The metric of a pool.

    Args:
      features: projected gradients, f32 or f64 [N, W]; 0 without a response.
      hidden: views of the last hidden states of the same examples (`VIEWS`), [N, V, D].
      ids: N example ids; which examples stand for the pool follows from them, not from the order of reading.
      counts: bool [N], which examples make metric and mean: those with a response, of copies the first.

    Raises:
      UserError: gradients that are not finite, or all 0.
    """
    check_gradients(features, "training")
    counted, metric = np.flatnonzero(counts), WhitenedMetric.fit(features, ids=ids, counted=counts)
    some = counted[spread_rows([ids[row] for row in counted], _PAIRS)]
    return cls(metric, metric.measured(features), hidden, counted, some)

  def smoothed(self, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """`smoothed` of `similarity`, f64 [Q, N]."""
    queries = self.metric.measured(target), asked
    return smoothed(self.similarity(target, asked), self._kernel(queries, queries))

  def similarity(self, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """K of every query with every example of the pool, f64 [Q, N].

    Args:
      target: projected gradients of the queries, [Q, W].
      asked: views of their hidden states, [Q, V, D].

    Raises:
      UserError: values that are not finite.
    """
    check_gradients(target, "evaluation")
    return self._kernel((self.metric.measured(target), asked), (self.pool, self.hidden))

  def apart(self, target: np.ndarray, asked: np.ndarray) -> Apart | None:
    """How far the queries are from the pool as a whole; None where a single example of either tells nothing.

    Arguments as of `similarity`.
    """
    if min(len(asked), len(self.some)) < 2:
      return None
    queries, sample = (self.metric.measured(target), asked), (self.pool.take(self.some), self.hidden[self.some])
    both = self._kernel(queries, sample)
    return apart(np.block([[self._kernel(queries, queries), both], [both.T, self._kernel(sample, sample)]]), len(asked))

  def among(self) -> np.ndarray:
    """K of every pair of examples of the pool, f64 [N, N]."""
    return self._kernel((self.pool, self.hidden), (self.pool, self.hidden))

  def _kernel(self, a: tuple[Measured, np.ndarray], b: tuple[Measured, np.ndarray]) -> np.ndarray:
    views = self.hidden.shape[1]
    texts = views * whitened_embedding(a[1], self.hidden[self.counted], b[1])
    return (self.metric.cosines(a[0], b[0]) + texts) / (1 + views)
