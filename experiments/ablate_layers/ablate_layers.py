"""How many layers are enough: agreement, retrained perplexity and cost of every choice of layers and modules.

./run.sh ablate_layers --flagfile=experiments/flags/ablate_layers.flags

Writes ablate_layers.md, ablate_layers.csv and pictures into --run_dir.
"""

import dataclasses
import functools
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from experiments import flags
from experiments.ablate_layers import report
from experiments.ablate_layers.settings import AblateLayersSettings
from experiments.benchmark import isolated
from experiments.benchmark.settings import BenchmarkSettings
from in2core_jax.errors import UserError
from in2core_jax.estimate import stage_phases
from in2core_jax.evaluation import statistics
from in2core_jax.ihvp import tree_math
from in2core_jax.influence import decompose
from in2core_jax.influence.solve import SOLVERS
from in2core_jax.params import subtree
from in2core_jax.pipeline import scoring, shapes, solver_inputs
from in2core_jax.pipeline.checks import budget_of, check_budget, check_size, check_solvers
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.judging import judged, tell_size
from in2core_jax.pipeline.retraining import Retrainer, TrainingSubset
from in2core_jax.pipeline.session import BoundSubtree, Session, choose, open_session
from in2core_jax.pipeline.settings import OTHER_POLICIES, integers, listed, refuse, seeds_of
from in2core_jax.runs import resumable, run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.unfinished import Work
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import inputs_of
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)

# Their inverses have no entry between two leaves of two layers: scores of a choice are sums over its leaves.
ADDITIVE = ("identity", "datainf")
POSITIONS = ("last", "first", "middle", "spread")
ALL = "all"
_DOES = "ablate_layers compares plain influence of the mean query, and what --policy=proponents keeps of one budget"
_REFUSED = (
  *("normalize", "write", "aggregate", "trajectory"),
  *("score_path=projected", "fractions"),
  *("eval_weights", *OTHER_POLICIES),
)
# The cheapest choices that agree with all layers are retrained until one is enough, at most so many of them.
_TRIED = 3


@dataclasses.dataclass(frozen=True)
class Choice:
  """Layers and modules.

  Attributes:
    position: all, last, first, middle or spread.
    modules: a word of --modules.
    layers: indices, ascending.
  """

  position: str
  modules: str
  layers: tuple[int, ...]

  @property
  def name(self) -> str:
    """As flags name it: last:8, or spread:4/attention."""
    where = self.position if self.position == ALL else f"{self.position}:{len(self.layers)}"
    return where if self.modules == ALL else f"{where}/{self.modules}"

  @property
  def flag(self) -> str:
    """The value of --layers."""
    return ",".join(map(str, self.layers))


def spread(count: int, num_layers: int) -> tuple[int, ...]:
  """The middles of `count` stretches of equal length: spread(2, 8) == (2, 6)."""
  return tuple(int((i + 0.5) * num_layers / count) for i in range(count))


def choices_of(s: AblateLayersSettings, num_layers: int) -> list[Choice]:
  """Every choice that the flags ask for; the first is all layers with all modules.

  Raises:
    UserError: an unknown position, or nothing but the first choice.
  """
  counts, positions, modules = (
    integers(s.ablate_counts, "ablate_counts"),
    listed(s.ablate_positions),
    listed(s.ablate_modules),
  )
  unknown = [word for word in positions if word not in POSITIONS]
  if unknown:
    raise UserError(f"--ablate_positions={s.ablate_positions}: positions are {', '.join(POSITIONS)}")
  chosen = [(ALL, tuple(range(num_layers)))]
  for position in positions:
    for count in sorted(set(counts)):
      if count < num_layers:
        layers = spread(count, num_layers) if position == "spread" else None
        chosen.append((position, layers or subtree.parse_layers(f"{position}:{count}", num_layers)))
  found = [Choice(position, word, layers) for position, layers in chosen for word in dict.fromkeys((ALL, *modules))]
  if len(found) == 1:
    raise UserError(
      f"--ablate_counts={s.ablate_counts} --ablate_positions={s.ablate_positions} --ablate_modules={s.ablate_modules}: "
      f"nothing is left to compare with all of the {num_layers} layers; give a smaller count, or other modules"
    )
  return found


def solvers_of(s: AblateLayersSettings) -> list[str]:
  """The solvers that the flags ask for.

  Raises:
    UserError: none, an unknown one, or one that does not go with the other flags.
  """
  found = listed(s.ablate_solvers)
  if not found or any(name not in SOLVERS for name in found):
    raise UserError(f"--ablate_solvers={s.ablate_solvers} must name some of {', '.join(SOLVERS)}")
  check_solvers(f"--ablate_solvers={s.ablate_solvers}", (s.replace(solver=name) for name in found))
  return found


def named(text: str, choices: Iterable[Choice], flag: str) -> list[Choice]:
  """The choices that a flag names.

  Raises:
    UserError: one that is not among them.
  """
  known = {choice.name: choice for choice in choices}
  unknown = [word for word in listed(text) if word not in known]
  if unknown:
    raise UserError(f"--{flag}={text}: {unknown[0]!r} is none of the choices {', '.join(known)}")
  return [known[word] for word in listed(text)]


def tree_of(choice: Choice, params) -> subtree.Subtree:
  """The subtree of a choice.

  Raises:
    UserError: the model has no such modules.
  """
  return subtree.make_subtree(params, choice.layers, choice.modules, ("--ablate_counts", "--ablate_modules"))


class Ablation:
  """Scores, costs and trainings of all choices, each kept in a cell."""

  def __init__(self, session: Session, s: AblateLayersSettings, run_dir: run_folder.RunDir):
    self.session, self.settings, self.cells = session, s, ResultCache(run_dir)
    self.run_dir, self.work = run_dir, Work(run_dir, s.shard_batches)
    self.params = session.checkpoint_params(s.checkpoint)
    self.choices = choices_of(s, session.model.config.num_layers)
    self.solvers = solvers_of(s)
    self.trees = {choice: tree_of(choice, self.params) for choice in self.choices}

  # ---- scores

  def scores(self) -> dict[str, dict[Choice, np.ndarray]]:
    """Scores float64 [N] by solver and choice; the sums of one pass for the solvers that allow it."""
    additive = [name for name in self.solvers if name in ADDITIVE]
    found: dict = {name: {} for name in self.solvers}
    if additive:
      whole, table = self.trees[self.choices[0]], self.contributions(additive)
      for choice in self.choices:
        sums = decompose.sum_over(table, whole, self.trees[choice])
        found |= {name: found[name] | {choice: row} for name, row in zip(additive, sums, strict=True)}
    for name in self.solvers:
      if name not in ADDITIVE:
        found[name] = {choice: np.array(self.run_alone(name, choice)["scores"]) for choice in self.choices}
    return found

  def contributions(self, solvers: Sequence[str]) -> np.ndarray:
    """`decompose.leaf_table` of all layers along the answer of each solver, float32 [solvers, N, L, M]."""

    def make() -> dict:
      chosen = choose(self.session, self.params, ALL, ALL)
      answers, seconds = zip(*(self.answer(name, chosen) for name in solvers), strict=True)
      directions = tree_math.concatenate(answers)
      train = self.session.batcher("train", chosen.tree, chosen.params)
      pieces = scoring.pieces_along(self.work, "leaves", directions)
      stream = self.session.stream(train, "scores by layer and module", pieces)
      table = decompose.leaf_table(
        chosen.problem, chosen.tree, stream, len(train), directions, self.settings.microbatch
      )
      self.cells.write_array(table, "contributions", *solvers)
      return {"solver_seconds": dict(zip(solvers, seconds, strict=True))}

    self.cells.get(make, "contributions", *solvers, with_array=True)
    table = self.cells.read_array("contributions", *solvers)
    self.work.remove()
    return table

  def answer(self, solver: str, chosen: BoundSubtree):
    """((H + damping I)^-1 g_q of the mean query, seconds with the query's gradient)."""
    clock, s = scoring.Clock(), self.settings.replace(solver=solver)
    own = f"queries-{run_folder.hash_of(train_loop.subtree_meta(chosen.tree))[:12]}"
    v, _ = scoring.queries(self.session, s, chosen, self.work, own)
    pieces = self.work.pieces(f"solver-{solver}", queries=resumable.tree_sha256(v))
    result = solver_inputs.solve(self.session, s, chosen, v, pieces)
    clock.lap("solver")
    return result.solution, clock.seconds["solver"]

  def run_alone(self, solver: str, choice: Choice) -> dict:
    """Scores of one choice, by a solve and a score pass of its own, and their seconds."""

    def make() -> dict:
      chosen = choose(self.session, self.params, choice.flag, choice.modules)
      direction, seconds = self.answer(solver, chosen)
      train = self.session.packer("train", chosen.tree, chosen.params)
      stream = self.session.stream(train, f"scores, {choice.name}")
      scores = chosen.problem.scores(stream, len(train), direction, "jvp")[0]
      self.work.remove()
      return {"scores": scores.astype(float).tolist(), "solver_seconds": seconds}

    return self.cells.get(make, "scores", solver, choice.flag, choice.modules)

  # ---- costs

  def on_paper(self, solver: str) -> dict[Choice, dict[str, float]]:
    """FLOPs and bytes of a whole `select` run with each choice, as --dry_run tells them."""
    found = {}
    for choice in self.choices:
      # The sets that are compared are the highest scores: no gradients are kept for a policy.
      own = self.settings.replace(layers=choice.flag, modules=choice.modules, solver=solver, policy="proponents")
      phases = stage_phases.select_phases(self.session, own)
      found[choice] = {
        "flops": sum(phase.flops for phase in phases),
        "bytes": max(phase.device_bytes for phase in phases) + max(phase.host for phase in phases),
      }
    return found

  def measured(self, choice: Choice) -> dict:
    """Seconds and peak memory of the score pass through the whole model, in a process of its own on one device.

    Raises:
      UserError: that process failed; its own messages stand above.
    """

    def make() -> dict:
      of_choice = {"layers": choice.flag, "modules": choice.modules, "checkpoint": ""}
      own = BenchmarkSettings.of(self.settings, alone="score", **of_choice)
      # Of one device and of the same batches for all choices.
      own = own.replace(device_counts="1", mesh="", batch_tokens=self.session.batching.batch_tokens)
      limit = min(self.settings.ablate_examples, len(self.session.splits["train"]))
      with tempfile.TemporaryDirectory() as temporary:
        return isolated.start(own.replace(train_limit=limit, limit_block=0), pathlib.Path(temporary) / "score", {})

    return self.cells.get(make, "measured", choice.flag, choice.modules, self.settings.ablate_examples)

  # ---- trainings

  def top(self, scores: np.ndarray) -> np.ndarray:
    """Rows that the plain policy keeps."""
    inputs = inputs_of(self.session.splits["train"], scores)
    return np.sort(coreset.select_rows("proponents", inputs, budget_of(self.settings)))

  def yardsticks(self, seeds: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """Full data and random sets of the same budget, a set for each seed."""
    inputs = inputs_of(self.session.splits["train"])
    draw = lambda seed: np.sort(coreset.select_rows("random", inputs, budget_of(self.settings), seed))  # noqa: E731
    return {"full": [trainable_rows(self.session)] * len(seeds), "random": [draw(seed) for seed in seeds]}

  def retrained(
    self, name: str, sets: Sequence[np.ndarray], seeds: Sequence[int], judge: Callable[[], Retrainer]
  ) -> list[statistics.RetrainRow]:
    """The trained model's test results after training on each of the sets.

    Args:
      name: of the sets, in a progress display.
      sets: rows, a set for each seed; equal rows are trained once.
      seeds: of the order of the data.
      judge: what trains; asked for only where something is missing.
    """

    def trained(seed: int, rows: np.ndarray) -> statistics.RetrainRow:
      make = lambda: judge().retrain(TrainingSubset(name, seed, rows), f"train on {name}, seed {seed}").as_json()  # noqa: E731
      # Of older runs "retrained" has no losses by test example.
      cell = self.cells.get(make, "retrained row", run_folder.hash_of(rows.tolist())[:16], seed)
      return judged(self.session.splits["test"], statistics.RetrainRow.from_json(cell | {"policy": name}))

    return [trained(seed, rows) for seed, rows in zip(seeds, sets, strict=True)]


def run(settings: AblateLayersSettings, session: Session | None = None) -> str:
  """Scores, retrains, measures, writes ablate_layers.{md,csv,tex,json} and a figure; returns the run folder."""
  s = settings
  refuse(s, _REFUSED, _DOES)
  solvers = solvers_of(s)
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  session = session or open_session(s)
  identity = session.own_identity(
    "ablate_layers", s, ("data", "model", "finetune", "select", "run"), ("train", "eval", "test")
  )
  for name in ("layers", "modules", "solver"):  # each cell has its own
    identity["flags"].pop(name)
  identity["checkpoint"] = train_loop.checkpoint_meta(s.checkpoint) if s.checkpoint else {}
  seeds, _ = seeds_of(s)
  choices = choices_of(s, session.model.config.num_layers)
  params = shapes.scored_params(session.model.config, s)
  for choice in choices:
    tree = tree_of(choice, params)
    for name in solvers:
      given = f"--ablate_solvers={s.ablate_solvers}, {name} of {choice.name}"
      check_size(s.replace(solver=name), subtree.size_of(params, tree), given)
  check_budget(s, session.splits["train"])
  asked = named(s.ablate_retrain, choices, "ablate_retrain"), named(s.ablate_measure, choices, "ablate_measure")
  if asked[0]:
    tell_size(session.splits["test"])
  run_dir = run_folder.RunDir.open(s.run_dir, identity, s.overwrite)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.ablate_layers --flagfile=THIS"])
  ablation = Ablation(session, s, run_dir)
  found = {name: table_of(ablation, name, scores) for name, scores in ablation.scores().items()}
  intervals = retrain(ablation, found, asked[0], seeds) if asked[0] else report.Yardsticks()
  report.write(run_dir, ablation.settings, session, found, intervals)  # what follows can fail
  if asked[1] and measure(ablation, found, asked[1]):
    report.write(run_dir, ablation.settings, session, found, intervals)
  return str(run_dir.path)


def measure(ablation: Ablation, found: dict[str, list[dict]], asked: Sequence[Choice]) -> bool:
  """Measures all layers, the choices asked for and those that are enough; fills the rows; whether any was measured.

  The processes that measure need the device. An accelerator is held by this one, so that they would not get it.
  """
  platform = jax.default_backend()
  if platform != "cpu":
    log.warning(
      "--ablate_measure: nothing is measured, its columns stay empty: this process holds the %s. The benchmark leaves "
      "the device to the process that measures: python -m experiments.benchmark --flagfile=%s --run_dir=ANOTHER "
      "--measure=memory --score_layers=last:8 --memory_examples=%d, once for each choice of layers (all is one)",
      platform,
      ablation.run_dir.path / "flags.txt",
      ablation.settings.ablate_examples,
    )
    return False
  winners = {row["name"] for row in map(report.enough, found.values()) if row}
  wanted = [ablation.choices[0], *asked, *(choice for choice in ablation.choices if choice.name in winners)]
  measured = {}
  for choice in dict.fromkeys(wanted):
    try:
      measured[choice.name] = ablation.measured(choice)
    except UserError as error:
      log.warning("--ablate_measure: %s stays empty, the same command again tries once more: %s", choice.name, error)
  for row in (row for rows in found.values() for row in rows if row["name"] in measured):
    row |= {"seconds": measured[row["name"]]["seconds"], "peak": measured[row["name"]]["peak memory"]}
  return bool(measured)


def table_of(ablation: Ablation, solver: str, scores: dict[Choice, np.ndarray]) -> list[dict]:
  """One row a choice: agreement with all layers, and cost on paper."""
  paper = ablation.on_paper(solver)
  whole = ablation.choices[0]
  usable = trainable_rows(ablation.session)  # the others score 0, and are never selected
  rows, kept = [], set(ablation.top(scores[whole]).tolist())
  for choice, own in scores.items():
    top = ablation.top(own)
    rows.append(
      {
        "solver": solver,
        "name": choice.name,
        "position": choice.position,
        "count": len(choice.layers),
        "modules": choice.modules,
        "layers": choice.flag,
        "spearman": statistics.spearman(own[usable], scores[whole][usable]),
        "overlap": len(kept & set(top.tolist())) / len(kept),
        "flops": paper[choice]["flops"] / paper[whole]["flops"],
        "bytes": paper[choice]["bytes"],
        "top": top,
        "perplexity": None,
        "ratio": None,
        "ratio by example": None,
        "seconds": None,
        "peak": None,
      }
    )
  return rows


def retrain(
  ablation: Ablation, found: dict[str, list[dict]], asked: Sequence[Choice], seeds: Sequence[int]
) -> report.Yardsticks:
  """Retrains on the top sets of all layers and of the choices asked for; fills the rows.

  Then, for each solver, on those of the cheapest choices that agree, one after the other until one is enough.

  Returns:
    The perplexities of full data and random sets, with their intervals.
  """
  yardsticks = ablation.yardsticks(seeds)
  wanted = {choice.name for choice in asked} | {ablation.choices[0].name}
  surely = [row for rows in found.values() for row in rows if row["name"] in wanted]
  tried = {solver: report.agreeing(rows)[:_TRIED] for solver, rows in found.items()}
  # Of all sets that may be trained on, so that no number depends on which of them are.
  perhaps = [row for rows in tried.values() for row in rows if row["name"] not in wanted]
  every = [rows for one in yardsticks.values() for rows in one] + [row["top"] for row in surely + perhaps]
  judge = functools.cache(lambda: Retrainer(ablation.session, ablation.settings, every))

  trained = {name: ablation.retrained(name, sets, seeds, judge) for name, sets in yardsticks.items()}

  def train(row: dict) -> None:
    name = report.name_of(row)
    trained[name] = ablation.retrained(name, [row["top"]] * len(seeds), seeds, judge)

  for row in surely:
    train(row)
  compared = report.fill(found, trained)
  for solver, rows in found.items():
    for row in tried[solver]:
      if row["perplexity"] is None:
        train(row)
        compared = report.fill(found, trained)
      if report.enough(rows) is row:
        break
  return report.Yardsticks(
    {name: compared.mean(name, "token").ratio() for name in yardsticks}, report.notes(found, compared)
  )


def main(_) -> None:
  """Entry point."""
  run(flags.read(AblateLayersSettings))
