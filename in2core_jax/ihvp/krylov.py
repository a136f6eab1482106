"""The first steps of conjugate gradients before the damping is known: one Krylov space serves eigenvalue and solution.

Damping is relative to the largest eigenvalue of H. The Krylov space of H and v is also that of H + damping I and v, so
the products that find the eigenvalue are the first products of the solve, and none is spent on the eigenvalue alone.

Letters: Q queries, P size of the subtree, k steps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.ihvp import tree_math
from in2core_jax.ihvp.operators import DivergenceError, Matvec
from in2core_jax.ihvp.tree_math import Tree

STEPS, TOL = 6, 1e-2  # vectors of the subtree's size in memory; relative change of the eigenvalue at which it is enough


@dataclasses.dataclass(frozen=True)
class KrylovSpace:
  """k steps of Lanczos from each query: H V = V T + t_(k+1) v_(k+1) e_k'.

  Attributes:
    vectors: k + 1 trees, leaves [Q, ...], orthonormal for each query; 0 where the space of a query is closed.
    diagonal: float64 [k, Q], of the tridiagonal T.
    below: float64 [k, Q], what stands below it; 0 where the space closes.
    lambda_max: the largest eigenvalue of all queries' T: approaches that of H from below.
  """

  vectors: tuple[Tree, ...]
  diagonal: np.ndarray
  below: np.ndarray
  lambda_max: float


@jax.jit
def unit(v: Tree):
  """(v / |v|, |v|, where |v| is 0), with a size of 1 in place of 0."""
  size = tree_math.norm(v)
  safe = jnp.where(size == 0, 1, size)
  return tree_math.scaled(1 / safe, v), safe, size == 0


@jax.jit
def _orthogonalize(vectors, product):
  """(v.product with the last vector v, what is left of the product, its size), by Gram-Schmidt done twice."""
  diagonal = tree_math.vdot(vectors[-1], product)
  for _ in range(2):
    for one in vectors:
      product = tree_math.axpy(-tree_math.vdot(one, product), one, product)
  return diagonal, product, tree_math.norm(product)


@jax.jit
def _next(product, size):
  return tree_math.scaled(jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0), product)


def tridiagonal(diagonal: np.ndarray, below: np.ndarray) -> np.ndarray:
  """T with the row below it, [Q, k + 1, k], of [k, Q] numbers."""
  steps, queries = diagonal.shape
  t = np.zeros((queries, steps + 1, steps))
  for j in range(steps):
    t[:, j, j], t[:, j + 1, j] = diagonal[j], below[j]
    if j:
      t[:, j - 1, j] = below[j - 1]
  return t


def explore(matvec: Matvec, v: Tree, steps: int = STEPS, tol: float = TOL) -> KrylovSpace:
  """Lanczos with full reorthogonalisation from every query, until the largest eigenvalue has settled.

  Golub and Van Loan, Matrix Computations (4th ed.), sections 10.1 and 10.3.

  Args:
    matvec: H v on a fixed set of examples, without damping; called once per step with leaves [Q, ...].
    v: right-hand sides, leaves [Q, ...].
    steps: at most this many products.
    tol: relative change of the largest eigenvalue from one step to the next at which to stop.

  Returns:
    KrylovSpace.

  Raises:
    DivergenceError: a product that is not finite.
  """
  first, _, _ = unit(tree_math.promote(v))
  vectors, diagonal, below, largest = (first,), [], [], 0.0
  # What is left of a product after Gram-Schmidt is rounding where the space is closed.
  rounding = 100 * max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(first))
  while len(diagonal) < steps:
    on, product, size = _orthogonalize(vectors, tree_math.promote(matvec(vectors[-1])))
    on, left = np.asarray(on, np.float64), np.asarray(size, np.float64)
    if not (np.all(np.isfinite(on)) and np.all(np.isfinite(left))):
      raise DivergenceError(
        f"cg met a value that is not finite at step {len(diagonal) + 1}: look for NaN in the weights or in the loss of "
        "an example"
      )
    left = np.where(left > rounding * np.maximum(np.abs(on), largest), left, 0.0)
    diagonal.append(on)
    below.append(left)
    vectors += (_next(product, jnp.asarray(left, size.dtype)),)
    previous = largest
    t = tridiagonal(np.stack(diagonal), np.stack(below))[:, :-1]
    largest = float(np.linalg.eigvalsh(t)[:, -1].max())
    if not left.any() or (len(diagonal) > 1 and abs(largest - previous) <= tol * abs(largest)):
      break
  return KrylovSpace(vectors, np.stack(diagonal), np.stack(below), largest)


@jax.jit
def combine(weights: jax.Array, vectors: tuple[Tree, ...]) -> Tree:
  """sum_j weights[j, q] v_j[q] for k + 1 vectors, leaves [Q, ...]."""
  total = tree_math.scaled(weights[0], vectors[0])
  for weight, one in zip(weights[1:], vectors[1:], strict=True):
    total = tree_math.axpy(weight, one, total)
  return total
