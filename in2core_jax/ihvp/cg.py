"""Conjugate gradients for (H + damping I) x = v on a fixed set of examples, all queries at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.ihvp import krylov, tree_math
from in2core_jax.ihvp.operators import DivergenceError, Matvec, NegativeCurvatureError, SolveResult, check_damping
from in2core_jax.ihvp.tree_math import Tree


@dataclasses.dataclass(frozen=True)
class CgSettings:
  """Settings of `cg`.

  Attributes:
    damping: absolute, in the unit of H; 0 or more.
    tol: relative residual at which a query stops; f32 reaches about 1e-6 times the condition number.
    max_steps: products with H at most (the final check of the residual not counted).
  """

  damping: float
  tol: float = 1e-5
  max_steps: int = 200

  def __post_init__(self):
    check_damping(self.damping)
    if not (np.isfinite(self.tol) and self.tol >= 0):
      raise UserError(f"cg with tol={self.tol}: it must be finite and 0 or more, e.g. 1e-5")
    if self.max_steps < 1:
      raise UserError(f"cg with max_steps={self.max_steps}: it needs at least 1")


@dataclasses.dataclass
class _Run:
  """Mutable state of one solve; v has unit norm in every query that is not 0.

  `p` is the direction to go on with, None to start from the residual.
  """

  x: Tree
  r: Tree
  steps: int
  curve: list
  p: Tree | None = None


@jax.jit
def _curvature_along(p, hp, damping):
  ap = tree_math.axpy(damping, p, tree_math.promote(hp))
  return ap, tree_math.vdot(p, ap), tree_math.vdot(p, p)


@jax.jit
def _move(alpha, x, r, p, ap):
  r = tree_math.axpy(-alpha, ap, r)
  return tree_math.axpy(alpha, p, x), r, tree_math.norm(r)


_turn = jax.jit(tree_math.axpy)
_dot = jax.jit(tree_math.vdot)


@jax.jit
def _start_residual(hx, x, v, damping):
  r = tree_math.subtract(v, tree_math.axpy(damping, x, tree_math.promote(hx)))
  return r, tree_math.norm(r)


def _check_curvature(curvature, squared, active, step, damping) -> None:
  """Refuses p.(H + damping I) p <= 0 in a query that is still running: the step length would be meaningless."""
  if not np.all(np.isfinite(curvature[active])):
    raise DivergenceError(
      f"cg met a value that is not finite at step {step}: look for NaN in the weights or in the loss of an example"
    )
  bad = active & (curvature <= 0)
  if bad.any():
    query = int(np.flatnonzero(bad)[0])
    quotient = curvature[query] / max(squared[query], np.finfo(np.float64).tiny)
    raise NegativeCurvatureError(
      f"cg: p.(H + damping I) p = {curvature[query]:.3g} (per unit length {quotient:.3g}) at step {step}, "
      f"query {query}, with damping {damping:.3g}: H is not positive definite; "
      f"use a damping well above {damping - quotient:.3g} or --curvature=ggn"
    )


def _iterate(matvec: Matvec, run: _Run, sizes: np.ndarray, settings: CgSettings, precondition, on_step) -> None:
  """Runs until every query is below the tolerance by the recursive residual, or the steps are used up."""
  z = precondition(run.r)
  p, rz, run.p = z if run.p is None else run.p, _dot(run.r, z), None
  # Below one unit of rounding the recursive residual goes on shrinking towards 0 / 0 while x no longer moves.
  tol = max(settings.tol, float(jnp.finfo(rz.dtype).eps))
  active, rz = sizes > tol, np.asarray(rz, np.float64)
  while active.any() and run.steps < settings.max_steps:
    if np.any(active & ~(rz > 0)):
      raise UserError("cg: r.(M^-1 r) is not positive: the preconditioner must be symmetric and positive definite")
    ap, curvature, squared = _curvature_along(p, matvec(p), settings.damping)
    curvature, squared = np.asarray(curvature, np.float64), np.asarray(squared, np.float64)
    run.steps += 1
    _check_curvature(curvature, squared, active, run.steps, settings.damping)
    # A query below the tolerance is frozen: alpha 0 leaves it as it is and no 0 / 0 can arise.
    alpha = np.where(active, rz / np.where(active, curvature, 1), 0)
    run.x, run.r, measured = _move(alpha, run.x, run.r, p, ap)
    sizes = np.where(active, np.asarray(measured, np.float64), sizes)
    run.curve.append((run.steps, sizes.copy()))
    if on_step is not None:
      on_step(run.curve)
    active = active & (sizes > tol)
    z = precondition(run.r)
    fresh = np.asarray(_dot(run.r, z), np.float64)
    p, rz = _turn(np.where(active, fresh / np.where(rz > 0, rz, 1), 0), p, z), fresh


def _from_guess(matvec: Matvec, unit: Tree, x: Tree, settings: CgSettings) -> _Run:
  """The run of unit right-hand sides from a first guess on, which costs a product."""
  r, sizes = _start_residual(matvec(x), x, unit, settings.damping)
  return _Run(x, r, 0, [(0, np.asarray(sizes, np.float64))])


def _first_steps(space: krylov.KrylovSpace, sizes: np.ndarray, settings: CgSettings) -> _Run:
  """The steps that a Krylov space already holds, in its coordinates: those that `_iterate` would have made, [k + 1, Q].

  A' = T + damping I maps the coordinates of a direction to those of its product.
  """
  steps = len(space.diagonal)
  matrix = krylov.tridiagonal(space.diagonal, space.below)
  r = np.zeros((steps + 1, len(sizes)))
  r[0] = sizes
  x, p, active, rz, curve = np.zeros_like(r), r.copy(), sizes > settings.tol, sizes**2, [(0, sizes)]
  for step in range(1, steps + 1):
    ap = np.einsum("qij,jq->iq", matrix, p[:-1]) + settings.damping * p
    curvature, squared = (p * ap).sum(axis=0), (p * p).sum(axis=0)
    _check_curvature(curvature, squared, active, step, settings.damping)
    alpha = np.where(active, rz / np.where(active, curvature, 1), 0)
    x, r = x + alpha * p, r - alpha * ap
    fresh = (r * r).sum(axis=0)
    sizes = np.where(active, np.sqrt(fresh), sizes)
    curve.append((step, sizes))
    active = active & (sizes > settings.tol)
    p = r + np.where(active, fresh / np.where(rz > 0, rz, 1), 0) * p
    rz = fresh
    if not active.any():
      break
  return _Run(*(krylov.combine(part, space.vectors) for part in (x, r)), steps, curve, krylov.combine(p, space.vectors))


def cg(
  matvec: Matvec,
  v: Tree,
  settings: CgSettings,
  start: Tree | None = None,
  precondition=None,
  space: krylov.KrylovSpace | None = None,
  on_step: Callable[[list[tuple[int, np.ndarray]]], Any] | None = None,
) -> SolveResult:
  """Preconditioned conjugate gradients, one Krylov space per query (Hestenes and Stiefel 1952; method.md section 3).

  Every query has its own step lengths, stops at its own tolerance and stays frozen from there, so that several queries
  give what each alone gives. The recursive residual drifts from the true one in f32: when it claims convergence, the
  true one is computed and the iteration restarts from it for as long as that at least halves the error.

  Args:
    matvec: H v on a fixed set of examples, without damping; called once per step with leaves [Q, ...].
    v: right-hand side, leaves [Q, ...].
    settings: damping, tolerance, steps.
    start: first guess, leaves [Q, ...]; zeros when absent.
    precondition: r -> M^-1 r, symmetric positive definite, close to the inverse of H + damping I.
    space: of `krylov.explore` with the same matvec and v: its steps count and are not made again. Without `start` and
      `precondition`, whose spaces are others.
    on_step: gets the curve so far after every step that is made here.

  Returns:
    SolveResult; residual is recomputed at the end with one more product; curve holds the recursive residual.
    Where v is 0 the solution is exactly 0.

  Raises:
    NegativeCurvatureError: a direction with p.(H + damping I) p <= 0.
    DivergenceError: NaN or infinity.
    UserError: a preconditioner that is not positive definite, or a malformed v.
  """
  tree_math.num_queries(v)
  if space is not None and (start is not None or precondition is not None):
    raise ValueError("cg: a Krylov space that starts from v goes with no other start and no preconditioner")
  precondition = precondition or (lambda r: r)
  # Unit right-hand sides: squares of small gradients would underflow in f32.
  unit, norms, empty = krylov.unit(tree_math.promote(v))
  if not np.all(np.isfinite(np.asarray(norms))):
    raise DivergenceError(
      "cg: the right-hand side holds NaN or infinity: look for NaN in the weights or in a query's loss"
    )
  if start is None:
    sizes = np.asarray(~empty, np.float64)
    run = (
      _Run(tree_math.zeros_like(unit), unit, 0, [(0, sizes)]) if space is None else _first_steps(space, sizes, settings)
    )
  else:
    scale = np.where(np.asarray(empty), 0.0, 1 / np.asarray(norms, np.float64))
    run = _from_guess(matvec, unit, tree_math.scaled(scale, tree_math.promote(start)), settings)
  sizes = run.curve[-1][1]
  while True:
    _iterate(matvec, run, sizes, settings, precondition, on_step)
    run.r, measured = _start_residual(matvec(run.x), run.x, unit, settings.damping)
    before, sizes = sizes, np.asarray(measured, np.float64)
    late = sizes > settings.tol
    if not late.any() or run.steps >= settings.max_steps or not np.all(sizes[late] <= before[late] / 2):
      break
  solution = tree_math.scaled(norms, run.x)
  info = {
    "solver": "cg",
    "damping": settings.damping,
    "tol": settings.tol,
    "converged": bool(np.all(sizes <= settings.tol)),
    "max_residual": float(sizes.max()),
  }
  return SolveResult(solution, sizes, run.steps, run.curve, info)
