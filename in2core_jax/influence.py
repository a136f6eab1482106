"""From queries to scores: influence(i, q) = g_q . (H + damping I)^-1 . g_i, streamed over batches.

Positive = proponent: giving example i more weight lowers the loss on query q. Scores are not divided by N.
This room knows no model and no data set: it gets an `Objective`, parameters and functions that yield batches.

Letters: B batch, N training examples, Q queries, P size of the subtree.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax import ekfac, gradients, ihvp, passes, processes
from in2core_jax.errors import UserError
from in2core_jax.gradients import Tree
from in2core_jax.passes import Stream

SOLVERS = ("lissa", "cg", "datainf", "identity", "ekfac", "low_rank", "exact")
PRECONDITIONERS = ("none", "ekfac", "diagonal")


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
    average: share of LiSSA's last steps whose iterates are averaged; 0 is the plain recursion of METHOD.md section 3.
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


class Problem:
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

  def at(self, sub: Tree, frozen: Tree | None = None) -> "Problem":
    """The same kernels at other parameters: nothing is compiled again."""
    other = object.__new__(Problem)
    other.__dict__ = self.__dict__ | {"sub": sub, "frozen": self.frozen if frozen is None else frozen}
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
    total, count = passes.total(stream, "gradient", step, (zeros, jnp.zeros((), jnp.int32)))
    if not int(count):
      raise UserError("the evaluation set is empty: there is nothing to have influence on")
    mean = jax.tree.map(lambda leaf: leaf[None] / int(count), total)
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(mean)):
      raise UserError("the evaluation gradient is not finite: look for NaN in the weights or in the evaluation losses")
    return mean

  def gradients(self, stream: Stream, size: int) -> Tree:
    """g_i of every example, host arrays [N, ...]; N * P numbers."""
    return self._gather(stream, size, self._gradients)

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

  def curvature(self, kind: str) -> ihvp.Curvature:
    """H of a batch as the solvers take it: sums over examples, parameters in the context."""
    return ihvp.Curvature(self._products[kind], _count, (self.sub, self.frozen))

  def example_gradients(self, batches) -> ihvp.ExampleGradients:
    """Per-example gradients as DataInf takes them."""
    context = self.sub, self.frozen
    return ihvp.ExampleGradients(self._example_gradients, batches, context, self.objective.separate, self.microbatch)


def solve(
  problem: Problem,
  v: Tree,
  settings: SolverSettings,
  data: "CurvatureData",
  on_state: Callable[[ihvp.LissaState], Any] | None = None,
  resume_from: ihvp.LissaState | None = None,
) -> ihvp.SolveResult:
  """(H + damping I)^-1 v by the chosen solver.

  Args:
    problem: where H is taken.
    v: leaves [Q, ...].
    settings: which solver.
    data: where the curvature's examples come from.
    on_state: called now and then with a state that `resume_from` takes; only LiSSA has states.
    resume_from: a state of a LiSSA solve with the same arguments; the result has the bytes of an uninterrupted one.

  Returns:
    SolveResult; `info` has what was decided (damping, scale, largest eigenvalue) and is printable.

  Raises:
    NegativeCurvatureError: LiSSA or CG with an H whose eigenvalue of largest size is below -damping.
    UserError: a state for a solver that has none, or whatever the solver refuses.
  """
  if resume_from is not None and settings.solver != "lissa":
    raise UserError(f"--solver={settings.solver} cannot go on from a saved state, only lissa can: start it afresh")
  if settings.solver == "identity":
    return ihvp.identity(v)
  if settings.solver == "datainf":
    options = ihvp.DataInfSettings(damping=settings.damping, damping_ratio=settings.damping_ratio)
    result = ihvp.datainf(v, problem.example_gradients(passes.without_rows(data.all)), options)
    # Not relative to an eigenvalue, unlike the other solvers' damping_ratio: said in its own words.
    rule = "absolute, the same in every block l" if settings.damping_ratio is None else _DATAINF_RULE
    return dataclasses.replace(result, info=result.info | {"damping_rule": rule})
  curvature = problem.curvature(settings.curvature)
  matvec = ihvp.fixed_matvec(curvature, lambda: (batch for _, batch in data.fixed()))
  key = jax.random.key(settings.seed)
  lambda_max, damping, top = _spectrum(matvec, v, key, settings, resume_from)
  if settings.solver == "exact":
    result = ihvp.exact(matvec, v, damping)
  elif settings.solver == "cg":
    options = ihvp.CgSettings(damping=damping, tol=settings.tol, max_steps=settings.depth)
    result = ihvp.cg(matvec, v, options, precondition=_preconditioner(problem, settings, data, damping))
    result = dataclasses.replace(result, info=result.info | {"precondition": settings.precondition})
  elif settings.solver == "ekfac":
    result = ekfac.ekfac(v, fit_ekfac(problem, settings, data), damping, matvec=matvec)
    result = dataclasses.replace(result, info=result.info | {"fitted_lambda_max": result.info["lambda_max"]})
  elif settings.solver == "low_rank":
    fitted = ihvp.fit_low_rank(matvec, v, jax.random.fold_in(key, 11), ihvp.LowRankSettings(settings.depth))
    result = ihvp.low_rank(v, fitted, damping, matvec)
  else:
    sampled = ihvp.Sampled(curvature, data.draw, matvec, top)
    result = ihvp.lissa(sampled, v, key, _lissa_settings(settings, damping, lambda_max), on_state, resume_from)
  facts = {
    "lambda_max": lambda_max,
    "damping": damping,
    "damping_ratio": damping / lambda_max if lambda_max > 0 else None,
    "damping_rule": "absolute" if settings.damping_ratio is None else "damping_ratio * lambda_max",
  }
  if settings.solver in ("exact", "low_rank"):  # better than the estimate that the damping is relative to
    facts["solver_lambda_max"] = result.info["lambda_max"]
  return dataclasses.replace(result, info=result.info | facts)


def fit_ekfac(
  problem: Problem, settings: SolverSettings, data: "CurvatureData", matrices: str | None = ekfac.MATRICES
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


def _preconditioner(problem: Problem, settings: SolverSettings, data: "CurvatureData", damping: float):
  """r -> M^-1 r for CG, or None; for the Hessian it is that of the ggn."""
  if settings.precondition == "none":
    return None
  matrices = ekfac.MATRICES if settings.precondition == "ekfac" else None
  return ekfac.preconditioner(fit_ekfac(problem, settings, data, matrices), damping)


_DATAINF_RULE = "damping_l = damping_ratio * mean_i |g_il|^2 / d_l in every block l of d_l numbers"


def _lissa_settings(settings: SolverSettings, damping: float, lambda_max: float) -> ihvp.LissaSettings:
  return ihvp.LissaSettings(
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


def _spectrum(matvec, v: Tree, key: jax.Array, settings: SolverSettings, state: ihvp.LissaState | None):
  """(largest eigenvalue of H on the fixed set, damping, eigenvector); refuses what LiSSA and CG cannot solve."""
  if state is not None:  # the same numbers, so that the resumed run ends in the same bytes
    return state.lambda_max, ihvp.resolve_damping(settings.damping, settings.damping_ratio, state.lambda_max), None
  if settings.curvature == "hessian":
    return *_both_ends(matvec, v, key, settings), None
  power = ihvp.power_iteration(matvec, v, jax.random.fold_in(key, 7), steps=10, tol=2e-2)
  damping = ihvp.resolve_damping(settings.damping, settings.damping_ratio, power.lambda_max)
  return power.lambda_max, damping, power.vector


def _both_ends(matvec, v: Tree, key: jax.Array, settings: SolverSettings) -> tuple[float, float]:
  """(largest eigenvalue, damping) of a Hessian, which may be indefinite, from a small Krylov space.

  Its smallest eigenvalue is an upper bound of H's: below -damping it proves that H + damping I is not positive
  definite. Above, nothing is proved, and CG and LiSSA look on.
  """
  steps = min(_HESSIAN_STEPS, sum(leaf[0].size for leaf in jax.tree.leaves(v)))
  found = ihvp.fit_low_rank(matvec, v, jax.random.fold_in(key, 7), ihvp.LowRankSettings(steps))
  largest, smallest = float(found.eigenvalues[0]), found.smallest
  damping = settings.damping if settings.damping is not None else settings.damping_ratio * max(largest, 0.0)
  if settings.solver != "exact" and smallest + damping < 0:
    raise ihvp.NegativeCurvatureError(
      f"--solver={settings.solver}: H (hessian) has the eigenvalue {smallest:.3g}, so H + damping I with damping "
      f"{damping:.3g} is not positive definite; use --damping well above {-smallest:.3g} or --curvature=ggn"
    )
  return largest, ihvp.resolve_damping(settings.damping, settings.damping_ratio, largest)


_HESSIAN_STEPS = 12  # products, and vectors of the subtree's size in memory


@dataclasses.dataclass(frozen=True)
class CurvatureData:
  """Where a solver's curvature comes from.

  Attributes:
    all: every curvature example, for DataInf.
    fixed: a fixed set: CG's and low_rank's system, everyone's power iteration and residual; LiSSA draws none of it.
    draw: key -> ihvp.Parts, a minibatch of other examples, a pure function of the key.
    factors: what EK-FAC is fitted to; None: all.
    fit: fits EK-FAC; `ekfac_file.stored_fit` makes one that keeps and reuses what it has fitted.
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


def even_draw(rows: np.ndarray, size: int, build: Callable[[np.ndarray], Any]) -> Callable[[jax.Array], ihvp.Parts]:
  """Makes `draw` of `even_rows`, without bias and in one part.

  Args:
    rows: the pool, in an order in which neighbours are alike (by length).
    size: examples drawn.
    build: rows -> batch on the devices.
  """
  return lambda key: ihvp.Parts((build(even_rows(rows, size, key)),), (1.0,))


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
  return "jvp" if queries <= 2 else "vmap"  # METHOD section 4: jvp is cheapest for 1 or 2 directions


def _finite(scores: np.ndarray) -> np.ndarray:
  if not np.all(np.isfinite(scores)):
    bad = np.flatnonzero(~np.all(np.isfinite(scores), axis=0))
    first, size = bad[:5].tolist(), scores.shape[1]
    raise UserError(f"{len(bad)} of {size} scores are not finite (first rows {first}): look at their losses")
  return scores


def _collect(stream: Stream, name: str, size: int, kernel, queries: int | None = None) -> np.ndarray:
  """Gathers kernel(batch) [..., B] into [..., N]."""
  out = np.zeros((size,) if queries is None else (queries, size), np.float32)
  for rows, values in passes.results(stream, name, kernel):
    _put(out, rows, values)
  return out


def _put(out, rows, values) -> None:
  there = np.flatnonzero(rows >= 0)  # packed batches have padding between the examples of their groups
  out[..., rows[there]] = values[..., there]


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
