"""From flags to a solver: its settings, the examples behind its curvature, its progress."""

import dataclasses
import logging
import math
import pathlib

import jax
import numpy as np

from experiments.flags import Settings
from experiments.workbench import Chosen, Workbench
from in2core_jax import __version__ as version
from in2core_jax import ekfac_file, finetune, ihvp, influence, packing, subtree
from in2core_jax.progress import Progress

log = logging.getLogger(__name__)


def solver_settings(s: Settings) -> influence.SolverSettings:
  """The solver that the flags ask for."""
  given = not math.isnan(s.damping)
  return influence.SolverSettings(
    s.solver,
    s.curvature,
    s.damping if given else None,
    None if given else s.damping_ratio,
    s.depth,
    s.repeat,
    None if math.isnan(s.scale) else s.scale,
    s.acceleration,
    s.solver_tol,
    s.seed,
    s.average,
    s.precondition,
  )


def curvature_data(bench: Workbench, s: Settings, chosen: Chosen) -> influence.CurvatureData:
  """Splits the training rows into a fixed set and the rest that LiSSA's minibatches are drawn from."""
  dataset = bench.parts["train"]
  usable = np.flatnonzero(dataset.num_response_tokens)
  mixed = np.random.default_rng((s.seed, 11)).permutation(usable)
  # Half at most goes to the fixed set, so that a small data set leaves something to draw.
  size = min(s.curvature_examples, max(1, len(usable) // 2))
  fixed, drawn = np.sort(mixed[:size]), mixed[size:]
  drawn = drawn if len(drawn) else fixed
  drawn = drawn[np.argsort(-dataset.num_tokens[drawn], kind="stable")]
  batch = min(s.curvature_batch, len(drawn))
  # The fixed set comes in batches of a minibatch's size: one program serves both.
  plain = bench.packer("train", rows=fixed, shapes=()), bench.packer("train", shapes=())
  keys = jax.random.split(jax.random.key(0), 32)
  shape = packing.curvature_shape(plain[0], plain[1], batch, [influence.even_rows(drawn, batch, key) for key in keys])
  pool = bench.packer("train", chosen.tree, chosen.params, shapes=[shape])
  some = bench.packer("train", chosen.tree, chosen.params, fixed, [shape])
  draw = influence.even_draw(drawn, batch, lambda rows: bench.place(pool.sample(rows)[1]))
  steady = lambda: ((rows, bench.place(part)) for rows, part in some.shuffled(batch, 0, 0))  # noqa: E731
  every = bench.stream(bench.batcher("train", chosen.tree, chosen.params), f"{s.solver} over the training set")
  if s.solver != "ekfac" and s.precondition == "none":
    return influence.CurvatureData(every, steady, draw)
  # From the other end of the order, so that the fixed set measures a fit that has not seen it where data allow that.
  factors = np.sort(mixed[-s.ekfac_examples :])
  return influence.CurvatureData(every, steady, draw, *ekfac_source(bench, s, chosen, factors))


def ekfac_source(bench: Workbench, s: Settings, chosen: Chosen, rows: np.ndarray):
  """(stream of the training rows that EK-FAC is fitted to, function that fits or takes an earlier fit from disk)."""
  stream = bench.stream(bench.batcher("train", chosen.tree, chosen.params, rows), f"EK-FAC of {len(rows)} examples")
  made_of = {
    "config": dataclasses.asdict(bench.config),
    "subtree": finetune.subtree_meta(chosen.tree),
    "data": bench.data_identity("train"),
    "rows": rows.tolist(),
    "loss_reduction": s.loss_reduction,
    "version": version,
  }
  return stream, ekfac_file.stored_fit(pathlib.Path(s.run_dir).parent / "ekfac", made_of)


def solve(bench: Workbench, s: Settings, chosen: Chosen, v) -> ihvp.SolveResult:
  """The inverse Hessian product, with its progress shown: counted in products with batches of curvature examples."""
  if s.solver == "identity":
    return ihvp.identity(v)
  source, settings = curvature_data(bench, s, chosen), solver_settings(s)
  if s.solver == "datainf":  # no product, and a pass that shows itself
    return influence.solve(chosen.problem, v, settings, source)
  with Progress(_num_products(s, source, v), s.solver, "products") as progress:

    def fixed():
      for item in source.fixed():
        yield item
        progress.update(1)

    def draw(key):
      progress.update(1)
      return source.draw(key)

    def show(state: ihvp.LissaState) -> None:
      progress.update(0, step=state.done + state.step, residual=float(np.max(state.curve[-1][1])))

    counted = dataclasses.replace(source, fixed=fixed, draw=draw)
    return influence.solve(chosen.problem, v, settings, counted, on_state=show if s.solver == "lissa" else None)


def _num_products(s: Settings, source: influence.CurvatureData, v) -> int:
  """How many products a solve takes at most, about: the largest eigenvalue, the steps, the residuals."""
  fixed = sum(1 for _ in source.fixed())
  if s.solver == "lissa":
    return 10 * fixed + s.repeat * (s.depth + -(-s.depth // 10) * fixed)
  if s.solver == "exact":
    return (11 + -(-subtree.count(v) // 64)) * fixed
  return (11 + (0 if s.solver == "ekfac" else s.depth)) * fixed


def announce(result: ihvp.SolveResult) -> None:
  """Logs what was decided and how far the solver came."""
  facts = {k: (f"{v:.4g}" if isinstance(v, float) else v) for k, v in result.info.items()}
  log.info("solver: %s", ", ".join(f"{name}={value}" for name, value in facts.items()))
  if np.all(np.isfinite(result.residual)):
    log.info("solver: relative residual %.3g after %d steps", float(np.max(result.residual)), result.steps)
