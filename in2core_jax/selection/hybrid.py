"""Gradients and hidden states together: which examples of a pool are of the kind of the queries.

  K(x, y) = (cos_M(g_x, g_y) + cos_E(e_x, e_y) + cos_L(l_x, l_y)) / 3

g are projected gradients in the pool's whitened metric M (`whitening`); e are the last hidden states, averaged over an
example's tokens, and l those of its last token, each whitened by the pool's covariance (`cosines.whitening`). Each
finds what the others miss: averages tell what a text is about, the last token what kind of turn has ended, gradients
what of it the model does not know yet. The mean of cosines is the cosine of all vectors, each of unit length, put in a
row: one similarity, and a kernel.

Letters: Q queries, N examples of the pool, W numbers of a projected gradient, V views of D hidden numbers.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from in2core_jax.selection import cosines
from in2core_jax.selection.two_samples import Apart, apart
from in2core_jax.selection.whitening import Measured, WhitenedMetric, check_gradients, spread_among

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
  return np.asarray(similarity, np.float64)[_speaking(among, count)].mean(axis=1)


def smoothed_by(among: np.ndarray, count: int = NEIGHBOURS) -> np.ndarray:
  """The same as weights f64 [Q, Q]: `smoothed` is their product with the similarities."""
  nearest = _speaking(among, count)
  weights = np.zeros(among.shape)
  np.put_along_axis(weights, nearest, 1 / nearest.shape[1], axis=1)
  return weights


def _speaking(among: np.ndarray, count: int) -> np.ndarray:
  """The queries that speak together with each one, itself first, int [Q, count]."""
  order = among.copy()
  np.fill_diagonal(order, np.inf)
  return np.argsort(-order, axis=1, kind="stable")[:, :count]


@dataclasses.dataclass(frozen=True)
class Texts:
  """Hidden states where those of a pool have no direction in common; make one with `fit`.

  Attributes:
    images: of each view, its map (`cosines.whitening`); None where the pool's hidden states do not differ.
  """

  images: tuple[Callable[[np.ndarray], np.ndarray] | None, ...]

  @classmethod
  def fit(cls, pool: np.ndarray) -> "Texts":
    """The maps of a pool's views, [P, V, D]."""
    views = [pool[:, view] for view in range(pool.shape[1])]
    return cls(tuple(cosines.whitening(x, EMBEDDING_DAMPING) if np.ptp(x, axis=0).any() else None for x in views))

  def cosines(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean over the views of the cosines of every pair; a view without a map tells nothing apart, and is 0.

    Args:
      a: [A, V, D].
      b: [B, V, D].

    Returns:
      f64 [A, B].
    """
    total = np.zeros((len(a), len(b)))
    for view, image in enumerate(self.images):
      if image is not None:
        total += cosines.cosine_to(image(a[:, view]), image(b[:, view]))
    return total / len(self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Queries or examples as `HybridMetric` compares them.

  Attributes:
    gradients: n of them, in the pool's metric.
    hidden: views of their hidden states, [n, V, D].
  """

  gradients: Measured
  hidden: np.ndarray

  def take(self, rows: np.ndarray) -> "Examples":
    """Some of them."""
    return Examples(self.gradients.take(rows), self.hidden[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class HybridMetric:
  """K of a pool; make one with `fit`.

  Attributes:
    metric: of its gradients.
    texts: of its hidden states.
    pool: its N examples.
    some: int, the rows of them whose similarities with each other stand for all.
  """

  metric: WhitenedMetric
  texts: Texts
  pool: Examples
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
    some = spread_among(ids, counted, _PAIRS)
    return cls(metric, Texts.fit(hidden[counted]), Examples(metric.measured(features), hidden), some)

  def asked(self, target: np.ndarray, hidden: np.ndarray) -> Examples:
    """Queries, for the methods below.

    Args:
      target: their projected gradients, [Q, W].
      hidden: views of their hidden states, [Q, V, D].

    Raises:
      UserError: gradients that are not finite.
    """
    check_gradients(target, "evaluation")
    return Examples(self.metric.measured(target), hidden)

  def similarity(self, asked: Examples) -> np.ndarray:
    """K of every query with every example of the pool, f64 [Q, N]."""
    return self._kernel(asked, self.pool)

  def smoothed(self, asked: Examples, similarity: np.ndarray) -> np.ndarray:
    """`smoothed` of these queries' `similarity`, f64 [Q, N]."""
    return smoothed(similarity, self._kernel(asked, asked))

  def apart(self, asked: Examples) -> Apart | None:
    """How far the queries are from the pool as a whole; None where a single example of either tells nothing."""
    size = len(asked.hidden)
    if min(size, len(self.some)) < 2:
      return None
    sample = self.pool.take(self.some)
    both = self._kernel(asked, sample)
    return apart(np.block([[self._kernel(asked, asked), both], [both.T, self._kernel(sample, sample)]]), size)

  def among(self) -> np.ndarray:
    """K of every pair of examples of the pool, f64 [N, N]."""
    return self._kernel(self.pool, self.pool)

  def _kernel(self, a: Examples, b: Examples) -> np.ndarray:
    views = len(self.texts.images)
    texts = views * self.texts.cosines(a.hidden, b.hidden)
    return (self.metric.cosines(a.gradients, b.gradients) + texts) / (1 + views)
