"""Stage 4, the heart: influence of every training example on the evaluation set, and the coreset that follows from it.

python -m experiments.select --train_data=jsonl:mine.jsonl --layers=last:8 --budget=0.5 --run_dir=runs/mine
"""

import dataclasses
import logging

from in2core_jax.data import tokenizing
from in2core_jax.params import subtree
from in2core_jax.pipeline.advice import of_selection, without_effect
from in2core_jax.pipeline.checks import budget_of, check_select
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.scoring import (
  Clock,
  Scored,
  layer_table,
  query_scores,
  score,
  token_table,
  trajectory_weights,
)
from in2core_jax.pipeline.select_outputs import FORMS, write_forms
from in2core_jax.pipeline.select_results import about_choice, rule_of, told, write_query_scores, write_results
from in2core_jax.pipeline.session import BoundSubtree, Session, choose, open_session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.train_elsewhere import recipe_elsewhere, write_train_with
from in2core_jax.report import facts
from in2core_jax.runs import run_folder
from in2core_jax.runs.unfinished import Work
from in2core_jax.selection import coreset, matching
from in2core_jax.selection.inputs import Budget, PolicyInputs, inputs_of, taking_no_part
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
  """What a run does, settled before there is a folder.

  Attributes:
    settings: the flags.
    bench: examples and model.
    budget: how much is selected.
    chosen: where gradients are taken.
  """

  settings: Settings
  bench: Session
  budget: Budget
  chosen: BoundSubtree


@dataclasses.dataclass(frozen=True)
class Choice:
  """The coreset, and what it was chosen from.

  Attributes:
    chosen: the rows, of the training set, and why each was taken.
    inputs: what the policy saw.
    aim: what greedy matching aimed at; None for other policies.
  """

  chosen: coreset.Choice
  inputs: PolicyInputs
  aim: matching.Shrunk | None


def run(settings: Settings, bench: Session | None = None) -> str:
  """Scores, selects, writes; returns the run folder. Returns at once when the folder holds this very run."""
  run_folder.RunDir.refuse_held(settings.run_dir)  # before the work that comes before the folder is opened
  task = prepare(settings, bench)
  work = open_folder(task)
  if not work.run_dir.is_whole("summary.json"):
    scored, clock = score_examples(task, work), Clock()
    choice = choose_examples(task, scored, clock)
    scored = break_down(task, scored, work, clock)
    write(task, scored, choice, warn(task, choice), work.run_dir)
    tell(task, choice, work.run_dir)
  else:
    log.info("%s is finished already", work.run_dir.path)
    add_forms(task, work.run_dir)
  work.remove()  # also what a run that was killed at its very end has left
  return str(work.run_dir.path)


# ---- the steps -----------------------------------------------------------------------


def prepare(s: Settings, bench: Session | None = None) -> Task:
  """Reads data and model, and refuses what cannot be done."""
  budget = budget_of(s)
  bench = bench or open_session(s)
  chosen = choose(bench, bench.checkpoint_params(s.checkpoint), s.layers, s.modules)
  check_select(bench, s)
  return Task(s, bench, budget, chosen)


def identity_of(task: Task) -> dict:
  """What the results depend on."""
  s = task.settings
  identity = task.bench.identity("select", s, ("data", "model", "select", "run"), ("train", "eval"))
  identity["flags"].pop("checkpoint")
  identity["checkpoint"] = train_loop.checkpoint_hash(s.checkpoint)
  if s.trajectory != "none":
    weights = trajectory_weights(s.checkpoint)
    identity["trajectory"] = {str(step): weight for step, weight in weights.items()}
    identity["trajectory_weights"] = train_loop.steps_hash(s.checkpoint, weights)
  return identity


def open_folder(task: Task) -> Work:
  """The run folder, with what an earlier run of the same identity has left unfinished."""
  s = task.settings
  run_dir = run_folder.RunDir.open(s.run_dir, identity_of(task), overwrite=s.overwrite)
  task.bench.splits.write_skipped(run_dir)
  return Work(run_dir, s.shard_batches)


def score_examples(task: Task, work: Work) -> Scored:
  """Notes what goes in, then computes influence and loss of every training example."""
  s, summary, chosen = task.settings, task.bench.splits.summary, task.chosen
  log.info("\n%s", tokenizing.format_summary(summary, told=False))
  work.run_dir.write_json("data_summary.json", summary)
  work.run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.select --flagfile=THIS"])
  for line in without_effect(s):
    log.warning("%s", line)
  log.info("influence of layers %s: %s numbers", chosen.tree.layers, f"{subtree.count(chosen.problem.sub):,}")
  return score(task.bench, s, chosen, work)


def choose_examples(task: Task, scored: Scored, clock: Clock) -> Choice:
  """Applies the policy."""
  s, train = task.settings, task.bench.splits["train"]
  more = ChoiceInputs(task.bench, s, task.chosen.params).of({s.policy})
  inputs = inputs_of(train, scored.influence, scored.loss, **more)
  chosen = coreset.choose(s.policy, inputs, task.budget, s.seed)
  choice = Choice(chosen, inputs, inputs.aim if s.policy in coreset.SHRUNK_POLICIES else None)
  for line in about_choice(s, inputs.apart, choice.aim):
    log.info("%s", line)
  clock.lap("selection")
  return choice


def break_down(task: Task, scored: Scored, work: Work, clock: Clock) -> Scored:
  """Writes scores by layer, by token and by evaluation example, where they are asked for."""
  if task.settings.writes("layer") or task.settings.writes("token"):
    scored = by_layer_and_token(task, scored, work)
    clock.lap("per layer and token")
  if task.settings.writes("query"):
    scored = by_query(task, scored, work)
    clock.lap("per query")
  return dataclasses.replace(scored, seconds=scored.seconds | clock.seconds)


def by_layer_and_token(task: Task, scored: Scored, work: Work) -> Scored:
  """Writes layer_scores.parquet and token_scores.parquet; the layers' sums are kept for the report."""
  s, bench, chosen, layers = task.settings, task.bench, task.chosen, None
  if s.writes("layer"):
    table = layer_table(bench, s, chosen, scored.result, work)
    work.run_dir.write_parquet("layer_scores.parquet", table)
    layers = facts.layers_of(table)
  if s.writes("token"):
    work.run_dir.write_parquet("token_scores.parquet", token_table(bench, chosen, scored.result, work))
  return dataclasses.replace(scored, layers=layers)


def by_query(task: Task, scored: Scored, work: Work) -> Scored:
  """Writes query_scores.parquet; the scores are kept for the report."""
  queries = query_scores(task.bench, task.settings, task.chosen, work)
  write_query_scores(work.run_dir, task.bench.splits, queries)
  return dataclasses.replace(scored, queries=queries)


def add_forms(task: Task, run_dir: run_folder.RunDir) -> None:
  """What a finished run is asked for besides and does not have (--coreset_format, --write=pool)."""
  if run_dir.writer and any(task.settings.writes(word) for word in FORMS):
    write_forms(run_dir, task.bench.splits["train"], run_dir.read_parquet("scores.parquet"), task.settings)


def warn(task: Task, choice: Choice) -> list[str]:
  """What looks risky about the settings, the data and the choice; `write` tells it with what the reports find."""
  evals, rule = task.bench.splits["eval"], rule_of(task.settings, choice.inputs)
  return of_selection(task.settings, choice.inputs, choice.chosen.rows, choice.aim, evals, rule)


def write(task: Task, scored: Scored, choice: Choice, warnings: list[str], run_dir: run_folder.RunDir) -> None:
  """The results, by the process that writes."""
  recipe = recipe_elsewhere(task.settings, task.bench)  # from a checkpoint, which all processes open together
  if run_dir.writer:
    write_train_with(run_dir, task.bench, task.settings, choice.chosen.rows, recipe)
    about = told(task.settings, choice.inputs, choice.aim)
    write_results(run_dir, task.bench, task.settings, scored, choice.chosen, warnings, about)


def tell(task: Task, choice: Choice, run_dir: run_folder.RunDir) -> None:
  """Logs how much was selected, and where it is."""
  tokens = choice.inputs.num_response_tokens
  log.info(
    "selected %d of %d examples%s by %s, %.0f %% of the response tokens: %s",
    len(choice.chosen.rows),
    len(choice.inputs.ids),
    taking_no_part(choice.inputs, task.bench.splits["train"].truncated),
    task.settings.policy,
    100 * tokens[choice.chosen.rows].sum() / tokens.sum(),
    run_dir.path / "coreset.jsonl",
  )
