"""Scores beside one solve and one pass: a projected store on disk, sums over a training's checkpoints."""

import logging
import pathlib

import numpy as np

from experiments.flags import Settings
from experiments.workbench import Chosen, Workbench, choose
from in2core_jax import algebra, artifacts, finetune, influence, projected, subtree, trajectory
from in2core_jax.errors import UserError

log = logging.getLogger(__name__)


def topic_rows(bench: Workbench, s: Settings) -> dict[str, np.ndarray]:
  """Rows of the evaluation set behind each aggregated query: all of them, or those of each topic."""
  topics = np.array(bench.parts["eval"].topics)
  if s.aggregate == "mean":
    return {"all": np.arange(len(topics))}
  return {name: np.flatnonzero(topics == name) for name in sorted(set(topics))}


def queries(bench: Workbench, s: Settings, chosen: Chosen):
  """The aggregated queries and their names: one for --aggregate=mean, else one for each evaluation topic."""
  gradients, groups = [], topic_rows(bench, s)
  for rows in groups.values():
    stream = bench.stream(bench.packer("eval", chosen.tree, chosen.params, rows), "evaluation gradient")
    gradients.append(chosen.problem.mean_gradient(stream))
  return algebra.concatenate(gradients), list(groups)


# ---- projected store -----------------------------------------------------------------


class Projection:
  """The training set's projected gradients at some parameters, kept beside the run folder and used again."""

  def __init__(self, bench: Workbench, s: Settings, params, seed: int):
    """Draws the projection; `params` are those at which gradients are taken."""
    self.bench, self.params, self.settings = bench, params, s
    small = s.sketch_size < projected.MIN_SIZE
    self.sketch = projected.make_sketch(
      params, s.layers, projected.SketchSettings(s.sketch_size, seed, allow_small=small)
    )
    tree = self.sketch.tree
    self.chosen = Chosen(tree, params, bench.kernels(tree).at(*subtree.split(self.sketch.params, tree)))

  def features(self, part: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Projected gradients of a part's examples, float32 [N, W]."""
    batcher = self.bench.batcher(part, self.chosen.tree, self.params, rows)  # a sketch changes no hidden state
    what = f"projected gradients ({part})"
    return self.chosen.problem.adapter_features(self.bench.stream(batcher, what), len(batcher))

  def store(self) -> projected.ProjectedStore:
    """The training set's, computed where they are not on disk yet."""
    s, bench = self.settings, self.bench
    identity = {
      "model": bench.model_hash,
      "checkpoint": finetune.checkpoint_meta(s.checkpoint) if self.params is not bench.params else {},
      "data": bench.data_identity("train"),
      "loss_reduction": s.loss_reduction,
      "dtype": s.dtype,
    }
    name = artifacts.hash_of([identity, self.sketch.identity()])[:16]
    folder = pathlib.Path(s.run_dir).parent / "projected" / name
    store = projected.ProjectedStore.open(folder, identity, self.sketch, len(bench.parts["train"]))
    store.fill(lambda rows: self.features("train", rows))
    return store


def projected_scores(bench: Workbench, s: Settings, chosen: Chosen, solution) -> tuple[np.ndarray, dict]:
  """Scores from the store, float32 [Q, N], and how far these can be trusted: agreement with another seed."""
  ours = Projection(bench, s, chosen.params, s.seed)
  store = ours.store()
  queries_ = np.asarray(projected.project_direction(solution, ours.sketch))
  if store.agreement is None or store.agreement["queries_sha256"] != projected.queries_sha256(queries_):
    other = Projection(bench, s, chosen.params, s.seed + 1)
    again = np.asarray(projected.project_direction(solution, other.sketch))
    features = lambda rows: other.features("train", rows)  # noqa: E731
    projected.measure_self_agreement(store, queries_, projected.Again(other.sketch, again, features), 256)
  outside = float(np.max(projected.uncovered_share(solution, ours.sketch)))
  facts = {"projected_agreement": store.agreement["mean"], "not_projected_share": outside}
  log.info("projected store: %s", ", ".join(f"{name} {value}" for name, value in facts.items()))
  return store.scores(queries_), facts


# ---- sums over checkpoints -----------------------------------------------------------


def trajectory_scores(bench: Workbench, s: Settings):
  """TracIn's or LESS's sums over the checkpoints in --checkpoint: float32 [Q, N], last queries, their names.

  Raises:
    UserError: no --checkpoint, or for LESS one of another subtree.
  """
  if not s.checkpoint:
    raise UserError(f"--trajectory={s.trajectory} adds up over a training: give its --checkpoint")
  less = s.trajectory == "less"
  packed = not less and influence.score_path(s.score_path, len(topic_rows(bench, s))) == "jvp"
  make = bench.packer if packed else bench.batcher  # `vmap` and LESS need a row for each example
  like = trained_subtree(bench, s) if less else None
  total, v, names = 0.0, None, []
  for step, weight in trajectory_weights(s.checkpoint).items():
    log.info("%s: checkpoint of step %d, mean learning rate %.3g", s.trajectory, step, weight)
    chosen = choose(bench, bench.checkpoint_params(s.checkpoint, step), s.layers, s.modules)
    train = make("train", chosen.tree, chosen.params)
    stream = bench.stream(train, f"scores at step {step}")
    v, names = queries(bench, s, chosen)
    state = finetune.load_state(s.checkpoint, step, like) if less else None
    at, of_step = [trajectory.Checkpoint(chosen.problem, weight, state)], lambda _, v=v: v
    if less:
      total = total + trajectory.less(at, stream, len(train), of_step)
    else:
      total = total + trajectory.tracin(at, stream, len(train), of_step, s.score_path)
  return total, v, names


def trajectory_weights(folder: str) -> dict[int, float]:
  """Mean learning rate of each checkpoint of a training that has kept all of them.

  Raises:
    UserError: some of them are gone.
  """
  meta, kept = finetune.checkpoint_meta(folder), finetune.kept_steps(folder)
  wanted = sorted({*range(meta["checkpoint_every"], meta["steps"] + 1, meta["checkpoint_every"]), meta["steps"]})
  if kept != wanted:
    raise UserError(
      f"--trajectory: {folder} has checkpoints of steps {kept} out of {wanted}: fine-tune again with "
      "--keep_checkpoints=0 --overwrite"
    )
  return finetune.step_weights(folder, kept)


def trained_subtree(bench: Workbench, s: Settings):
  """What the checkpoint's training changed, which must be what is scored: Adam's moments are of these numbers."""
  params = bench.checkpoint_params(s.checkpoint)
  saved = finetune.checkpoint_meta(s.checkpoint)["subtree"]
  tree = subtree.make_subtree(params, s.layers, s.modules)
  if finetune.subtree_meta(tree) != saved:
    raise UserError(
      f"--trajectory=less with --layers={s.layers} --modules={s.modules}: {s.checkpoint} trained layers "
      f"{saved['layers']}, {', '.join(saved['paths'])}; choose the same, Adam's moments are theirs"
    )
  return subtree.split(params, tree)[0]
