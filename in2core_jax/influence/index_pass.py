"""Sketched gradients in flight: each batch is projected onto an index's basis before it leaves the device.

  a_i = V^T S g_i,  |S g_i|^2,  l_i,  and two views of the last hidden states: all out of one forward and backward pass

Rows hold several examples, as where losses alone are computed. Both sides of a sketch are applied to inputs and output
gradients in the backward pass (`moment_probes.sketched`): no gradient of P numbers is formed, and the W numbers of an
example never leave the device but for the few examples that the basis is made of.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from in2core_jax.gradients import HIGHEST, Tree
from in2core_jax.index.basis import Basis, Raw
from in2core_jax.influence.projected import Sketch
from in2core_jax.parallel import processes
from in2core_jax.params import moment_probes

# (sub, frozen, batch, spots, S) -> (losses [E], hidden f32 [E, V, D]).
LossesAndHidden = Callable[[Tree, Tree, Tree, Any, int], tuple[jax.Array, jax.Array]]
# Rows int [e] of the examples, -1 where there is none; the batch; where its examples lie (`spots.Spots`).
Items = Iterator[tuple[np.ndarray, Any, Any]]


class IndexPass:
  """The pass over examples, compiled once for each batch shape."""

  def __init__(self, losses_and_hidden: LossesAndHidden, sketch: Sketch | None, params: Tree):
    """Compiles nothing yet.

    Args:
      losses_and_hidden: the model.
      sketch: of the gradients.
      params: the model's, without a sketch.
    """
    self._sides = {} if sketch is None else {module: sketch.sides(module) for module in sketch.modules}
    self._params = params

    def raw(sides, params, batch, spots, most):
      flat = {}
      for module, (left, right) in sides.items():
        probe = moment_probes.sketch_probe(left, right, spots.members, most)
        flat |= {f"layers/{module}/sketch_probe/{name}": leaf for name, leaf in probe.items()}
      cores = {path: flat.pop(path) for path in list(flat) if path.endswith("/cores")}

      def total(cores):
        sub = traverse_util.unflatten_dict(flat | cores, sep="/")
        found = losses_and_hidden(sub, params, batch, spots, most)
        return jnp.sum(found[0]), found

      gradient, (losses, hidden) = jax.grad(total, has_aux=True)(cores)
      leaves = [_by_example(gradient[path], spots.place) for path in sorted(gradient)]
      return {"gradients": jnp.concatenate(leaves, axis=1), "hidden": hidden, "loss": losses.astype(jnp.float32)}

    def rows(sides, params, batch, spots, basis, most, kind):
      found = raw(sides, params, batch, spots, most)
      return project(found["gradients"], found["hidden"], basis, kind) | {"loss": found["loss"]}

    self._raw = jax.jit(raw, static_argnames="most")
    self._rows = jax.jit(rows, static_argnames=("most", "kind"))
    self._project = jax.jit(project, static_argnames="kind")
    self._views = jax.jit(project_views)

  def raw(self, items: Items, size: int, most: int) -> Raw:
    """Whole sketched gradients, for the few examples of a basis.

    Args:
      items: has the rows 0 to size - 1 once each.
      size: n.
      most: S of the spots.
    """
    return Raw(**self._gather(items, size, partial(self._raw, most=most)))

  def rows(self, items: Items, size: int, most: int, basis: "OnDevice") -> dict[str, np.ndarray]:
    """Rows of an index, float32, in the order of the examples; arguments as in `raw`, and the basis."""
    return self._gather(items, size, partial(self._rows, most=most, basis=basis.arrays, kind=basis.kind))

  def rows_of(self, raw: Raw, basis: "OnDevice") -> dict[str, np.ndarray]:
    """The same of what `raw` has given."""
    found = self._project(raw.gradients, raw.hidden, basis.arrays, basis.kind)
    return processes.to_host(found) | {"loss": raw.loss}

  def hidden_rows(self, hidden: np.ndarray, basis: "OnDevice") -> dict[str, np.ndarray]:
    """Views f32 [n, V, D] that another pass has given, in the basis."""
    return processes.to_host(self._views(hidden, basis.arrays))

  def _gather(self, items: Items, size: int, kernel) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    waiting = None  # fetched one batch late, so that the host prepares the next one meanwhile

    def put(rows: np.ndarray, values: dict) -> None:
      there = np.flatnonzero(rows >= 0)
      for name, array in processes.to_host(values).items():
        if name not in found:
          found[name] = np.zeros((size, *array.shape[1:]), np.float32)
        found[name][rows[there]] = array[there]

    for rows, batch, spots in items:
      values = processes.settle(kernel(self._sides, self._params, batch, spots))
      if waiting is not None:
        put(*waiting)
      waiting = rows, values
    if waiting is not None:
      put(*waiting)
    return found


def _by_example(cores: jax.Array, place: jax.Array) -> jax.Array:
  """Cores [k, W, S, p, q] by row -> [E, k p q] by example, for places [G, E / G] in the groups."""
  layers, (groups, size) = cores.shape[0], place.shape
  by_group = cores.reshape(layers, groups, -1, cores.shape[-2] * cores.shape[-1])
  taken = jnp.take_along_axis(by_group, place[None, :, :, None], axis=2)
  return jnp.moveaxis(taken, 0, 2).reshape(groups * size, -1)


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
