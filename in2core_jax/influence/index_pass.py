"""Sketched gradients in flight: each batch is projected onto an index's basis before it leaves the device.

  a_i = V^T S g_i,  |S g_i|^2,  l_i,  and two views of the last hidden states: all out of one forward and backward pass

The sketch's gradient is the gradient in its cores (`projected`); W numbers an example never leave the device but for
the few examples that the basis is made of.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.gradients import HIGHEST, Tree, with_adapter_gradients
from in2core_jax.index.basis import Basis, Raw
from in2core_jax.parallel import processes

# (sub, frozen, batch, lengths int32 [B]) -> (losses [B], hidden f32 [B, V, D]).
LossesAndHidden = Callable[[Tree, Tree, Tree, Any], tuple[jax.Array, jax.Array]]
Items = Iterator[tuple[np.ndarray, Any]]


class IndexPass:
  """The pass over examples, compiled once for each batch shape."""

  def __init__(self, losses_and_hidden: LossesAndHidden, sub: Tree, frozen: Tree):
    """Compiles nothing yet.

    Args:
      losses_and_hidden: the model.
      sub: the sketch's cores. frozen: all else.
    """
    self._sub, self._frozen = sub, frozen

    def raw(sub, frozen, batch, lengths):
      (losses, hidden), gradient = with_adapter_gradients(
        lambda s: losses_and_hidden(s, frozen, batch, lengths), sub, batch
      )
      leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(gradient)]
      return {"gradients": jnp.concatenate(leaves, axis=1), "hidden": hidden, "loss": losses.astype(jnp.float32)}

    def rows(sub, frozen, batch, lengths, basis, kind):
      found = raw(sub, frozen, batch, lengths)
      return project(found["gradients"], found["hidden"], basis, kind) | {"loss": found["loss"]}

    self._raw = jax.jit(raw)
    self._rows = jax.jit(rows, static_argnames="kind")
    self._project = jax.jit(project, static_argnames="kind")
    self._views = jax.jit(project_views)

  def raw(self, items: Items, lengths: np.ndarray) -> Raw:
    """Whole sketched gradients, for the few examples of a basis.

    Args:
      items: yields (rows int [b], batch), the rows 0 to n - 1 once each.
      lengths: int [n], tokens of each example.
    """
    kernel = lambda batch, own: self._raw(self._sub, self._frozen, batch, own)  # noqa: E731
    return Raw(**self._gather(items, lengths, kernel))

  def rows(self, items: Items, lengths: np.ndarray, basis: "OnDevice") -> dict[str, np.ndarray]:
    """Rows of an index, float32, in the order of the examples; arguments as in `raw`, and the basis."""
    kernel = lambda batch, own: self._rows(self._sub, self._frozen, batch, own, basis.arrays, basis.kind)  # noqa: E731
    return self._gather(items, lengths, kernel)

  def rows_of(self, raw: Raw, basis: "OnDevice") -> dict[str, np.ndarray]:
    """The same of what `raw` has given."""
    found = self._project(raw.gradients, raw.hidden, basis.arrays, basis.kind)
    return processes.to_host(found) | {"loss": raw.loss}

  def hidden_rows(self, hidden: np.ndarray, basis: "OnDevice") -> dict[str, np.ndarray]:
    """Views f32 [n, V, D] that another pass has given, in the basis."""
    return processes.to_host(self._views(hidden, basis.arrays))

  def _gather(self, items: Items, lengths: np.ndarray, kernel) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    waiting = None  # fetched one batch late, so that the host prepares the next one meanwhile

    def put(rows: np.ndarray, values: dict) -> None:
      for name, array in processes.to_host(values).items():
        if name not in found:
          found[name] = np.zeros((len(lengths), *array.shape[1:]), np.float32)
        found[name][rows] = array[: len(rows)]

    for rows, batch in items:
      own = np.ones(batch.valid.shape[0], np.int32)
      own[: len(rows)] = lengths[rows]
      values = processes.settle(kernel(batch, own))
      if waiting is not None:
        put(*waiting)
      waiting = rows, values
    if waiting is not None:
      put(*waiting)
    return found


class OnDevice:
  """A basis on the devices."""

  def __init__(self, basis: Basis):
    """Puts it there."""
    self.kind = (basis.kind, basis.size)
    self.arrays = {name: jnp.asarray(getattr(basis, name)) for name in ("gradients", "hidden", "center")}


def project(gradients: jax.Array, hidden: jax.Array, basis: dict[str, jax.Array], kind: tuple[str, int]) -> dict:
  """f32 [B, W] and [B, V, D] -> what `index.rows` names, but for the loss.

  With a generic basis `square` is that of the row itself, which estimates the whole: nothing is known to lie outside.
  """
  if kind[0] == "generic":
    rows = _scattered(gradients, basis["gradients"], kind[1])
    square = jnp.sum(rows**2, axis=1)
  else:
    rows = jnp.matmul(gradients, basis["gradients"], precision=HIGHEST)
    square = jnp.sum(gradients**2, axis=1)
  if not basis["hidden"].size:
    size = gradients.shape[0]
    empty = {"hidden": jnp.zeros((size, 0, 0)), "hidden_square": jnp.zeros((size, 0))}
    return {"gradients": rows, "square": square} | empty
  return {"gradients": rows, "square": square} | project_views(hidden, basis)


def project_views(hidden: jax.Array, basis: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Views f32 [B, V, D] -> what `index.rows` names of them."""
  away = hidden - basis["center"]
  views = jnp.einsum("bvd,vdh->bvh", away, basis["hidden"], precision=HIGHEST)
  return {"hidden": views, "hidden_square": jnp.sum(away**2, axis=2)}


def _scattered(gradients: jax.Array, where: jax.Array, size: int) -> jax.Array:
  """x P of a generic basis: each number goes to several places, with a sign, over the root of how many."""
  total = jnp.zeros((size, gradients.shape[0]), gradients.dtype)
  for places in where:
    sign = jnp.where(places >= 0, 1.0, -1.0)[:, None]
    total = total.at[jnp.where(places >= 0, places, -places - 1)].add(sign * gradients.T)
  return (total / np.sqrt(where.shape[0])).T
