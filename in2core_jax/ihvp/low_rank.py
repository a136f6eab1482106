"""A low-rank inverse: eigenpairs of H on one Krylov space, reused for every query and every damping.

Letters: Q queries, m dimension of the Krylov space, P size of the subtree. A basis is a pytree with leaves [m, ...].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.ihvp import tree_math
from in2core_jax.ihvp.operators import (
  DivergenceError,
  Matvec,
  NegativeCurvatureError,
  SolveResult,
  check_damping,
  relative_residual,
)
from in2core_jax.ihvp.tree_math import Tree


@dataclasses.dataclass(frozen=True)
class LowRankSettings:
  """Settings of `fit_low_rank`.

  Attributes:
    steps: dimension m of the Krylov space: products with H, and vectors of the subtree's size in memory.
    rank: eigenpairs kept, largest first; None keeps all m.
  """

  steps: int = 50
  rank: int | None = None

  def __post_init__(self):
    if self.steps < 1 or (self.rank is not None and not 1 <= self.rank <= self.steps):
      raise UserError(f"low rank with steps={self.steps}, rank={self.rank}: needs 1 <= rank <= steps")


@dataclasses.dataclass(frozen=True)
class LowRank:
  """H as V diag(eigenvalues) V^T.

  Attributes:
    vectors: orthonormal Ritz vectors V, leaves [rank, ...].
    eigenvalues: float64 [rank], largest first.
    errors: float64 [rank], upper bounds of |H v_i - eigenvalue_i v_i|, up to rounding.
    smallest: smallest eigenvalue of the whole Krylov space, also where `rank` cut it off.
  """

  vectors: Tree
  eigenvalues: np.ndarray
  errors: np.ndarray
  smallest: float


def _dots(basis: Tree, x: Tree) -> jax.Array:
  """x[q] . basis[m] -> [q, m]."""
  rows = zip(jax.tree.leaves(basis), jax.tree.leaves(x), strict=True)
  # precision: the default on accelerators multiplies in bfloat16.
  return sum(
    jnp.einsum("md,qd->qm", b.reshape(b.shape[0], -1), one.reshape(one.shape[0], -1), precision="highest")
    for b, one in rows
  )


def _combine(weights: jax.Array, basis: Tree) -> Tree:
  """sum_m weights[q, m] basis[m] -> leaves [q, ...]."""
  return jax.tree.map(
    lambda leaf: jnp.tensordot(jnp.asarray(weights).astype(leaf.dtype), leaf, axes=1, precision="highest"), basis
  )


def _split(basis: Tree, w: Tree) -> tuple[Tree, jax.Array]:
  """What w has outside of an orthonormal basis, leaves [q, ...], and its coefficients inside, [q, m].

  Twice classical Gram-Schmidt (Giraud et al. 2005: enough for orthogonality to rounding).
  """
  first = _dots(basis, w)
  w = tree_math.subtract(w, _combine(first, basis))
  second = _dots(basis, w)
  return tree_math.subtract(w, _combine(second, basis)), first + second


@jax.jit
def _orthogonalize(basis, w):
  w, inside = _split(basis, w)
  return w, inside[0], tree_math.norm(w)[0]


@jax.jit
def _store(basis, row, w, size):
  return jax.tree.map(lambda b, one: b.at[row].set((one / size.astype(one.dtype))[0]), basis, w)


def fit_low_rank(matvec: Matvec, like: Tree, key: jax.Array, settings: LowRankSettings) -> LowRank:
  """Eigenpairs of a symmetric H by Lanczos with full reorthogonalisation (Arnoldi, symmetrised).

  When the Krylov space closes early (rank exhausted, repeated eigenvalues), it goes on from a fresh random direction.

  Args:
    matvec: H v, without damping; called with leaves [1, ...].
    like: pytree, leaves [Q, ...]; gives shapes and dtypes.
    key: PRNG key of the start directions.
    settings: steps and rank.

  Returns:
    LowRank.

  Raises:
    UserError: more steps than parameters.
    DivergenceError: a product that is not finite.
  """
  size = sum(int(np.prod(leaf.shape[1:], dtype=np.int64)) for leaf in jax.tree.leaves(like))
  steps = settings.steps
  if steps > size:
    raise UserError(f"low rank with steps={steps} on a subtree of {size} parameters: give at most {size}")
  basis = tree_math.zeros_like(tree_math.random_normal(key, like, steps))
  eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(basis))
  projected, lost = np.zeros((steps, steps)), np.zeros(steps)
  w = tree_math.random_normal(key, like)
  w, _, beta = _orthogonalize(basis, w)
  for step in range(steps):
    basis = _store(basis, step, w, beta)
    row = jax.tree.map(lambda leaf, step=step: leaf[step : step + 1], basis)
    w, column, beta = _orthogonalize(basis, tree_math.promote(matvec(row)))
    projected[:, step] = np.asarray(column, np.float64)
    lost[step] = float(beta)
    if not np.isfinite(lost[step]):
      raise DivergenceError(f"low rank: H v is not finite at step {step + 1}: look for NaN in the weights or in a loss")
    if step + 1 == steps:
      break
    if lost[step] > 100 * eps * np.abs(projected).max():
      lost[step] = 0.0  # nothing is lost: this part becomes the next vector of the basis
    else:
      fresh = tree_math.random_normal(jax.random.fold_in(key, step + 1), like)
      w, _, beta = _orthogonalize(basis, fresh)
  # Only the part of column j up to row j was known at step j; the rest is its mirror image.
  upper = np.triu(projected)
  eigenvalues, y = np.linalg.eigh(upper + np.triu(upper, 1).T)
  order = np.argsort(eigenvalues)[::-1][: settings.rank]
  vectors = jax.jit(_combine)(y.T[order], basis)
  # H v_i - eigenvalue_i v_i = sum_j y_ji (what H b_j has outside of the basis), which has norm lost_j.
  return LowRank(vectors, eigenvalues[order], lost @ np.abs(y[:, order]), float(eigenvalues[0]))


@jax.jit
def _apply(vectors, weights, v, damping):
  # Not v / damping less what is too much of it: single precision loses that difference where eigenvalue >> damping.
  outside, inside = _split(vectors, v)
  return tree_math.axpy(1 / damping, outside, _combine(inside * weights, vectors))


def low_rank(v: Tree, fitted: LowRank, damping: float, matvec: Matvec | None = None) -> SolveResult:
  """x = V diag(1/(eigenvalue + damping)) V^T v + (v - V V^T v) / damping: Krylov space solved, the rest damped only.

  Schioppa et al. 2022 (Arnoldi influence) drop the second term and with it all of v outside of the space.

  Args:
    v: right-hand side, leaves [Q, ...].
    fitted: from `fit_low_rank`.
    damping: absolute, above 0.
    matvec: H v; when given, the residual is measured.

  Returns:
    SolveResult; residual is NaN without `matvec`.

  Raises:
    NegativeCurvatureError: an eigenvalue at or below -damping.
    UserError: damping 0.
  """
  queries, damping = tree_math.num_queries(v), check_damping(damping, positive=True)
  v = tree_math.promote(v)
  smallest = fitted.smallest
  if smallest + damping <= 0:
    raise NegativeCurvatureError(
      f"low rank: H has the eigenvalue {smallest:.3g} with damping {damping:.3g}: "
      f"use a damping well above {-smallest:.3g} or --curvature=ggn"
    )
  weights = 1 / (fitted.eigenvalues + damping)
  solution = _apply(fitted.vectors, weights, v, damping)
  measured = matvec is not None
  residual = relative_residual(matvec, solution, v, damping) if measured else np.full(queries, np.nan)
  rank = len(fitted.eigenvalues)
  info = {
    "solver": "low_rank",
    "damping": damping,
    "rank": rank,
    "lambda_max": float(fitted.eigenvalues[0]),
    "smallest": smallest,
    "largest_error": float(fitted.errors.max()),
    "residual_measured": measured,
  }
  return SolveResult(solution, residual, rank, [(rank, residual)] if measured else [], info)
