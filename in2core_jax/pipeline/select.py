"""Scores every training example by its influence on the evaluation set, and chooses the coreset."""

import dataclasses
import logging

from in2core_jax.params import subtree
from in2core_jax.pipeline import select_index
from in2core_jax.pipeline.advice import of_selection
from in2core_jax.pipeline.checks import check_kinds, check_select
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.score_breakdown import taken_apart
from in2core_jax.pipeline.scoring import Clock, Scored, score
from in2core_jax.pipeline.select_outputs import add_forms
from in2core_jax.pipeline.select_results import (
  about_choice,
  about_scores,
  note_inputs,
  rule_of,
  tell_selected,
  told,
  write_results,
)
from in2core_jax.pipeline.session import BoundSubtree, Session, choose, open_session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.shapes import scored_params
from in2core_jax.pipeline.train_elsewhere import recipe_elsewhere, write_train_with
from in2core_jax.runs import run_folder
from in2core_jax.runs.unfinished import Work
from in2core_jax.selection import coreset, matching
from in2core_jax.selection.inputs import Budget, PolicyInputs, inputs_of
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
  """What a run does, settled before there is a folder.

  Attributes:
    settings: the flags.
    session: examples and model.
    budget: how much is selected.
    chosen: where gradients are taken.
  """

  settings: Settings
  session: Session
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


def run(settings: Settings, session: Session | None = None) -> str:
  """Scores, selects, writes; returns the run folder. Returns at once when the folder holds this very run."""
  if settings.index:
    return select_index.run(settings, session)
  run_folder.RunDir.refuse_held(settings.run_dir)  # before the work that comes before the folder is opened
  task = prepare(settings, session)
  work = open_folder(task)
  if not work.run_dir.is_whole("summary.json"):
    scored, clock = score_examples(task, work), Clock()
    choice = choose_examples(task, scored, clock)
    scored = break_down(task, scored, work, clock)
    write(task, scored, choice, work.run_dir)
  else:
    log.info("%s is finished already", work.run_dir.path)
    add_forms(work.run_dir, task.session.splits["train"], task.settings)
  work.remove()  # also what a run that was killed at its very end has left
  return str(work.run_dir.path)


# ---- the six steps -------------------------------------------------------------------


def prepare(s: Settings, session: Session | None = None) -> Task:
  """Reads data and model, and refuses what cannot be done."""
  session = session or open_session(s, pairs=True)
  check_kinds(session, s)
  session.check_folder("select", s, *_DEPENDS_ON)
  budget = check_select(session, s, scored_params(session.model.config, s))  # by shapes: before weights are read
  params = session.checkpoint_params(s.checkpoint)
  return Task(s, session, budget, choose(session, params, s.layers, s.modules))


def open_folder(task: Task) -> Work:
  """The run folder, with what an earlier run of the same identity has left unfinished."""
  s = task.settings
  run_dir = run_folder.RunDir.open(s.run_dir, _identity(task), overwrite=s.overwrite)
  task.session.splits.write_skipped(run_dir)
  return Work(run_dir, s.shard_batches)


def score_examples(task: Task, work: Work) -> Scored:
  """Notes what goes in, then computes influence and loss of every training example."""
  s, chosen = task.settings, task.chosen
  note_inputs(work.run_dir, task.session.splits, s, s)
  log.info("influence of layers %s: %s numbers", chosen.tree.layers, f"{subtree.count(chosen.problem.sub):,}")
  for line in about_scores(task.session, s, chosen):
    log.info("%s", line)
  return score(task.session, s, chosen, work)


def choose_examples(task: Task, scored: Scored, clock: Clock) -> Choice:
  """Applies the policy."""
  s, train = task.settings, task.session.splits["train"]
  more = ChoiceInputs(task.session, s, task.chosen.params).of({s.policy})
  inputs = inputs_of(train, scored.influence, scored.loss, **more)
  chosen = coreset.select_by(s.policy, inputs, task.budget, s.seed)
  choice = Choice(chosen, inputs, inputs.aim if s.policy in coreset.SHRUNK_POLICIES else None)
  for line in about_choice(s, inputs.apart, choice.aim, chosen.weights):
    log.info("%s", line)
  clock.lap("selection")
  return choice


def break_down(task: Task, scored: Scored, work: Work, clock: Clock) -> Scored:
  """Writes scores by layer, by token and by evaluation example, where they are asked for."""
  return taken_apart(task.session, task.settings, task.chosen, scored, work, clock)


def write(task: Task, scored: Scored, choice: Choice, run_dir: run_folder.RunDir) -> None:
  """The results, with what looks risky about settings, data and choice, by the process that writes."""
  s, session, inputs, chosen = task.settings, task.session, choice.inputs, choice.chosen
  rule = rule_of(s, inputs)
  warnings = of_selection(s, inputs, chosen.rows, choice.aim, session.splits["eval"], rule)
  recipe = recipe_elsewhere(s, session)  # from a checkpoint, which all processes open together
  if run_dir.writer:
    write_train_with(run_dir, session, s, chosen.rows, recipe, weighted=chosen.weights is not None)
    write_results(run_dir, session, s, scored, chosen, warnings, told(session, s, inputs, choice.aim))
  tell_selected(s, session.splits["train"], inputs, chosen.rows, run_dir)


# ---- what results depend on ----------------------------------------------------------


_DEPENDS_ON = ("data", "model", "select", "run"), ("train", "eval")  # groups of settings, parts of the data


def _identity(task: Task) -> dict:
  s = task.settings
  identity = task.session.identity("select", s, *_DEPENDS_ON)
  identity["flags"].pop("checkpoint")
  identity["checkpoint"] = train_loop.checkpoint_hash(s.checkpoint)
  if s.trajectory != "none":
    weights = train_loop.kept_weights(s.checkpoint)
    identity["trajectory"] = {str(step): weight for step, weight in weights.items()}
    identity["trajectory_weights"] = train_loop.steps_hash(s.checkpoint, weights)
  return identity
