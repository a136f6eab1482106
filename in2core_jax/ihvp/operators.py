"""The curvature as a linear operator: products over fixed batches, residuals, largest eigenvalue, dense matrix.

Letters: Q queries, P size of the subtree, H curvature. `matvec(v)` is H v over a fixed set of examples, without
damping; it is an ordinary Python function (it may walk over batches on the host) and is never traced by a solver.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.ihvp import tree_math
from in2core_jax.ihvp.tree_math import Tree

Matvec = Callable[[Tree], Tree]


class DivergenceError(UserError):
  """An iteration that grows instead of converging; the message says at which step and what to change.

  Attributes:
    step: at which it was seen; None where it is no matter of steps.
  """

  def __init__(self, message: str, step: int | None = None):
    super().__init__(message)
    self.step = step


class NegativeCurvatureError(UserError):
  """H + damping I has a direction of negative curvature, so the system is not the one that the solver can solve."""


@dataclasses.dataclass(frozen=True)
class SolveResult:
  """What every solver returns.

  Attributes:
    solution: pytree like v, leaves [Q, ...], f32 or better: (H + damping I)^-1 v.
    residual: float64 [Q], |(H + damping I) x - v| / |v|; 0 where v is 0; NaN only where nobody asked to measure it.
    steps: iterations done, over all repeats.
    curve: (step, residual [Q]) at every check, in order.
    info: printable facts (damping, scale, lambda_max, effective_damping, converged, ...).
  """

  solution: Tree
  residual: np.ndarray
  steps: int
  curve: list[tuple[int, np.ndarray]]
  info: dict[str, Any]


def steps_left(curve: Sequence[tuple[int, np.ndarray]], tol: float, most: int) -> int:
  """Steps until every query is below the tolerance, at the mean rate of the later half of what was measured.

  Args:
    curve: (step, residual [Q]) so far, in order, as in `SolveResult`.
    tol: relative residual at which a query stops.
    most: steps that are left at most; the answer where nothing has shrunk.
  """
  if not curve:
    return most
  (first, before), (last, now) = curve[len(curve) // 2 if len(curve) > 2 else 0], curve[-1]
  late = now > tol
  if not late.any():
    return 0
  if last == first or tol <= 0:
    return most
  rates = np.log(before[late] / now[late]) / (last - first)
  if (rates <= 0).any():
    return most
  return int(min(most, np.ceil(np.max(np.log(now[late] / tol) / rates))))


@dataclasses.dataclass(frozen=True)
class Curvature:
  """H of one batch, pure and jit-able. Weights belong into `context`: captured ones become constants of the program.

  Pass the same function objects every time: they are the compilation cache's key.

  Attributes:
    product: product(context, batch, v) -> the *sum* over the examples of the batch of H_i v; leaves [Q, ...].
    num_examples: num_examples(batch) -> how many examples that sum counts (padding rows excluded).
    context: pytree handed through to `product`: parameters, chosen and frozen.
  """

  product: Callable[[Tree, Tree, Tree], Tree]
  num_examples: Callable[[Tree], Any]
  context: Tree = ()


@dataclasses.dataclass(frozen=True)
class Parts:
  """A minibatch in several batch shapes, each with a factor: H_B v = sum_p f_p (sum_(i in p) H_i v) / sum_p f_p n_p.

  A draw stratified by shape stays an unbiased estimate of the mean when f_p = (share of the data with this shape) *
  (examples drawn in all) / (examples drawn here). Each part runs the program that is compiled for its shape anyway.

  Attributes:
    batches: pytrees of several shapes.
    factors: one number for each.
  """

  batches: tuple
  factors: tuple[float, ...]


@partial(jax.jit, static_argnums=(0, 1))
def _add_batch(product, num_examples, context, batch, v, carry, factor):
  total, count = carry
  added = product(context, batch, v)
  total = jax.tree.map(lambda t, s: t + factor.astype(t.dtype) * s.astype(t.dtype), total, added)
  return total, count + factor * num_examples(batch)


@jax.jit
def _divide(total, count):
  return tree_math.scaled(1 / jnp.where(count > 0, count, jnp.nan), total)


def mean_product(curvature: Curvature, batches: Iterable[Tree | Parts], v: Tree) -> tuple[Tree, jax.Array]:
  """H v over all examples of some batches: sums are added up and divided once. Returns (H v, number of examples)."""
  dtype = jnp.result_type(*jax.tree.leaves(v))
  carry = (tree_math.zeros_like(v), jnp.zeros((), dtype))
  for batch in batches:
    parts = batch if isinstance(batch, Parts) else Parts((batch,), (1.0,))
    for part, factor in zip(parts.batches, parts.factors, strict=True):
      arguments = (curvature.context, part, v, carry, jnp.asarray(factor, dtype))
      carry = _add_batch(curvature.product, curvature.num_examples, *arguments)
  return _divide(*carry), carry[1]


def fixed_matvec(curvature: Curvature, batches: Sequence[Tree] | Callable[[], Iterable[Tree]]) -> Matvec:
  """H v over a fixed set of examples: the sums of all batches are added up, then divided once by all examples.

  H v = sum_b sum_(i in b) H_i v / sum_b n_b, method.md section 6: the answer does not depend on how the data is cut,
  whereas the mean over batches of their means (or of their inverses) would.

  Args:
    curvature: products of H.
    batches: a sequence of batches, or a function that gives a fresh iterator (batches read from the host each time).

  Returns:
    matvec(v) -> H v; leaves [Q, ...], f32 or better.
  """

  def matvec(v: Tree) -> Tree:
    product, count = mean_product(curvature, batches() if callable(batches) else batches, tree_math.promote(v))
    if not float(count) > 0:
      raise UserError("the curvature batches hold no example at all: give at least one example with a response")
    return product

  return matvec


def check_damping(damping: float, positive: bool = False) -> float:
  """The damping as a float, refused unless it is finite and not negative (or positive where the formula needs it)."""
  if not np.isfinite(damping) or damping < 0 or (positive and damping == 0):
    least = "above 0" if positive else "0 or more"
    raise UserError(f"damping {damping} is not usable: it must be finite and {least}; set damping or damping_ratio")
  return float(damping)


def resolve_damping(damping: float | None, damping_ratio: float | None, lambda_max: float) -> float:
  """The absolute damping: as typed, or damping_ratio times the largest eigenvalue (method.md section 2).

  Args:
    damping: absolute, in the unit of H, or None.
    damping_ratio: relative to lambda_max, or None.
    lambda_max: estimated largest eigenvalue of H.

  Returns:
    damping.

  Raises:
    UserError: both or neither given, a negative one, or a ratio of an eigenvalue that is not positive.
  """
  if (damping is None) == (damping_ratio is None):
    raise UserError(f"damping={damping} and damping_ratio={damping_ratio}: give exactly one of the two")
  if damping is not None:
    return check_damping(damping)
  if not lambda_max > 0:
    raise UserError(
      f"damping_ratio={damping_ratio} of a largest eigenvalue {lambda_max:.3g} means nothing: give an absolute damping"
    )
  return check_damping(damping_ratio * lambda_max)


@jax.jit
def _residual_parts(hx, x, v, damping):
  return tree_math.norm(tree_math.subtract(tree_math.axpy(damping, x, tree_math.promote(hx)), v)), tree_math.norm(v)


def relative_residual(matvec: Matvec, x: Tree, v: Tree, damping: float) -> np.ndarray:
  """|(H + damping I) x - v| / |v| per query.

  Args:
    matvec: H v on a fixed set.
    x: candidate solution, leaves [Q, ...].
    v: right-hand side, leaves [Q, ...].
    damping: absolute.

  Returns:
    float64 [Q]. Where v is exactly 0: 0 if the product is 0 too, otherwise inf.
  """
  x, v = tree_math.promote(x), tree_math.promote(v)
  return safe_ratio(*_residual_parts(matvec(x), x, v, damping))


def safe_ratio(error: jax.Array, size: jax.Array) -> np.ndarray:
  """error / size per query on the host, with 0 / 0 = 0 and e / 0 = inf."""
  error, size = np.asarray(error, np.float64), np.asarray(size, np.float64)
  empty = np.where(error == 0, 0.0, np.inf)
  return np.where(size == 0, empty, error / np.where(size == 0, 1.0, size))


@dataclasses.dataclass(frozen=True)
class PowerResult:
  """Outcome of a power iteration.

  Attributes:
    lambda_max: estimate of the largest (algebraic) eigenvalue of H; approaches it from below.
    curve: (step, estimate) of the eigenvalue that is largest in magnitude.
    dominant: estimate of the eigenvalue that is largest in magnitude; when negative, H is indefinite.
    converged: whether the last relative change was below the tolerance; no proof that no larger eigenvalue is left.
    vector: its eigenvector, leaves [1, ...], unit norm.
  """

  lambda_max: float
  curve: list[tuple[int, float]]
  dominant: float
  converged: bool
  vector: Tree


@jax.jit
def _normalized(x):
  size = tree_math.norm(x)
  return tree_math.scaled(jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0), x)


@jax.jit
def _rayleigh(q, hq):
  return tree_math.vdot(q, hq)[0], tree_math.norm(hq)[0]


def _iterate(matvec: Matvec, vector: Tree, steps: int, tol: float, shift: float = 0.0):
  """Power iteration from a unit vector -> (signed estimate, converged, curve, vector); tol is of estimate - shift."""
  curve, estimate = [], 0.0
  for step in range(1, steps + 1):
    product = matvec(vector)
    quotient, size = (float(value) for value in _rayleigh(vector, product))
    if not np.isfinite(size):
      raise DivergenceError(
        f"power iteration met a value that is not finite ({size}) at step {step}: "
        "look for NaN in the weights or in the loss of a curvature example"
      )
    # |H q| >= |q.Hq| and never exceeds the largest |eigenvalue|: the better of the two lower bounds.
    previous, estimate = estimate, float(np.copysign(size, quotient))
    curve.append((step, estimate))
    if size == 0:
      return 0.0, True, curve, vector
    vector = _normalized(product)
    if step > 1 and abs(estimate - previous) <= tol * abs(estimate - shift):
      return estimate, True, curve, vector
  return estimate, False, curve, vector


def power_iteration(
  matvec: Matvec, like: Tree, key: jax.Array, steps: int = 20, tol: float = 1e-3, start: Tree | None = None
) -> PowerResult:
  """Largest eigenvalue of a symmetric H by power iteration, q <- H q / |H q|.

  When the eigenvalue of largest magnitude is negative (the exact Hessian far from a minimum), a second iteration on
  H + |dominant| I finds the largest algebraic one; `dominant` then tells the caller that H is indefinite.

  Args:
    matvec: H v, without damping.
    like: pytree, leaves [Q, ...]; gives shapes and dtypes.
    key: PRNG key of the start vector.
    steps: at most this many products (twice that when the dominant eigenvalue is negative).
    tol: stop at this relative change between steps.
    start: leaves [1, ...], instead of a random start.

  Returns:
    PowerResult.

  Raises:
    UserError: steps below 1, or a product that is not finite.
  """
  if steps < 1:
    raise UserError(f"power iteration with steps={steps}: it needs at least 1")
  vector = _normalized(tree_math.promote(start) if start is not None else tree_math.random_normal(key, like))
  dominant, converged, curve, vector = _iterate(matvec, vector, steps, tol)
  if dominant >= 0:
    return PowerResult(dominant, curve, dominant, converged, vector)
  shift = abs(dominant)
  fresh = _normalized(tree_math.random_normal(jax.random.fold_in(key, 1), like))
  moved = lambda q: tree_math.axpy(shift, q, matvec(q))  # noqa: E731
  shifted, converged_too, _, _ = _iterate(moved, fresh, steps, tol, shift)
  return PowerResult(shifted - shift, curve, dominant, converged and converged_too, vector)


def dense_matrix(matvec: Matvec, like: Tree, chunk: int = 64) -> np.ndarray:
  """H as a matrix, column by column: only for small P.

  Args:
    matvec: H v.
    like: pytree, leaves [Q, ...]; gives shapes and dtypes.
    chunk: columns per call, all calls of one shape.

  Returns:
    float64 [P, P]; column j is H e_j, coordinates in the order of `tree_math.ravel`.
  """
  size = sum(int(np.prod(leaf.shape[1:], dtype=np.int64)) for leaf in jax.tree.leaves(like))
  chunk = min(chunk, size)
  columns = []
  for first in range(0, size, chunk):
    rows = np.zeros((chunk, size))
    last = min(first + chunk, size)
    rows[np.arange(last - first), np.arange(first, last)] = 1
    columns.append(tree_math.ravel(matvec(tree_math.unravel(rows, like)))[: last - first])
  return np.concatenate(columns).T
