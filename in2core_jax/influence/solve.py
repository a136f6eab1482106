"""From queries to (H + damping I)^-1 v: which solver, with which settings, on which data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from in2core_jax import gradients
from in2core_jax.errors import UserError
from in2core_jax.gradients import Tree
from in2core_jax.ihvp import ekfac, krylov, solvers
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.influence.solver_names import PRECONDITIONERS, SOLVERS
from in2core_jax.runs import resumable
from in2core_jax.runs.resumable import Stream


def shares_space(solver: str, precondition: str, curvature: str) -> bool:
  """Whether a solve finds the largest eigenvalue in its own steps (`ihvp.krylov`); words of `SolverSettings`."""
  return solver == "cg" and precondition == "none" and curvature != "hessian"


@dataclasses.dataclass(frozen=True)
class SolverSettings:
  """Which inverse, and how.

  Attributes:
    solver: one of SOLVERS.
    curvature: ggn, fisher or hessian.
    damping: absolute; None to use damping_ratio.
    damping_ratio: relative to the estimated largest eigenvalue (DataInf: to each layer's mean squared gradient entry).
    depth: LiSSA steps of one run, CG steps, dimension of low_rank's Krylov space.
    repeat: LiSSA runs averaged.
    scale: LiSSA's; None estimates it.
    acceleration: LiSSA's: none, momentum or chebyshev.
    tol: relative residual at which LiSSA and CG stop.
    seed: of LiSSA's minibatches and of the power iteration.
    average: share of LiSSA's last steps whose iterates are averaged; 0 is the plain recursion of method.md section 3.
      Half of them takes most of the minibatches' noise out of the answer.
    precondition: CG's: none, ekfac, or diagonal (the diagonal of the Fisher, fitted as EK-FAC's diagonal leaves are).
  """

  solver: str = "lissa"
  curvature: str = "ggn"
  damping: float | None = None
  damping_ratio: float | None = 0.1
  depth: int = 50
  repeat: int = 1
  scale: float | None = None
  acceleration: str = "none"
  tol: float = 1e-2
  seed: int = 0
  average: float = 0.5
  precondition: str = "none"

  def __post_init__(self):
    if self.solver not in SOLVERS:
      raise UserError(f"--solver={self.solver} is unknown; use one of {', '.join(SOLVERS)}")
    if self.curvature not in gradients.CURVATURE_PRODUCTS:
      known = ", ".join(gradients.CURVATURE_PRODUCTS)
      raise UserError(f"--curvature={self.curvature} is unknown; use one of {known}")
    if (self.damping is None) == (self.damping_ratio is None):
      raise UserError(f"--damping={self.damping} and --damping_ratio={self.damping_ratio}: give exactly one of the two")
    if self.precondition not in PRECONDITIONERS:
      raise UserError(f"--precondition={self.precondition} is unknown; use one of {', '.join(PRECONDITIONERS)}")
    if self.precondition != "none" and self.solver != "cg":
      raise UserError(f"--precondition={self.precondition} with --solver={self.solver}: only cg has a preconditioner")
    if self.solver == "ekfac" and self.curvature == "hessian":
      raise UserError("--solver=ekfac with --curvature=hessian: its factors are positive; use ggn or fisher, or cg")

  @property
  def shares_space(self) -> bool:
    """Whether the solve finds the largest eigenvalue in its own steps."""
    return shares_space(self.solver, self.precondition, self.curvature)


def solve(
  problem: CompiledObjective,
  v: Tree,
  settings: SolverSettings,
  data: "CurvatureData",
  on_state: Callable[[solvers.LissaState], Any] | None = None,
  resume_from: solvers.LissaState | None = None,
  on_step: Callable[[list[tuple[int, np.ndarray]]], Any] | None = None,
) -> solvers.SolveResult:
  """(H + damping I)^-1 v by the chosen solver.

  Args:
    problem: where H is taken.
    v: leaves [Q, ...].
    settings: which solver.
    data: where the curvature's examples come from.
    on_state: called now and then with a state that `resume_from` takes; only LiSSA has states.
    resume_from: a state of a LiSSA solve with the same arguments; the result has the bytes of an uninterrupted one.
    on_step: gets CG's residuals so far after each of its steps.

  Returns:
    SolveResult; `info` has what was decided (damping, scale, largest eigenvalue) and is printable.

  Raises:
    NegativeCurvatureError: LiSSA or CG with an H whose eigenvalue of largest size is below -damping.
    UserError: a state for a solver that has none, or whatever the solver refuses.
  """
  if resume_from is not None and settings.solver != "lissa":
    raise UserError(f"--solver={settings.solver} cannot continue from a saved state, only lissa can: start again")
  if settings.solver == "identity":
    return solvers.identity(v)
  if settings.solver == "datainf":
    return _datainf(problem, v, settings, data)
  curvature = problem.curvature(settings.curvature)
  matvec = solvers.fixed_matvec(curvature, lambda: (batch for _, batch in data.fixed()))
  key = jax.random.key(settings.seed)
  space = krylov.explore(matvec, v, min(krylov.STEPS, settings.depth)) if settings.shares_space else None
  lambda_max, damping, top = _spectrum(matvec, v, key, settings, resume_from, space)
  if settings.solver == "exact":
    result = solvers.exact(matvec, v, damping)
  elif settings.solver == "cg":
    options = solvers.CgSettings(damping=damping, tol=settings.tol, max_steps=settings.depth)
    inverse = _preconditioner(problem, settings, data, damping)
    result = solvers.cg(matvec, v, options, precondition=inverse, space=space, on_step=on_step)
    result = dataclasses.replace(result, info=result.info | {"precondition": settings.precondition})
  elif settings.solver == "ekfac":
    result = ekfac.ekfac(v, fit_ekfac(problem, settings, data), damping, matvec=matvec)
    result = dataclasses.replace(result, info=result.info | {"fitted_lambda_max": result.info["lambda_max"]})
  elif settings.solver == "low_rank":
    fitted = solvers.fit_low_rank(matvec, v, jax.random.fold_in(key, 11), solvers.LowRankSettings(settings.depth))
    result = solvers.low_rank(v, fitted, damping, matvec)
  else:
    sampled = solvers.StochasticCurvature(curvature, data.draw, matvec, top)
    result = solvers.lissa(sampled, v, key, _lissa_settings(settings, damping, lambda_max), on_state, resume_from)
  facts = {
    "lambda_max": lambda_max,
    "damping": damping,
    "damping_ratio": damping / lambda_max if lambda_max > 0 else None,
    "damping_rule": "absolute" if settings.damping_ratio is None else "damping_ratio * lambda_max",
  }
  if settings.solver in ("exact", "low_rank"):  # better than the estimate that the damping is relative to
    facts["solver_lambda_max"] = result.info["lambda_max"]
  return dataclasses.replace(result, info=result.info | facts)


def _datainf(problem: CompiledObjective, v: Tree, settings: SolverSettings, data: "CurvatureData"):
  """DataInf, whose damping ratio is relative to no eigenvalue, unlike the other solvers': said in its own words."""
  options = solvers.DataInfSettings(damping=settings.damping, damping_ratio=settings.damping_ratio)
  result = solvers.datainf(v, problem.example_gradients(resumable.without_rows(data.all)), options)
  rule = "absolute, the same in every block l" if settings.damping_ratio is None else _DATAINF_RULE
  return dataclasses.replace(result, info=result.info | {"damping_rule": rule})


def fit_ekfac(
  problem: CompiledObjective, settings: SolverSettings, data: "CurvatureData", matrices: str | None = ekfac.MATRICES
) -> ekfac.Ekfac:
  """EK-FAC of H at the problem's parameters: labels of the data for fisher, drawn from the model otherwise.

  Args:
    problem: where; `relabel` is needed unless the curvature is fisher.
    settings: curvature and seed.
    data: `factors` (or all) is what it is fitted to, by `fit`.
    matrices: leaves that get Kronecker factors; None: a diagonal everywhere.

  Raises:
    UserError: whatever `ekfac.fit` refuses.
  """
  kind = "fisher" if settings.curvature == "fisher" else "ggn"
  options = ekfac.EkfacSettings(
    kind, matrices=matrices, microbatch=problem.microbatch or ekfac.EkfacSettings.microbatch
  )
  stream = data.all if data.factors is None else data.factors
  relabel = problem.relabel if kind == "ggn" else None
  source = ekfac.Source(problem.objective, problem.sub, problem.frozen, stream, relabel)
  return data.fit(source, jax.random.fold_in(jax.random.key(settings.seed), 13), options)


def _preconditioner(problem: CompiledObjective, settings: SolverSettings, data: "CurvatureData", damping: float):
  """r -> M^-1 r for CG, or None; for the Hessian it is that of the ggn."""
  if settings.precondition == "none":
    return None
  matrices = ekfac.MATRICES if settings.precondition == "ekfac" else None
  return ekfac.preconditioner(fit_ekfac(problem, settings, data, matrices), damping)


_DATAINF_RULE = "damping_l = damping_ratio * mean_i |g_il|^2 / d_l in every block l of d_l numbers"


def _lissa_settings(settings: SolverSettings, damping: float, lambda_max: float) -> solvers.LissaSettings:
  return solvers.LissaSettings(
    damping=damping,
    scale=settings.scale,
    depth=settings.depth,
    repeat=settings.repeat,
    tol=settings.tol,
    acceleration=settings.acceleration,
    average=settings.average,
    lambda_max=lambda_max,
    scale_probes=1,
  )


def _spectrum(
  matvec,
  v: Tree,
  key: jax.Array,
  settings: SolverSettings,
  state: solvers.LissaState | None,
  space: krylov.KrylovSpace | None,
):
  """(largest eigenvalue of H on the fixed set, damping, eigenvector); refuses what LiSSA and CG cannot solve."""
  if space is not None:
    damping = solvers.resolve_damping(settings.damping, settings.damping_ratio, space.lambda_max)
    return space.lambda_max, damping, None
  if state is not None:  # the same numbers, so that the resumed run ends in the same bytes
    return state.lambda_max, solvers.resolve_damping(settings.damping, settings.damping_ratio, state.lambda_max), None
  if settings.curvature == "hessian":
    return *_both_ends(matvec, v, key, settings), None
  power = solvers.power_iteration(matvec, v, jax.random.fold_in(key, 7), steps=10, tol=2e-2)
  damping = solvers.resolve_damping(settings.damping, settings.damping_ratio, power.lambda_max)
  return power.lambda_max, damping, power.vector


def _both_ends(matvec, v: Tree, key: jax.Array, settings: SolverSettings) -> tuple[float, float]:
  """(largest eigenvalue, damping) of a Hessian, which may be indefinite, from a small Krylov space.

  Its smallest eigenvalue is an upper bound of H's: below -damping it proves that H + damping I is not positive
  definite. Above, nothing is proved, and CG and LiSSA look on.
  """
  steps = min(_HESSIAN_STEPS, sum(leaf[0].size for leaf in jax.tree.leaves(v)))
  found = solvers.fit_low_rank(matvec, v, jax.random.fold_in(key, 7), solvers.LowRankSettings(steps))
  largest, smallest = float(found.eigenvalues[0]), found.smallest
  damping = settings.damping if settings.damping is not None else settings.damping_ratio * max(largest, 0.0)
  if settings.solver != "exact" and smallest + damping < 0:
    raise solvers.NegativeCurvatureError(
      f"--solver={settings.solver}: H (hessian) has the eigenvalue {smallest:.3g}, so H + damping I with damping "
      f"{damping:.3g} is not positive definite; use --damping well above {-smallest:.3g} or --curvature=ggn"
    )
  return largest, solvers.resolve_damping(settings.damping, settings.damping_ratio, largest)


_HESSIAN_STEPS = 12  # products, and vectors of the subtree's size in memory


@dataclasses.dataclass(frozen=True)
class CurvatureData:
  """Where a solver's curvature comes from.

  Attributes:
    all: every curvature example, for DataInf.
    fixed: a fixed set: CG's and low_rank's system, everyone's power iteration and residual; LiSSA draws none of it.
    draw: key -> ihvp.Parts, a minibatch of other examples, a pure function of the key.
    factors: what EK-FAC is fitted to; None: all.
    fit: fits EK-FAC; `ekfac_store.stored_fit` makes one that keeps and reuses what it has fitted.
  """

  all: Stream
  fixed: Stream
  draw: Callable[[jax.Array], Any]
  factors: Stream | None = None
  fit: Callable[[ekfac.Source, jax.Array, ekfac.EkfacSettings], ekfac.Ekfac] = ekfac.fit


def even_rows(rows: np.ndarray, size: int, key: jax.Array) -> np.ndarray:
  """Draws `size` of `rows`, one from each of `size` equal stretches: a row is drawn size / len(rows) times on average.

  Rows in order of length make draws of nearly the same number of tokens, so that one compiled program serves them all.
  A row on the border of two stretches may come twice.
  """
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
  return rows[np.floor((np.arange(size) + rng.random(size)) * (len(rows) / size)).astype(np.int64)]


def even_draw(rows: np.ndarray, size: int, build: Callable[[np.ndarray], Any]) -> Callable[[jax.Array], solvers.Parts]:
  """Makes `draw` of `even_rows`, without bias and in one part.

  Args:
    rows: the pool, in an order in which neighbours are alike (by length).
    size: examples drawn.
    build: rows -> batch on the devices.
  """
  return lambda key: solvers.Parts((build(even_rows(rows, size, key)),), (1.0,))
