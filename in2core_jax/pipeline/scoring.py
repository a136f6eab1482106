"""From queries to scores: one solve and one pass, a projected store on disk, sums over a training's checkpoints.

Every computation keeps its finished pieces in a `Work`, so that a killed run goes on.
"""

import dataclasses
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.data.subsets import by_id
from in2core_jax.ihvp import solvers, tree_math
from in2core_jax.influence import kernels, normalize, projected, trajectory
from in2core_jax.influence.solve import fit_ekfac
from in2core_jax.parallel import processes, sharding
from in2core_jax.pipeline import phases
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.projection import Projection
from in2core_jax.pipeline.session import BoundSubtree, Session, choose
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.solver_inputs import announce, curvature_data, solve, solver_settings
from in2core_jax.pipeline.target_weights import sources_of
from in2core_jax.runs import resumable, run_folder
from in2core_jax.runs.unfinished import NOTHING_KEPT, Work
from in2core_jax.selection import aggregation
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)


class Clock:
  """Seconds per phase."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def lap(self, phase: str) -> None:
    """Ends a phase."""
    now = time.perf_counter()
    self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._last, 2)
    self._last = now


@dataclasses.dataclass(frozen=True)
class Scored:
  """What scoring gives.

  Attributes:
    influence: float64 [N], on the aggregated query.
    loss: float32 [N] of the training examples.
    result: of the solver.
    seconds: per phase.
    self_influence: float64 [N], or None where nothing asked for it.
    layers: {layer: influence [N]} with --write=layer, else None.
    queries: float32 [Q, N], influence on each evaluation example with --write=query, else None.
  """

  influence: np.ndarray
  loss: np.ndarray
  result: solvers.SolveResult
  seconds: dict
  self_influence: np.ndarray | None = None
  layers: dict[str, np.ndarray] | None = None
  queries: np.ndarray | None = None


def score(session: Session, s: Settings, chosen: BoundSubtree, work: Work) -> Scored:
  """Losses, query gradients, inverse Hessian product and scores."""
  clock = Clock()
  with_response = by_id(session.splits["eval"], session.splits["eval"].num_response_tokens > 0)
  train = session.packer("train", chosen.tree, chosen.params)
  session.packer("eval", chosen.tree, chosen.params)
  clock.lap("boundary")
  itself, sources = None, None
  if s.trajectory == "none":
    v, names = queries(session, s, chosen, work)
    clock.lap("query gradients")
    result = solve(session, s, chosen, v, work.pieces("solver", queries=resumable.tree_sha256(v)))
    clock.lap("solver")
  else:
    raw, v, names = _trajectory_scores(session, s, work, with_response)
    result = solvers.identity(v)
  announce(result)
  pieces = pieces_along(work, "scores", result.solution)
  way = phases.way_of(s, len(names))
  if way == "projected":
    raw, facts = projected_scores(session, s, chosen, result.solution)
    result = dataclasses.replace(result, info=result.info | facts)
  elif way == "whitened":
    raw, names, sources = ChoiceInputs(session, s, chosen.params).whitened_cosines()
  elif way == "norms":
    found = measure(session, s, chosen, result, pieces)
    raw, loss = _NORMALIZE[s.normalize](found), found.losses
    itself = found.self_influence if s.writes("self") else None
  elif way != "trajectory":
    if way == "vmap":  # which needs a row for each example
      train = session.batcher("train", chosen.tree, chosen.params)
    stream = session.stream(train, phases.SCORES, pieces)
    loss, raw = chosen.problem.losses_and_scores(stream, len(train), result.solution, s.score_path)
  if way in ("trajectory", "projected", "whitened"):  # whose scores bring no losses along
    loss = chosen.problem.losses(session.stream(train, phases.LOSSES, pieces), len(train))
  if phases.aggregates_blocks(s):
    raw = query_scores(session, s, chosen, work, with_response)
    names = [""] * len(raw)
  clock.lap("scores")
  how = phases.score_aggregate(s)
  if how in aggregation.BY_QUERY and way != "whitened":  # in a mean gradient they have counted already
    every = sources_of(session, s)
    sources = every and every.take(with_response)
  total = aggregation.aggregate(raw, names, how, session.splits["train"].ids, sources=sources)
  return Scored(total, loss, result, clock.seconds, itself)


def pieces_along(work: Work, name: str, directions) -> resumable.ShardSpec | None:
  """Where a pass along some directions is kept: the pieces of other directions are not taken for its own."""
  return work.pieces(name, directions=resumable.tree_sha256(directions))


_NORMALIZE = {
  "none": lambda found: found.scores,
  "cosine": normalize.cosine,
  "relatif": normalize.relatif,
  "theta_relatif": normalize.theta_relatif,
}


def measure(
  session: Session, s: Settings, chosen: BoundSubtree, result: solvers.SolveResult, pieces: resumable.ShardSpec | None
) -> normalize.Measures:
  """Scores with each example's norms and influence on itself."""
  train = session.batcher("train", chosen.tree, chosen.params)
  inverse = normalize.IDENTITY
  if s.solver == "ekfac":  # the fit that `solve` has kept
    fitted = fit_ekfac(chosen.problem, solver_settings(s), curvature_data(session, s, chosen))
    inverse = normalize.inverse_map("ekfac", fitted, result.info["damping"])
  stream = session.stream(train, phases.NORMS, pieces)
  return normalize.measure(chosen.problem, stream, len(train), result.solution, inverse)


def query_scores(
  session: Session, s: Settings, chosen: BoundSubtree, work: Work, queries: np.ndarray | None = None
) -> np.ndarray:
  """Scores of evaluation examples with every training example, float32 [Q, N], `--query_block` at a time.

  Args:
    session: data and model.
    s: the solver.
    chosen: where.
    work: keeps finished blocks.
    queries: int [Q], which evaluation examples; None: all.
  """
  some = np.arange(len(session.splits["eval"])) if queries is None else queries
  size = len(some)
  block, blocks = min(s.query_block, size), []
  which = "" if queries is None else f"-{run_folder.hash_of(queries.tolist())[:8]}"
  store = work.pieces(f"per_query{which}").store("blocks", block=block)
  for number, start in enumerate(range(0, size, block)):
    rows = some[np.minimum(np.arange(start, start + block), size - 1)]  # a filled last block compiles nothing new
    name = f"block-{number:06d}{which}"
    compute = lambda rows=rows, name=name: {"scores": _scores_of_block(session, s, chosen, rows, work, name)}  # noqa: E731
    blocks.append(resumable.kept(store, number, compute)["scores"][: size - start])
    work.remove(name)
  return np.concatenate(blocks)


def _scores_of_block(
  session: Session, s: Settings, chosen: BoundSubtree, rows: np.ndarray, work: Work, name: str
) -> np.ndarray:
  """Scores of some evaluation examples with every training example, float32 [len(rows), N]."""
  batcher = session.batcher("eval", chosen.tree, chosen.params, rows)
  gradients = chosen.problem.gradients(session.stream(batcher), len(rows))
  v = sharding.place_vectors(gradients, session.batching.mesh, True)
  result = solve(session, s, chosen, v, work.pieces(name, queries=resumable.tree_sha256(v)))
  train = session.batcher("train", chosen.tree, chosen.params)
  what = f"{phases.BLOCKS} {rows[0]}..{rows[-1]} of {len(session.splits['eval'])}"
  stream = session.stream(train, what, pieces_along(work, name, result.solution))
  return chosen.problem.scores(stream, len(train), result.solution, s.score_path)


# ---- queries -------------------------------------------------------------------------


def topic_rows(session: Session, s: Settings) -> dict[str, np.ndarray]:
  """Rows of the evaluation set behind each aggregated query: all of them, or those of each topic."""
  topics = np.array(session.splits["eval"].topics)
  if phases.score_aggregate(s) not in aggregation.BY_TOPIC:
    return {"all": np.arange(len(topics))}
  return {name: np.flatnonzero(topics == name) for name in sorted(set(topics))}


def queries(
  session: Session,
  s: Settings,
  chosen: BoundSubtree,
  work: Work = NOTHING_KEPT,
  name: str = "queries",
  groups: dict[str, np.ndarray] | None = None,
):
  """The aggregated queries and their names: one, or one for each evaluation topic with --aggregate by topic.

  Args:
    session: data and model.
    s: how they are aggregated.
    chosen: where gradients are taken.
    work: where their sums are kept, under `name`.
    name: another one at other parameters.
    groups: name -> rows of each query; those of --aggregate when None.
  """
  sources = sources_of(session, s) if groups is None or list(groups) == ["all"] else None
  if sources is not None:
    return _weighted_query(session, chosen, work, name, sources), ["all"]
  gradients, groups = [], topic_rows(session, s) if groups is None else groups
  for number, (topic, rows) in enumerate(groups.items()):
    pieces = work.pieces(f"{name}-{number:04d}", topic=topic)
    stream = session.stream(session.packer("eval", chosen.tree, chosen.params, rows), phases.QUERIES, pieces)
    gradients.append(chosen.problem.mean_gradient(stream))
  return tree_math.concatenate(gradients), list(groups)


def _weighted_query(session: Session, chosen: BoundSubtree, work: Work, name: str, sources: aggregation.Sources):
  """The mean of the sources' mean gradients, each with its share; leaves [1, ...]."""
  answered, total = session.splits["eval"].num_response_tokens > 0, None
  shares = sources.shares * np.bincount(sources.codes[answered], minlength=len(sources.shares)).clip(0, 1)
  for number in np.flatnonzero(shares):
    rows = np.flatnonzero(answered & (sources.codes == number))
    pieces = work.pieces(f"{name}-{number:04d}", source=int(number))
    stream = session.stream(session.packer("eval", chosen.tree, chosen.params, rows), phases.QUERIES, pieces)
    own = jax.tree.map(lambda leaf, n=number: leaf * (shares[n] / shares.sum()), chosen.problem.mean_gradient(stream))
    total = own if total is None else jax.tree.map(jnp.add, total, own)
  return total


# ---- projected store -----------------------------------------------------------------


def projected_scores(session: Session, s: Settings, chosen: BoundSubtree, solution) -> tuple[np.ndarray, dict]:
  """Scores from the store, float32 [Q, N], and how far these can be trusted: agreement with another seed."""
  ours = Projection(session, s, chosen.params, s.seed)
  store = ours.store()
  queries_ = processes.to_host(projected.project_direction(solution, ours.sketch))
  if store.agreement is None or store.agreement["queries_sha256"] != projected.queries_sha256(queries_):
    other = Projection(session, s, chosen.params, s.seed + 1)
    again = processes.to_host(projected.project_direction(solution, other.sketch))
    features = lambda rows: other.features("train", rows)  # noqa: E731
    projected.measure_self_agreement(store, queries_, projected.Again(other.sketch, again, features), 256)
  outside = float(np.max(projected.uncovered_share(solution, ours.sketch)))
  facts = {"projected_agreement": store.agreement["mean"], "not_projected_share": outside}
  log.info("projected store: %s", ", ".join(f"{name} {value}" for name, value in facts.items()))
  return store.scores(queries_), facts


# ---- sums over checkpoints -----------------------------------------------------------


def _trajectory_scores(session: Session, s: Settings, work: Work, with_response: np.ndarray):
  """`trajectory_scores`, of every single query with a response where these are aggregated."""
  if phases.score_aggregate(s) not in aggregation.BY_QUERY:
    return trajectory_scores(session, s, work, topic_rows(session, s))
  found, v = [], None
  for start in range(0, len(with_response), s.query_block):
    block = with_response[start : start + s.query_block]
    log.info("evaluation examples %d..%d of %d", start + 1, start + len(block), len(with_response))
    alone = {str(row): np.array([row]) for row in block}
    scores, v, _ = trajectory_scores(session, s, work, alone, f"-of-{block[0]:06d}-{block[-1]:06d}")
    found.append(scores)
  return np.concatenate(found), v, [""] * len(with_response)


def trajectory_scores(session: Session, s: Settings, work: Work, groups: dict[str, np.ndarray], which: str = ""):
  """TracIn's or LESS's sums over the checkpoints in --checkpoint: float32 [Q, N], last queries, their names.

  For LESS what is scored must be what was trained (`checks.check_scores`): Adam's moments are of these numbers.

  Args:
    session: data and model.
    s: which sum.
    work: keeps finished pieces.
    groups: name -> rows of the evaluation set whose mean is a query.
    which: names the pieces of these groups, where a run has several.
  """
  less = s.trajectory == "less"
  packed = not less and kernels.score_path(s.score_path, len(groups)) == "jvp"
  make = session.packer if packed else session.batcher  # `vmap` and LESS need a row for each example
  like = choose(session, session.checkpoint_params(s.checkpoint), s.layers, s.modules).problem.sub if less else None
  total, v, names = 0.0, None, []
  for step, weight in train_loop.kept_weights(s.checkpoint).items():
    log.info("%s: checkpoint of step %d, mean learning rate %.3g", s.trajectory, step, weight)
    chosen = choose(session, session.checkpoint_params(s.checkpoint, step), s.layers, s.modules)
    train = make("train", chosen.tree, chosen.params)
    v, names = queries(session, s, chosen, work, f"queries-at-{step:08d}{which}", groups)
    pieces = pieces_along(work, f"scores-at-{step:08d}{which}", v)
    stream = session.stream(train, f"{phases.AT_STEPS} step {step}", pieces)
    state = session.model.place(train_loop.load_state(s.checkpoint, step, like)) if less else None
    at, of_step = [trajectory.Checkpoint(chosen.problem, weight, state)], lambda _, v=v: v
    if less:
      total = total + trajectory.less(at, stream, len(train), of_step)
    else:
      total = total + trajectory.tracin(at, stream, len(train), of_step, s.score_path)
  return total, v, names
