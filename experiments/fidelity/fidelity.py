"""Do the scores predict what retraining gives? LDS of solvers, layers, damping on retrained halves; leave-out curves.

./run.sh fidelity --flagfile=experiments/flags/fidelity.flags
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import numpy as np

from experiments import flags
from experiments.fidelity import report
from experiments.fidelity.settings import FidelitySettings
from experiments.solvers.solvers import ratios
from in2core_jax.data.subsets import distinct_points
from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation import datamodeling
from in2core_jax.influence.solver_names import SOLVERS
from in2core_jax.params import subtree
from in2core_jax.pipeline.checks import check_size, check_solvers
from in2core_jax.pipeline.finetune import recipe_of, trainable_rows
from in2core_jax.pipeline.judging import test_examples
from in2core_jax.pipeline.metagradient import check_trained, query_metagradients
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.pipeline.scoring import query_scores
from in2core_jax.pipeline.session import Session, choose, open_session
from in2core_jax.pipeline.settings import OTHER_POLICIES, refuse, seeds_of, words
from in2core_jax.runs import run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.unfinished import Work
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import Budget, inputs_of

log = logging.getLogger(__name__)

AT = ("full", "base")
# They say which cells are shown, or are the same in no two variants.
_NOT_IDENTITY = (
  "halves",
  "halves_again",
  "lds_solvers",
  "lds_layers",
  "lds_ratios",
  "lds_at",
  "lds_every",
  "curve_solvers",
  "left_out",
)
_DOES = "fidelity compares plain influence (--lds_solvers, --lds_ratios), trains by itself (--lds_at), has no policy"
_REFUSED = (
  *("checkpoint", "damping", "normalize", "write=self", "write=layer", "write=token", "aggregate"),
  *("score_path=projected", "trajectory"),
  *("eval_weights", *OTHER_POLICIES),
)
_LEAST_HALVES = 3  # that have a rank correlation with an interval
_OF_VARIANTS = ("solver", "layers", "damping", "damping_ratio", "per_query", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to compute scores.

  Attributes:
    solver: of the inverse.
    layers: word of --layers.
    ratio: of the damping; NaN for identity, which has none.
    at: full (trained on the full set) or base, where gradients are taken; training: along that on the full set.
  """

  solver: str
  layers: str
  ratio: float
  at: str

  @property
  def name(self) -> str:
    """For tables and logs."""
    damping = "" if math.isnan(self.ratio) else f", damping {self.ratio:g}"
    return f"{self.solver}, {self.layers}{damping}, {self.at}"

  def cell(self) -> tuple:
    """What the scores depend on beyond the run's identity."""
    ratio = None if math.isnan(self.ratio) else self.ratio
    return "distinct", self.solver, self.layers, ratio, self.at  # queries: scores of all of them had no such word

  def differs(self, other: "Variant") -> list[str]:
    """Names of what is different; identity has no damping that could differ."""
    undamped = math.isnan(self.ratio) or math.isnan(other.ratio)
    names = ("solver", "layers", *(() if undamped else ("ratio",)), "at")
    return [name for name in names if getattr(self, name) != getattr(other, name)]


def variants_of(s: FidelitySettings) -> list[Variant]:
  """Every solver at the default layers, damping and place, and each of these changed alone; the default comes first.

  With --lds_every=false they are changed for --solver and the baselines, which is what conclusions are drawn from. The
  metagradient is of what is trained, along the training; nothing of it can be changed.

  Raises:
    UserError: a list that is empty or has unknown words, or --solver not among --lds_solvers.
  """
  named = words(s.lds_solvers, "lds_solvers", (*SOLVERS, report.METAGRADIENT))
  solvers = [name for name in named if name != report.METAGRADIENT]
  layers, at = words(s.lds_layers, "lds_layers", separator=";"), words(s.lds_at, "lds_at", AT)
  dampings = ratios(s.lds_ratios, "lds_ratios")
  if not layers or not at:
    raise UserError("--lds_layers and --lds_at need at least one word each")
  if s.solver not in solvers:
    raise UserError(f"--solver={s.solver} is what the others are compared with: --lds_solvers={s.lds_solvers} lacks it")
  found = []
  for solver in [s.solver, *(name for name in solvers if name != s.solver)]:
    damping = [math.nan] if solver == "identity" else dampings
    found.append(Variant(solver, layers[0], damping[0], at[0]))
    if s.lds_every or solver in (s.solver, *report.BASELINES):
      found += [Variant(solver, layers[0], ratio, at[0]) for ratio in damping[1:]]
      found += [Variant(solver, other, damping[0], at[0]) for other in layers[1:]]
      found += [Variant(solver, layers[0], damping[0], other) for other in at[1:]]
  if report.METAGRADIENT in named:
    found.append(Variant(report.METAGRADIENT, s.trainable_layers, math.nan, "training"))
  return found


def settings_of(s: FidelitySettings, variant: Variant) -> FidelitySettings:
  """The flags with those of a variant in their place."""
  depth = {"cg": s.cg_steps, "low_rank": s.krylov}.get(variant.solver, s.depth)
  ratio = s.damping_ratio if math.isnan(variant.ratio) else variant.ratio
  return s.replace(solver=variant.solver, layers=variant.layers, damping=math.nan, damping_ratio=ratio, depth=depth)


@dataclasses.dataclass(frozen=True)
class Removal:
  """A set of training examples that is left out.

  Attributes:
    what: top of a solver, opponents, random, or nothing.
    share: of the training examples.
    seed: of the order of the data, and of random sets.
    rows: what is left.
  """

  what: str
  share: float
  seed: int
  rows: np.ndarray


class Task:
  """The data, the halves, and every training and score that is made of them."""

  def __init__(self, session: Session, s: FidelitySettings, run_dir: run_folder.RunDir):
    self.session, self.settings, self.run_dir, self.cells = session, s, run_dir, ResultCache(run_dir)
    self.rows = trainable_rows(session)
    self.halves = [half_of(self.rows, s.seed, number) for number in range(s.halves)]
    self.judge = functools.cache(lambda: Retrainer(session, s, [self.rows, *self.halves]))
    # Copies would be correlated with the models once each, and the interval over queries take them for others.
    self.queries, self.query_of = np.unique(distinct_points(session.splits["eval"]), return_inverse=True)

  @property
  def masks(self) -> np.ndarray:
    """Which training examples each half has, bool [M, N]."""
    masks = np.zeros((len(self.halves), len(self.session.splits["train"])), bool)
    for mask, rows in zip(masks, self.halves, strict=True):
      mask[rows] = True
    return masks

  def losses(self) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the evaluation examples after training on the halves: [M, Q], and [C, Q] of the second trainings."""
    again = self.settings.halves_again
    jobs = [(number, 2 * number) for number in range(len(self.halves))]
    jobs += [(number, 2 * number + 1) for number in range(again)]
    found = []
    for count, (number, seed) in enumerate(jobs):
      label = f"half {count + 1}/{len(jobs)}"
      found.append(trained(self.cells, self.judge, self.halves[number], seed, label, ("eval",))["eval"])
    return np.array(found[: len(self.halves)]), np.array(found[len(self.halves) :])

  @functools.cached_property
  def full(self):
    """Parameters after training on the full set."""
    judge = self.judge()
    result = judge.train(self.rows, self.settings.seed, "full")
    return subtree.merge(result.sub, judge.frozen, judge.chosen)

  def scores(self, variant: Variant) -> dict:
    """The cell of a variant: scores [Q][N] of each distinct evaluation example with every training example; seconds."""
    s, name = self.settings, variant.cell()
    if variant.solver == report.METAGRADIENT:
      name = (*name, seeds_of(s)[0])
    work = Work(self.run_dir, s.shard_batches, f"unfinished/{run_folder.hash_of(name)[:16]}")

    def make() -> dict:
      if variant.solver == report.METAGRADIENT:
        found = query_metagradients(self.session, s, self.queries, seeds_of(s)[0], work)
        work.remove()
        return {"scores": found.tolist(), "parameters": subtree.count(self.judge().sub)}
      own = settings_of(s, variant)
      chosen = choose(
        self.session, self.full if variant.at == "full" else self.session.model.params, variant.layers, s.modules
      )
      found = query_scores(self.session, own, chosen, work, self.queries)
      work.remove()
      return {"scores": found.tolist(), "parameters": subtree.count(chosen.problem.sub)}

    return self.cells.get(make, "scores", *name)

  def removals(self, scores: dict[str, np.ndarray]) -> list[Removal]:
    """What is left out: the top by each solver, the opponents of the first of them, random sets, nothing.

    Args:
      scores: solver -> influence on the evaluation set, [N].
    """
    s, train = self.settings, self.session.splits["train"]
    random, fixed = seeds_of(s)
    found = [Removal("nothing", 0.0, seed, self.rows) for seed in fixed]
    policies = [(f"top, {solver}", "proponents", values) for solver, values in scores.items()]
    policies += [(f"opponents, {solver}", "opponents", values) for solver, values in [*scores.items()][:1]]
    policies += [("random", "random", None)]
    for what, policy, values in policies:
      inputs = inputs_of(train, values)
      for share in ratios(s.left_out, "left_out"):
        for seed in random if policy == "random" else fixed:
          out = coreset.select_rows(policy, inputs, Budget(fraction=share), seed)
          found.append(Removal(what, share, seed, np.setdiff1d(self.rows, out)))
    return found

  def curves(self, scores: dict[str, np.ndarray]) -> list[dict]:
    """A dict for each training of the leave-out curves: what, share, seed, examples, losses of eval and test."""
    removals = self.removals(scores)
    judge = functools.cache(lambda: Retrainer(self.session, self.settings, [removal.rows for removal in removals]))
    found = []
    for count, removal in enumerate(removals):
      label = f"left out {count + 1}/{len(removals)}: {removal.what}"
      cell = trained(self.cells, judge, removal.rows, removal.seed, label, report.JUDGED)
      losses = {part: mean_loss(self.session, part, np.array(cell[part])) for part in report.JUDGED}
      out = np.setdiff1d(self.rows, removal.rows)
      tokens = int(self.session.splits["train"].num_response_tokens[out].sum())
      facts = {"what": removal.what, "share": removal.share, "seed": removal.seed}
      points = {part: judged_losses(self.session, part, np.array(cell[part])) for part in report.JUDGED}
      found.append(facts | {"examples": len(out), "response_tokens": tokens, "points": points} | losses)
    return found


def half_of(rows: np.ndarray, seed: int, number: int) -> np.ndarray:
  """A random half of the rows, in order; the others do not depend on how many halves there are."""
  return np.sort(np.random.default_rng((seed, 31, number)).choice(rows, len(rows) // 2, replace=False))


def trained(
  cells: ResultCache, judge: Callable[[], Retrainer], rows: np.ndarray, seed: int, label: str, parts: tuple[str, ...]
) -> dict:
  """The cell of a training: mean nats per response token of each example of the parts, by part."""

  def make() -> dict:
    result = judge().train(rows, seed, label)
    losses = {part: judge().losses(result.sub, part).tolist() for part in parts}
    return losses | {"last_loss": float(result.losses[-5:].mean())}

  return cells.get(make, "training", run_folder.hash_of(rows.tolist())[:16], seed, *parts)


def mean_loss(session: Session, part: str, losses: np.ndarray) -> float:
  """The loss that the scores are about, of a whole part, in nats per response token.

  The mean over examples for --loss_reduction=mean; for sum every token counts alike, as it does in their gradients.

  Args:
    session: data.
    part: eval or test.
    losses: [N], mean nats per response token of each example.
  """
  tokens = session.splits[part].num_response_tokens
  weights = tokens if session.settings.loss_reduction == "sum" else tokens > 0
  return float(np.average(losses, weights=weights))


def judged_losses(session: Session, part: str, losses: np.ndarray) -> dict:
  """What intervals of `mean_loss` need: losses of the examples with a response, their tokens and groups.

  Args:
    session: data.
    part: eval or test.
    losses: [N], mean nats per response token of each example.
  """
  examples = test_examples(session.splits[part])
  by = "token" if session.settings.loss_reduction == "sum" else "example"
  counted = session.splits[part].num_response_tokens > 0
  return {"losses": losses[counted], "tokens": examples.tokens, "groups": examples.groups, "by": by}


def check_halves(s: FidelitySettings) -> None:
  """Refuses numbers of halves that have no correlation.

  Raises:
    UserError: too few halves, or more of them twice than there are.
  """
  least = f"a rank correlation with an interval needs {_LEAST_HALVES} or more"
  if s.halves < _LEAST_HALVES:
    raise UserError(f"--halves={s.halves}: {least}")
  if 0 < s.halves_again < _LEAST_HALVES:
    raise UserError(f"--halves_again={s.halves_again}: {least}, or 0 for no noise ceiling")
  if s.halves_again > s.halves:
    raise UserError(f"--halves_again={s.halves_again} of --halves={s.halves}: give at most as many")


def check_left_out(s: FidelitySettings, examples: int) -> None:
  """Refuses shares of so many training examples that leave out nothing, or everything.

  Raises:
    UserError: names the share.
  """
  for share in ratios(s.left_out, "left_out"):
    count = math.floor(share * examples + 0.5)  # as `inputs.Budget` rounds
    if not 0 < count < examples:
      what = "nothing to train on" if count else "nothing out"
      raise UserError(f"--left_out={s.left_out}: {share:g} of {how_many(examples, 'training example')} leaves {what}")


def run(settings: FidelitySettings, session: Session | None = None) -> str:
  """Retrains, scores, compares, writes fidelity.md and its kin; returns the run folder. Goes on if stopped."""
  s = settings
  refuse(s, _REFUSED, _DOES)
  variants = variants_of(s)
  given = f"--lds_solvers={s.lds_solvers}"
  solved = [variant for variant in variants if variant.solver != report.METAGRADIENT]
  check_solvers(given, (settings_of(s, variant) for variant in solved))  # as the rest, before hours of training
  if len(solved) < len(variants):
    check_trained(s, given)
  curve_solvers = words(s.curve_solvers, "curve_solvers", tuple({variant.solver for variant in variants}))
  check_halves(s)
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  session = session or open_session(s)
  if curve_solvers:
    check_left_out(s, len(trainable_rows(session)))
  for variant in solved:
    tree = subtree.make_subtree(session.model.params, variant.layers, s.modules, ("--lds_layers", "--modules"))
    size = subtree.size_of(session.model.params, tree)
    check_size(settings_of(s, variant), size, f"{given}, {variant.name}", depth="krylov")
  groups = ("data", "model", "finetune", "select", "fidelity", "run")
  identity = session.own_identity("fidelity", s, groups, ("train", "eval", "test"))
  for name in (*_NOT_IDENTITY, *_OF_VARIANTS):
    identity["flags"].pop(name)
  identity["flags"] |= {name: getattr(s, name) for name in ("cg_steps", "krylov")}
  run_dir = run_folder.RunDir.open(s.run_dir, identity, s.overwrite)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.fidelity --flagfile=THIS"])
  task = Task(session, s, run_dir)
  every = task.losses()
  losses, again = (values[:, task.queries] if len(values) else values for values in every)
  cells = {variant: task.scores(variant) for variant in variants}
  scores = {variant: np.array(cell["scores"], np.float32) for variant, cell in cells.items()}
  measured = {variant: datamodeling.measure(values, task.masks, losses, s.seed) for variant, values in scores.items()}
  repeated = datamodeling.agreement(losses[: len(again)], again, s.seed) if len(again) else None
  first = {solver: next(v for v in variants if v.solver == solver) for solver in curve_solvers}
  # The aggregated query is the mean of the evaluation examples', copies too, so its influence is the mean of theirs.
  influence_of = lambda variant: scores[variant][task.query_of].mean(axis=0)  # noqa: E731
  curves = task.curves({solver: influence_of(variant) for solver, variant in first.items()}) if first else []
  found = report.Found(s, measured, cells, repeated, curves, recipe(task, every[0]))
  report.write(run_dir, found)
  return str(run_dir.path)


def recipe(task: Task, losses: np.ndarray) -> dict:
  """What was trained and measured, for the report."""
  s, plan = task.settings, recipe_of(task.settings, len(task.rows))
  start = lambda: {"eval": task.judge().losses(task.judge().sub, "eval").tolist()}  # noqa: E731
  base = mean_loss(task.session, "eval", np.array(task.cells.get(start, "base")["eval"]))
  trained_ = np.array([mean_loss(task.session, "eval", row) for row in losses])
  return {
    "model": s.model,
    "training examples": len(task.rows),
    "evaluation examples": len(task.session.splits["eval"]),
    "distinct ones (queries)": len(task.queries),
    "test examples": len(task.session.splits["test"]),
    "random halves": len(task.halves),
    "examples in a half": len(task.halves[0]),
    "halves trained twice": s.halves_again,
    "trained": f"{s.trainable}, layers {s.trainable_layers}, {s.trainable_modules}",
    "steps": plan.steps,
    "batch size": plan.batch_size,
    "learning rate": plan.learning_rate,
    "evaluation loss of the base model": base,
    "evaluation loss after the halves": f"{trained_.mean():.4f}, standard deviation {trained_.std(ddof=1):.4f}",
    "loss": f"{s.loss_reduction} over response tokens, nats",
    "curvature": s.curvature,
    "fixed examples of the curvature": s.curvature_examples,
    "LiSSA": f"{s.depth} steps of {s.curvature_batch} examples, last {s.average:g} averaged",
    "CG steps at most": s.cg_steps,
    "low_rank vectors": s.krylov,
    "seed": s.seed,
  }


def main(_) -> None:
  """Entry point."""
  run(flags.read(FidelitySettings))
