"""Retrains the base model on each selection by one recipe, and compares perplexities on the test set."""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import numpy as np

from in2core_jax.data.records import Record, raw_lines
from in2core_jax.errors import how_many
from in2core_jax.evaluation import statistics
from in2core_jax.pipeline import evaluate_pairs, target_weights
from in2core_jax.pipeline.checks import check_budget, check_policies
from in2core_jax.pipeline.compared import Plan, fractions_of, kept_candidates, plan_of
from in2core_jax.pipeline.evaluate_results import Group, write_tables
from in2core_jax.pipeline.judging import judged, tell_size
from in2core_jax.pipeline.retraining import Retrainer, TrainingSubset, equal_of, equal_steps
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.pipeline.settings import Settings, seeds_of
from in2core_jax.runs import run_folder
from in2core_jax.selection import coreset
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Trainings:
  """The retrained models of a run folder: a file for each, and a judge where one is missing.

  Attributes:
    run_dir: where they are kept.
    session: examples and model.
    settings: the recipe.
    chosen: what is trained on.
  """

  run_dir: run_folder.RunDir
  session: Session
  settings: Settings
  chosen: list[TrainingSubset]

  @functools.cached_property
  def judge(self) -> Retrainer:
    """Made when it is first needed: a finished run compiles nothing."""
    return Retrainer(self.session, self.settings, [candidate.rows for candidate in self.chosen])

  def base_losses(self) -> np.ndarray:
    """Of the base model on the test set, float64 [N]."""
    if not self.run_dir.holds("base.json"):
      self.run_dir.write_json("base.json", {"losses": self.judge.losses(self.judge.sub).tolist()})
    return np.array(self.run_dir.read_json("base.json")["losses"])

  def row(self, candidate: TrainingSubset, steps: int, label: str) -> statistics.RetrainRow:
    """The candidate's training over so many steps, done now unless it was."""
    name = [candidate.policy, candidate.seed, candidate.fraction, steps]
    file = f"trainings/{run_folder.hash_of(name)[:12]}.json"
    rows = run_folder.hash_of(candidate.rows.tolist() if candidate.weights is None else candidate.key)
    if not self.run_dir.holds(file) or self.run_dir.read_json(file).get("rows_sha256", rows) != rows:
      row = self.judge.retrain(candidate, label, steps)
      self.run_dir.write_json(file, row.as_json() | {"rows_sha256": rows})
      words = "%s, %s: test perplexity %.3f"
      if self.session.splits["test"].second is not None:
        words = "%s, %s: exp of the mean DPO loss on the test set %.3f"
      log.info(words, candidate, how_many(steps, "step"), row.perplexity)
    return judged(self.session.splits["test"], statistics.RetrainRow.from_json(self.run_dir.read_json(file)))

  def compared(self, plan: Plan) -> list[Group]:
    """All trainings of a plan, in groups that are compared with each other."""
    groups, total = [], len(plan.equal) * len(self.chosen)
    for number, equal in enumerate(plan.equal):
      rows = {}
      for place, candidate in enumerate(self.chosen):
        label = f"train {number * len(self.chosen) + place + 1}/{total}: {candidate}"
        steps = equal_steps(self.session, self.settings, candidate.rows, equal)
        rows[candidate.name] = self.row(candidate, steps, label)
      for fraction in plan.fractions or (None,):
        ours = [rows[candidate.name] for candidate in self.chosen if candidate.fraction in (None, fraction)]
        groups.append(Group(equal, fraction, ours))
    return groups


def run(settings: Settings, session: Session | None = None) -> str:
  """Retrains, compares, writes; returns the run folder. Finished trainings are kept, also when the run is killed."""
  run_folder.RunDir.refuse_held(settings.run_dir)  # before the work that comes before the folder is opened
  seeds_of(settings), fractions_of(settings), equal_of(settings)  # flags alone: told before the data are read
  session = session or open_session(settings, pairs=True)
  plan = plan_of(session, settings)
  check_policies(session, {policy for policy, _ in plan.policies})
  target_weights.check(session, settings, {policy for policy, _ in plan.policies})
  run_dir = open_folder(session, settings, plan)
  chosen = kept_candidates(run_dir, session, settings, plan)
  write_coresets(run_dir, session.splits["train"].records, chosen)
  trainings = Trainings(run_dir, session, settings, chosen)
  base, groups = trainings.base_losses(), trainings.compared(plan)
  of_pairs = session.splits["test"].second is not None
  write = evaluate_pairs.write_tables if of_pairs else write_tables
  return write(run_dir, session, settings, groups, base)


# ---- the steps -----------------------------------------------------------------------

# Flags of select by which policies choose here.
_OF_POLICIES = ("fraction", "num_examples", "token_budget", "layers", "sketch_size")
_OF_POLICIES += ("aggregate", "eval_weights", "matching_target", "matching_shrink")


def identity_of(session: Session, s: Settings, plan: Plan) -> dict:
  """What the results depend on."""
  identity = session.own_identity(
    "evaluate", s, ("data", "model", "finetune", "evaluate", "run"), ("train", "eval", "test")
  )
  chosen_by = s.identity("select")
  identity["flags"] |= {name: chosen_by[name] for name in _OF_POLICIES if name in chosen_by}
  if s.is_set("modules"):  # folders of before, when no policy looked at it, go on without
    identity["flags"]["modules"] = s.modules
  if s.checkpoint and {policy for policy, _ in plan.policies} & set(coreset.GRADIENT_POLICIES):
    identity["checkpoint"] = train_loop.checkpoint_hash(s.checkpoint)
  identity["select_runs"] = {
    name: run_folder.hash_of([columns[part].tolist() for part in ("influence", "loss", "selected")])[:16]
    for name, columns in plan.runs
  }
  return identity


def open_folder(session: Session, s: Settings, plan: Plan) -> run_folder.RunDir:
  """The run folder; a budget that cannot be met is refused before."""
  identity = identity_of(session, s, plan)
  check_budget(s, session.splits["train"])
  tell_size(session.splits["test"])
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.evaluate --flagfile=THIS"])
  return run_dir


def write_coresets(run_dir: run_folder.RunDir, records: Sequence[Record], chosen: list[TrainingSubset]) -> None:
  """The records of every candidate, for other trainers."""
  for candidate in chosen:
    weights = None
    if candidate.weights is not None:
      weights = np.zeros(len(records))
      weights[candidate.rows] = candidate.weights
    run_dir.write_text(f"coresets/{candidate.file_name}.jsonl", raw_lines(records, candidate.rows, weights))
