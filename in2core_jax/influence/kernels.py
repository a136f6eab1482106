"""From queries to scores: influence(i, q) = g_q . (H + damping I)^-1 . g_i, streamed over batches.

Positive = proponent: giving example i more weight lowers the loss on query q. Scores are not divided by N.
This room knows no model and no data set: it gets an `Objective`, parameters and functions that yield batches.

Letters: B batch, N training examples, Q queries, P size of the subtree.
"""

import copy
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax import gradients
from in2core_jax.errors import UserError, how_many
from in2core_jax.gradients import Tree
from in2core_jax.ihvp import datainf_probes, solvers
from in2core_jax.parallel import processes
from in2core_jax.runs import resumable
from in2core_jax.runs.resumable import Stream


class CompiledObjective:
  """An objective at its parameters, with every kernel compiled once per batch shape.

  Attributes:
    objective, sub, frozen: as in `gradients`.
    microbatch, relabel: as given.
  """

  def __init__(
    self,
    objective: gradients.Objective,
    sub: Tree,
    frozen: Tree,
    microbatch: int | None = 8,
    relabel: Callable[[Tree, Tree, Tree, jax.Array], Tree] | None = None,
  ):
    """Prepares the kernels.

    Args:
      microbatch: examples whose gradients exist at the same time (`vmap(grad)` paths).
      relabel: (sub, frozen, batch, keys [B]) -> batch with labels drawn from the model, for EK-FAC of the ggn.
    """
    self.objective, self.sub, self.frozen = objective, sub, frozen
    self.microbatch, self.relabel = microbatch, relabel
    self._losses = jax.jit(partial(gradients.per_example_losses, objective))
    self._gradient = jax.jit(partial(gradients.sum_gradient, objective))
    self._jvp = jax.jit(partial(gradients.losses_and_jvp_scores, objective))
    self._vmap = jax.jit(partial(gradients.vmap_scores, objective, microbatch=microbatch))
    self._gradients = jax.jit(partial(gradients.per_example_gradients, objective, microbatch=microbatch))
    self._adapters = jax.jit(partial(gradients.adapter_gradients, objective))
    # The solvers compile by the identity of these functions, so they are made once.
    self._products = {kind: self._product_fn(kind) for kind in gradients.CURVATURE_PRODUCTS}
    self._example_gradients = lambda context, batch: (
      gradients.per_example_gradients(objective, *context, batch),
      batch.valid,
    )
    self._observed = lambda context, batch, v, damping: (
      *datainf_probes.observed(objective, *context, batch, v, damping),
      batch.valid,
    )

  def at(self, sub: Tree, frozen: Tree | None = None) -> "CompiledObjective":
    """The same kernels at other parameters: nothing is compiled again."""
    other = copy.copy(self)
    other.sub, other.frozen = sub, self.frozen if frozen is None else frozen
    return other

  def _product_fn(self, kind: str):
    single = gradients.over_queries(gradients.CURVATURE_PRODUCTS[kind])

    def product(context, batch, v):
      return single(self.objective, *context, batch, v)

    return product

  def losses(self, stream: Stream, size: int) -> np.ndarray:
    """l_i of every example, float32 [N]."""
    return _collect(stream, "losses", size, lambda batch: self._losses(self.sub, self.frozen, batch))

  def mean_gradient(self, stream: Stream) -> Tree:
    """The aggregated query: mean of g_q over the data, leaves [1, ...].

    Raises:
      UserError: no example, or a gradient that is not finite.
    """

    def step(found, item):
      (total, count), (rows, batch) = found, item
      part = processes.settle(self._gradient(self.sub, self.frozen, batch))
      return _add(total, part), count + np.count_nonzero(rows >= 0)

    zeros = jax.tree.map(jnp.zeros_like, gradients.widen(self.sub))
    total, count = resumable.total(stream, "gradient", step, (zeros, jnp.zeros((), jnp.int32)))
    if not int(count):
      raise UserError("the evaluation set is empty: there is nothing to have influence on")
    mean = jax.tree.map(lambda leaf: leaf[None] / int(count), total)
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(mean)):
      raise UserError("the evaluation gradient is not finite: look for NaN in the weights or in the evaluation losses")
    return mean

  def gradients(self, stream: Stream, size: int) -> Tree:
    """g_i of every example, host arrays [N, ...]; N * P numbers."""
    return self._gather(stream, size, self._gradients)

  def batch_gradients(self, batch) -> Tree:
    """g_i of a batch's examples, leaves [B, ...] on the devices."""
    return self._gradients(self.sub, self.frozen, batch)

  def adapter_features(self, stream: Stream, size: int) -> np.ndarray:
    """g_i of every example as rows of a matrix, float32 [N, P], for a subtree of adapter leaves (a sketch's cores)."""
    leaves = jax.tree.leaves(self._gather(stream, size, self._adapters))
    return np.concatenate([leaf.reshape(size, -1) for leaf in leaves], axis=1)

  def _gather(self, stream: Stream, size: int, kernel) -> Tree:
    store = jax.tree.map(lambda leaf: np.zeros((size, *leaf.shape), np.float32), self.sub)
    for rows, batch in stream():
      part = processes.to_host(kernel(self.sub, self.frozen, batch))
      jax.tree.map(lambda out, new, rows=rows: out.__setitem__(rows, new[: len(rows)]), store, part)
    return store

  def scores(self, stream: Stream, size: int, directions: Tree, path: str = "auto") -> np.ndarray:
    """g_i . r_q for every query and example, float32 [Q, N]; see `losses_and_scores`."""
    if score_path(path, _num_queries(directions)) == "jvp":
      return self.losses_and_scores(stream, size, directions, path)[1]
    kernel = lambda batch: self._vmap(self.sub, self.frozen, batch, directions)  # noqa: E731
    return _finite(_collect(stream, "scores", size, kernel, _num_queries(directions)))

  def losses_and_scores(
    self, stream: Stream, size: int, directions: Tree, path: str = "auto"
  ) -> tuple[np.ndarray, np.ndarray]:
    """l_i, float32 [N], and g_i . r_q for every query and example, float32 [Q, N].

    Args:
      stream: training batches.
      size: N.
      directions: r, leaves [Q, ...].
      path: "jvp" (one forward-mode pass a query, with the losses), "vmap" (per-example gradients, contracted
        at once, and a pass for the losses), or "auto".

    Raises:
      UserError: an unknown path, or a score that is not finite.
    """
    if score_path(path, _num_queries(directions)) == "vmap":
      return self.losses(stream, size), self.scores(stream, size, directions, path)
    queries = _num_queries(directions)
    single = [jax.tree.map(lambda leaf, q=q: leaf[q], directions) for q in range(queries)]

    def kernel(batch):
      pairs = [self._jvp(self.sub, self.frozen, batch, r) for r in single]
      return jnp.stack([pairs[0][0], *(scores for _, scores in pairs)])

    found = _collect(stream, "losses_and_scores", size, kernel, queries + 1)
    return found[0], _finite(found[1:])

  def curvature(self, kind: str) -> solvers.Curvature:
    """H of a batch as the solvers take it: sums over examples, parameters in the context."""
    return solvers.Curvature(self._products[kind], _count, (self.sub, self.frozen))

  def example_gradients(self, batches) -> solvers.ExampleGradients:
    """Per-example gradients as DataInf takes them."""
    context, objective = (self.sub, self.frozen), self.objective
    observed = self._observed if datainf_probes.serves(objective, self.sub) else None
    return solvers.ExampleGradients(
      self._example_gradients, batches, context, objective.separate, self.microbatch, observed
    )


def _count(batch):
  return jnp.sum(batch.valid)


def _num_queries(directions: Tree) -> int:
  return jax.tree.leaves(directions)[0].shape[0]


def score_path(path: str, queries: int) -> str:
  """The path in use, "jvp" or "vmap": `--score_path=auto` takes the cheaper one for so many directions.

  Raises:
    UserError: an unknown path.
  """
  if path not in ("auto", "jvp", "vmap"):
    raise UserError(f"--score_path={path} is unknown; use auto, jvp or vmap")
  if path != "auto":
    return path
  return "jvp" if queries <= 2 else "vmap"  # method.md section 4: jvp is cheapest for 1 or 2 directions


def _finite(scores: np.ndarray) -> np.ndarray:
  if not np.all(np.isfinite(scores)):
    bad = np.flatnonzero(~np.all(np.isfinite(scores), axis=0))
    first, size = bad[:5].tolist(), scores.shape[1]
    raise UserError(
      f"{how_many(len(bad), f'of {size:,} scores [is|are]')} not finite (first rows {first}): look at their losses"
    )
  return scores


def _collect(stream: Stream, name: str, size: int, kernel, queries: int | None = None) -> np.ndarray:
  """Gathers kernel(batch) [..., B] into [..., N]."""
  out = np.zeros((size,) if queries is None else (queries, size), np.float32)
  for rows, values in resumable.results(stream, name, kernel):
    _put(out, rows, values)
  return out


def _put(out, rows, values) -> None:
  there = np.flatnonzero(rows >= 0)  # packed batches have padding between the examples of their groups
  out[..., rows[there]] = values[..., there]


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
