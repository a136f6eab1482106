"""Inverse Hessian products: every solver of (H + damping I) x = v behind one interface, and the two simplest here.

    from in2core_jax.ihvp import solvers
    result = solvers.cg(matvec, v, solvers.CgSettings(damping=0.1))  # result.solution, .residual, .steps, .curve, .info

| solver | H enters as | exact? |
|---|---|---|
| `identity` | not at all: x = v | no: gradient dot product |
| `exact` | dense matrix, float64 | yes, small P only |
| `lissa` | minibatch products, new ones at every step | in the limit; residual measured on held-out batches |
| `cg` | products over a fixed set | to its tolerance |
| `datainf` | per-example gradients, one or two passes | no: swaps mean and inverse |
| `low_rank` | products over a fixed set, once for all queries | on its Krylov space |

Letters: Q queries, P size of the subtree. Solutions are in f32 or better. This room knows no model and no data.
"""

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.ihvp import tree_math
from in2core_jax.ihvp.cg import CgSettings, cg
from in2core_jax.ihvp.datainf import (
  DataInfSettings,
  ExampleGradients,
  datainf,
  datainf_accumulate,
  datainf_finish,
  datainf_start,
  make_blocks,
)
from in2core_jax.ihvp.lissa import choose_scale, lissa
from in2core_jax.ihvp.lissa_schedule import effective_damping
from in2core_jax.ihvp.lissa_state import (
  LissaSettings,
  LissaState,
  StochasticCurvature,
  state_from_arrays,
  state_to_arrays,
)
from in2core_jax.ihvp.low_rank import LowRank, LowRankSettings, fit_low_rank, low_rank
from in2core_jax.ihvp.operators import (
  Curvature,
  DivergenceError,
  Matvec,
  NegativeCurvatureError,
  Parts,
  PowerResult,
  SolveResult,
  check_damping,
  dense_matrix,
  fixed_matvec,
  power_iteration,
  relative_residual,
  resolve_damping,
  steps_left,
)
from in2core_jax.ihvp.tree_math import Tree

__all__ = [
  "CgSettings",
  "Curvature",
  "DataInfSettings",
  "DivergenceError",
  "ExampleGradients",
  "LissaSettings",
  "LissaState",
  "LowRank",
  "LowRankSettings",
  "NegativeCurvatureError",
  "Parts",
  "PowerResult",
  "StochasticCurvature",
  "SolveResult",
  "cg",
  "choose_scale",
  "datainf",
  "datainf_accumulate",
  "datainf_finish",
  "datainf_start",
  "dense_matrix",
  "effective_damping",
  "exact",
  "fit_low_rank",
  "fixed_matvec",
  "identity",
  "lissa",
  "low_rank",
  "make_blocks",
  "power_iteration",
  "relative_residual",
  "resolve_damping",
  "state_from_arrays",
  "state_to_arrays",
  "steps_left",
]


def identity(v: Tree, matvec: Matvec | None = None, damping: float = 0.0) -> SolveResult:
  """x = v: influence becomes the plain gradient dot product.

  Args:
    v: right-hand side, leaves [Q, ...].
    matvec: H v; when given, the residual is measured, which says how far from an inverse the identity is.
    damping: absolute; only enters the residual.

  Returns:
    SolveResult with 0 steps; residual is NaN without `matvec`.
  """
  queries = tree_math.num_queries(v)
  solution = tree_math.promote(v)
  measured = matvec is not None
  residual = relative_residual(matvec, solution, v, damping) if measured else np.full(queries, np.nan)
  info = {"solver": "identity", "damping": check_damping(damping), "residual_measured": measured}
  return SolveResult(solution, residual, 0, [(0, residual)] if measured else [], info)


EXACT_LIMIT = 4096


def exact(matvec: Matvec, v: Tree, damping: float, limit: int = EXACT_LIMIT) -> SolveResult:
  """(H + damping I)^-1 v by a dense float64 solve on the host: the oracle for small subtrees.

  Args:
    matvec: H v on a fixed set of examples.
    v: right-hand side, leaves [Q, ...].
    damping: absolute, 0 or more.
    limit: largest P accepted; the matrix takes 8 P^2 bytes and P / 64 products.

  Returns:
    SolveResult; steps counts columns. info["positive_definite"] is False for an indefinite H, which is accepted here.

  Raises:
    UserError: P above the limit, products that are not symmetric or not finite, a singular matrix.
  """
  tree_math.num_queries(v)
  rows = tree_math.ravel(v)
  size, damping = rows.shape[1], check_damping(damping)
  if size > limit:
    raise UserError(f"exact: the subtree has {size} parameters, more than {limit}: choose fewer layers or --solver=cg")
  h = dense_matrix(matvec, v)
  if not np.all(np.isfinite(h)):
    raise DivergenceError("exact: H holds NaN or infinity: look for NaN in the weights or in the loss of an example")
  peak = np.abs(h).max()
  asymmetry = float(np.abs(h - h.T).max() / peak) if peak else 0.0
  if asymmetry > 1e-2:
    raise UserError(f"exact: H is not symmetric (relative difference {asymmetry:.2g}): this product is no curvature")
  damped = (h + h.T) / 2 + damping * np.eye(size)
  eigenvalues = np.linalg.eigvalsh(damped)
  if np.abs(eigenvalues).min() <= size * np.finfo(np.float64).eps * np.abs(eigenvalues).max():
    raise UserError(f"exact: H + damping I is singular with damping {damping:.3g}: give a larger damping")
  solution = tree_math.unravel(np.linalg.solve(damped, rows.T).T, v)
  residual = relative_residual(matvec, solution, v, damping)
  info = {
    "solver": "exact",
    "damping": damping,
    "lambda_max": float(eigenvalues[-1] - damping),
    "lambda_min": float(eigenvalues[0] - damping),
    "condition": float(np.abs(eigenvalues).max() / np.abs(eigenvalues).min()),
    "positive_definite": bool(eigenvalues[0] > 0),
    "asymmetry": asymmetry,
  }
  return SolveResult(solution, residual, size, [(size, residual)], info)
