"""Algebra of pytrees whose leaves all have a leading query axis: one number per query, reductions in f32 or better.

Letters: Q queries. A "vector" here is a pytree with leaves [Q, ...]: one vector per query, combined leaf by leaf.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from in2core_jax.errors import UserError
from in2core_jax.parallel import processes

Tree = Any


def num_queries(v: Tree) -> int:
  """Q, the common leading axis of every leaf.

  Args:
    v: pytree, leaves [Q, ...].

  Returns:
    Q.

  Raises:
    UserError: no leaf at all, a leaf without axes, an integer leaf, or leaves that disagree about Q.
  """
  leaves = jax.tree.leaves(v)
  if not leaves:
    raise UserError("the right-hand side has no array at all: the subtree is empty; choose at least one layer")
  for leaf in leaves:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise UserError(f"the right-hand side has a leaf of dtype {leaf.dtype}: gradients are floating point; convert it")
  sizes = sorted({leaf.shape[0] if leaf.ndim else -1 for leaf in leaves})
  if len(sizes) != 1 or sizes[0] < 1:
    raise UserError(f"leading axes {sizes} of the right-hand side differ or are empty: every leaf must be [Q, ...]")
  return sizes[0]


def concatenate(trees: Iterable[Tree]) -> Tree:
  """Puts the queries of several trees, leaves [Q_j, ...], into one, leaves [sum_j Q_j, ...]."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def promote(v: Tree) -> Tree:
  """The same vector in f32, or in f64 where it was f64: solvers never iterate in half precision."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32)), v)


def _per_query(values: jax.Array, leaf: jax.Array) -> jax.Array:
  """[Q] or a scalar, shaped so that it broadcasts against a leaf [Q, ...], in the leaf's dtype."""
  values = jnp.asarray(values).astype(leaf.dtype)
  return values.reshape(values.shape + (1,) * (leaf.ndim - 1)) if values.ndim else values


def scaled(values: jax.Array, x: Tree) -> Tree:
  """values[q] * x[q]; values [Q] or a scalar."""
  return jax.tree.map(lambda leaf: _per_query(values, leaf) * leaf, x)


def axpy(values: jax.Array, x: Tree, y: Tree) -> Tree:
  """values[q] * x[q] + y[q]; values [Q] or a scalar."""
  return jax.tree.map(lambda a, b: _per_query(values, a) * a + b, x, y)


def subtract(x: Tree, y: Tree) -> Tree:
  """x - y, leaf by leaf."""
  return jax.tree.map(jnp.subtract, x, y)


def zeros_like(x: Tree) -> Tree:
  """A vector of zeros."""
  return jax.tree.map(jnp.zeros_like, x)


def vdot(x: Tree, y: Tree) -> jax.Array:
  """Dot product per query, sum over all leaves of x[q] * y[q].

  Args:
    x: pytree, leaves [Q, ...].
    y: same structure and shapes.

  Returns:
    [Q], f32 or better.
  """
  x, y = promote(x), promote(y)
  terms = jax.tree.map(lambda a, b: jnp.sum(a * b, axis=tuple(range(1, a.ndim))), x, y)
  return sum(jax.tree.leaves(terms))


def norm(x: Tree) -> jax.Array:
  """Euclidean norm per query; scaled by the largest entry, so that gradients of 1e-25 do not underflow in f32.

  Args:
    x: pytree, leaves [Q, ...].

  Returns:
    [Q], f32 or better; inf or NaN when an entry is.
  """
  x = promote(x)
  peaks = [jnp.max(jnp.abs(leaf), axis=tuple(range(1, leaf.ndim)), initial=0) for leaf in jax.tree.leaves(x)]
  peak = jnp.max(jnp.stack(peaks), axis=0)
  safe = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
  x = jax.tree.map(lambda leaf: leaf / _per_query(safe, leaf), x)
  return safe * jnp.sqrt(vdot(x, x))


def random_normal(key: jax.Array, like: Tree, size: int = 1) -> Tree:
  """Standard normal vectors.

  Args:
    key: PRNG key.
    like: pytree, leaves [Q, ...]: only shapes behind the query axis and dtypes are used.
    size: number of vectors.

  Returns:
    Pytree, leaves [size, ...], f32 or better.
  """
  leaves, structure = jax.tree.flatten(like)
  keys = jax.random.split(key, len(leaves))
  dtypes = [jnp.promote_types(leaf.dtype, jnp.float32) for leaf in leaves]
  draws = [
    _normal_fn(leaf)(k, (size, *leaf.shape[1:]), dtype) for k, leaf, dtype in zip(keys, leaves, dtypes, strict=True)
  ]
  return jax.tree.unflatten(structure, draws)


def _normal_fn(like: jax.Array):
  """`jax.random.normal`, drawn where `like` is when that is cut over devices: no device holds all of it."""
  sharding = getattr(like, "sharding", None)
  if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
    return jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=sharding)
  return jax.random.normal


def ravel(x: Tree) -> np.ndarray:
  """All leaves side by side on the host.

  Args:
    x: pytree, leaves [Q, ...].

  Returns:
    float64 [Q, P], leaves in the order of `jax.tree.leaves`.
  """
  leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(processes.to_host(x))]
  return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def unravel(rows: np.ndarray, like: Tree) -> Tree:
  """Inverse of `ravel`.

  Args:
    rows: [S, P].
    like: pytree, leaves [Q, ...]: shapes behind the query axis and dtypes.

  Returns:
    Pytree, leaves [S, ...], f32 or better.
  """
  leaves, structure = jax.tree.flatten(like)
  sizes = [int(np.prod(leaf.shape[1:], dtype=np.int64)) for leaf in leaves]
  parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
  made = [
    jnp.asarray(part.reshape(len(rows), *leaf.shape[1:]), jnp.promote_types(leaf.dtype, jnp.float32))
    for part, leaf in zip(parts, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, made)
