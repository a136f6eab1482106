"""From flags to a solver: its settings, the examples behind its curvature, its progress."""

import dataclasses
import json
import logging
import math

import jax
import numpy as np

from in2core_jax import __version__ as version
from in2core_jax.costs import flop_counts
from in2core_jax.data import packing
from in2core_jax.errors import how_many
from in2core_jax.ihvp import ekfac_store, solvers
from in2core_jax.influence.solve import CurvatureData, SolverSettings, even_draw, even_rows
from in2core_jax.influence.solve import solve as solve_on
from in2core_jax.parallel import sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline import phases
from in2core_jax.pipeline.session import BoundSubtree, Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import resumable, run_folder, stopping
from in2core_jax.runs.progress import Progress
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)


def solver_settings(s: Settings) -> SolverSettings:
  """The solver that the flags ask for."""
  given = not math.isnan(s.damping)
  return SolverSettings(
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


@dataclasses.dataclass(frozen=True)
class CurvatureRows:
  """Which training rows the curvature is taken from, and in batches of which size.

  Attributes:
    fixed: the fixed set, in order.
    drawn: what LiSSA's minibatches are drawn from, by falling length.
    factors: what EK-FAC is fitted to, in order.
    batch: examples of a batch.
    shape: that serves all of them.
  """

  fixed: np.ndarray
  drawn: np.ndarray
  factors: np.ndarray
  batch: int
  shape: packing.PackedShape

  @property
  def num_fixed(self) -> int:
    """Batches of the fixed set."""
    return -(-len(self.fixed) // self.batch)


def num_curvature_examples(s: Settings, usable: int) -> int:
  """Size of the fixed set: at most half of the usable training examples, so that a small set leaves some to draw."""
  return min(s.curvature_examples, max(1, usable // 2))


def curvature_rows(session: Session, s: Settings) -> CurvatureRows:
  """Splits the training rows into a fixed set and the rest that LiSSA's minibatches are drawn from."""
  dataset = session.splits["train"]
  usable = np.flatnonzero(dataset.num_response_tokens)
  mixed = np.random.default_rng((s.seed, 11)).permutation(usable)
  size = num_curvature_examples(s, len(usable))
  fixed, drawn = np.sort(mixed[:size]), mixed[size:]
  drawn = drawn if len(drawn) else fixed
  drawn = drawn[np.argsort(-dataset.num_tokens[drawn], kind="stable")]
  batch = min(s.curvature_batch, len(drawn))
  # The fixed set comes in batches of a minibatch's size: one program serves both.
  plain = session.packer("train", rows=fixed, shapes=()), session.packer("train", shapes=())
  keys = jax.random.split(jax.random.key(0), 32)
  shape = packing.curvature_shape(plain[0], plain[1], batch, [even_rows(drawn, batch, key) for key in keys])
  # Fewer than all come from the other end of the order: then the fixed set measures a fit that has not seen it.
  factors = mixed[-s.ekfac_examples :] if s.ekfac_examples else mixed
  return CurvatureRows(fixed, drawn, np.sort(factors), batch, shape)


def curvature_data(
  session: Session,
  s: Settings,
  chosen: BoundSubtree,
  pieces: resumable.ShardSpec | None = None,
  rows: CurvatureRows | None = None,
) -> CurvatureData:
  """The curvature's examples as the solvers take them; sums over all of them are kept in `pieces`."""
  rows = rows or curvature_rows(session, s)
  pool = session.packer("train", chosen.tree, chosen.params, shapes=[rows.shape])
  some = session.packer("train", chosen.tree, chosen.params, rows.fixed, [rows.shape])
  draw = even_draw(rows.drawn, rows.batch, lambda picked: session.batching.place(pool.sample(picked)[1]))
  steady = lambda: ((own, session.batching.place(part)) for own, part in some.shuffled(rows.batch, 0, 0))  # noqa: E731
  answered = np.flatnonzero(session.splits["train"].num_response_tokens)  # the others would add 0 to every mean
  everything = session.batcher("train", chosen.tree, chosen.params, answered)
  every = session.stream(everything, f"{s.solver} over the training set", pieces)
  if not phases.needs_factors(s):
    return CurvatureData(every, steady, draw)
  return CurvatureData(every, steady, draw, *ekfac_source(session, s, chosen, rows.factors, pieces))


def ekfac_source(
  session: Session, s: Settings, chosen: BoundSubtree, rows: np.ndarray, pieces: resumable.ShardSpec | None = None
):
  """(stream of the training rows that EK-FAC is fitted to, function that fits or takes an earlier fit from disk)."""
  batcher = session.batcher("train", chosen.tree, chosen.params, rows)
  stream = session.stream(batcher, f"{phases.FACTORS} of {how_many(len(rows), 'example')}", pieces)
  made_of = {
    "config": session.model.config.stated(),
    "subtree": train_loop.subtree_meta(chosen.tree),
    "data": session.splits.identity("train"),
    "rows": rows.tolist(),
    "loss_reduction": s.loss_reduction,
    "version": version,
  }
  return stream, ekfac_store.stored_fit(run_folder.beside(s.run_dir, "ekfac"), made_of)


def solve(session: Session, s: Settings, chosen: BoundSubtree, v, pieces: resumable.ShardSpec) -> solvers.SolveResult:
  """The inverse Hessian product, or what an earlier run has kept of it.

  Args:
    session: data and model.
    s: the solver.
    chosen: where.
    v: right-hand side, leaves [Q, ...].
    pieces: of this very v: the answer, LiSSA's state, sums over the training set.
  """
  if s.solver == "identity":
    return solvers.identity(v)
  compute = lambda: _result_to_arrays(_solve(session, s, chosen, v, pieces))  # noqa: E731
  # Also a fresh result takes the road over the file, so that a resumed run goes on from the same numbers and types.
  return _result_from_arrays(resumable.kept(pieces.store("solution"), 0, compute), v, session.batching.mesh)


def _solve(session: Session, s: Settings, chosen: BoundSubtree, v, pieces: resumable.ShardSpec) -> solvers.SolveResult:
  """Solves with progress shown: counted in products with batches of curvature examples."""
  rows, settings = curvature_rows(session, s), solver_settings(s)
  source = curvature_data(session, s, chosen, pieces, rows)
  if s.solver == "datainf":  # no product, and a pass that shows itself
    return solve_on(chosen.problem, v, settings, source)
  apart = not settings.shares_space
  count = lambda depth, repeat: flop_counts.num_products(  # noqa: E731
    s.solver, rows.num_fixed, depth, repeat, subtree.count(v), apart
  )
  with Progress(count(s.depth, s.repeat), s.solver, "products") as progress:

    def fixed():
      for item in source.fixed():
        yield item
        progress.update(1)

    def draw(key):
      progress.update(1)
      return source.draw(key)

    counted = dataclasses.replace(source, fixed=fixed, draw=draw)
    if s.solver != "lissa":

      def on_step(curve: list[tuple[int, np.ndarray]]) -> None:
        left = solvers.steps_left(curve, s.solver_tol, s.depth - curve[-1][0])
        progress.expect(progress.count + (left + 1) * rows.num_fixed)  # one more measures the residual
        progress.update(0, residual=float(np.max(curve[-1][1])))

      return solve_on(chosen.problem, v, settings, counted, on_step=on_step)
    snapshot = resumable.Snapshot(pieces.store("lissa"))
    state = _saved_state(snapshot, v, session.batching.mesh)
    if state is not None:
      done = state.done + state.step
      log.info("lissa: continues from step %d", done)
      progress.skip(count(done, 1))
    with pieces.hold() as stop_requested:

      def on_state(state: solvers.LissaState) -> None:
        mine = [entry for entry in state.curve if entry[0] > state.done]  # of this repeat
        left = solvers.steps_left(mine, s.solver_tol, s.depth - state.step)
        progress.expect(count(state.step + left, s.repeat))
        progress.update(0, step=state.done + state.step, residual=float(np.max(state.curve[-1][1])))
        stop = stop_requested()
        snapshot.save(lambda: solvers.state_to_arrays(state), now=stop)
        if stop:
          raise stopping.Terminated

      return solve_on(chosen.problem, v, settings, counted, on_state, state)


def _saved_state(snapshot: resumable.Snapshot, v, mesh) -> solvers.LissaState | None:
  """LiSSA's state as an earlier run has left it, on the devices; None where there is none."""
  saved = snapshot.load()
  if saved is None:
    return None
  state = solvers.state_from_arrays(saved, v)
  vectors = {name: getattr(state, name) for name in ("u", "momentum", "mean", "total")}
  placed = {name: sharding.place_vectors(tree, mesh, True) for name, tree in vectors.items() if tree is not None}
  return dataclasses.replace(state, **placed)


def _result_to_arrays(result: solvers.SolveResult) -> dict[str, np.ndarray]:
  """A result as named host arrays; what is no vector as JSON."""
  facts = {"residual": result.residual, "steps": result.steps, "curve": result.curve, "info": result.info}
  text = json.dumps(facts, default=lambda value: value.tolist())
  return resumable.leaves(result.solution) | {"facts": np.frombuffer(text.encode(), np.uint8)}


def _result_from_arrays(arrays: dict[str, np.ndarray], v, mesh) -> solvers.SolveResult:
  """Inverse of `_result_to_arrays`, with the solution on the devices."""
  facts = json.loads(arrays["facts"].tobytes())
  solution = sharding.place_vectors(resumable.from_leaves(arrays, v), mesh, True)
  curve = [(step, np.array(residual)) for step, residual in facts["curve"]]
  return solvers.SolveResult(solution, np.array(facts["residual"]), facts["steps"], curve, facts["info"])


def announce(result: solvers.SolveResult) -> None:
  """Logs what was decided and how far the solver came."""
  facts = {k: (f"{v:.4g}" if isinstance(v, float) else v) for k, v in result.info.items()}
  log.info("solver: %s", ", ".join(f"{name}={value}" for name, value in facts.items()))
  if np.all(np.isfinite(result.residual)):
    log.info("solver: relative residual %.3g after %s", float(np.max(result.residual)), how_many(result.steps, "step"))
  else:
    log.info("solver: residual not measured")
  if "warning" in result.info:
    log.warning("solver: %s", result.info["warning"])
