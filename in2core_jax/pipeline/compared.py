"""Which training sets an evaluation compares."""

import dataclasses
import logging

import numpy as np
from etils import epath

from in2core_jax.data.records import raw_lines
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.pipeline.checks import budget_of, policies_of
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.retraining import TrainingSubset, equal_of
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings, listed, seeds_of, shares
from in2core_jax.runs import run_folder
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import SIMILARITIES, Budget, PolicyInputs, inputs_of
from in2core_jax.selection.warnings import selection_warnings
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)


def read_selection(folder: str, session: Session) -> tuple[str, dict[str, np.ndarray]]:
  """(policy, columns of scores.parquet) of a select run, checked against the training set.

  Raises:
    UserError: not a finished select run, or one over other examples.
  """
  path = epath.Path(folder)
  if not (path / "summary.json").exists():
    raise UserError(f"--select_runs: {folder} has no summary.json, so it is no finished select run; run select first")
  chosen = run_folder.RunDir.load(folder)
  columns = chosen.read_scores("scores.parquet")
  if tuple(columns["example_id"]) != session.splits["train"].ids:
    raise UserError(f"--select_runs: {folder} scored other training examples: give evaluate the same data flags")
  # Equal ids do not make equal examples: what was selected must be what stands there now.
  train, rows = session.splits["train"], np.flatnonzero(columns["selected"])
  kept = raw_lines(train.records, rows, columns.get("weight")).encode("utf-8", errors="backslashreplace")
  if chosen.read_bytes("coreset.jsonl") != kept:
    raise UserError(
      f"--select_runs: {folder}/coreset.jsonl is not what it selected from --train_data: the data changed"
    )
  return chosen.load_json("summary.json")["policy"], columns


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be compared, before any policy has chosen.

  Attributes:
    runs: (name, columns of scores.parquet) of each of --select_runs.
    policies: (policy, seed) of this call, in order.
    seeds: of the selections of `runs`.
    fractions: budgets of a sweep, growing; empty where there is one budget.
    equal: what trainings that are compared have in common, words of `EQUAL`.
  """

  runs: list[tuple[str, dict[str, np.ndarray]]]
  policies: list[tuple[str, int]]
  seeds: tuple[int, ...]
  fractions: tuple[float, ...]
  equal: list[str]


def plan_of(session: Session, s: Settings) -> Plan:
  """Reads the flags and the select runs.

  Raises:
    UserError: an unknown policy, two candidates of one name, a run that does not fit, selections of several sizes.
  """
  seeds, fixed = seeds_of(s)
  folders, fractions = listed(s.select_runs), fractions_of(s)
  runs = [read_selection(folder, session) for folder in folders]
  wanted = policies_of(s)
  if not wanted and not runs:
    raise UserError("--policies and --select_runs are empty: name what is to be compared, as in --policies=full,random")
  for policy in wanted:
    if not runs and policy in coreset.SCORE_POLICIES:
      raise UserError(f"--policies={s.policies}: {policy} needs the scores of a select run: give --select_runs")
  if fractions and len(runs) > 1:
    raise UserError(f"--fractions takes the scores of one select run: --select_runs={s.select_runs} names {len(runs)}")
  names = [policy for policy, _ in runs]
  if fractions and set(names) & {*coreset.GRADIENT_POLICIES, *SIMILARITIES}:
    _check_same_rule(folders[0], session, s)
  chosen_here = [policy for policy in wanted if policy != statistics.FULL]
  sizes = [int(columns["selected"].sum()) for _, columns in runs]
  if len(set(sizes)) > 1 and chosen_here:
    raise UserError(
      f"--select_runs={s.select_runs} have selected {', '.join(map(str, sizes))} examples, and "
      f"{', '.join(chosen_here)} of --policies would have one size for all: give runs of one size, a separate "
      "evaluation for each run, or --policies=full"
    )
  called = [
    name if names.count(name) == 1 else f"{name} ({epath.Path(folder).name})"
    for name, folder in zip(names, folders, strict=True)
  ]
  if fractions:  # the runs give scores; what they have chosen is one budget only
    wanted += [name for name in dict.fromkeys(names) if name not in wanted]
    called = []
  twice = sorted({name for name in wanted + called if (wanted + called).count(name) > 1})
  if twice:
    raise UserError(
      f"--policies={s.policies} --select_runs={s.select_runs}: two candidates are named {twice[0]!r}; leave out of "
      "--policies what a select run has chosen"
    )
  policies = [(name, seed) for name in wanted for seed in (seeds if name in coreset.SEEDED_POLICIES else fixed)]
  columns = [columns for _, columns in runs]
  return Plan(list(zip(called or names, columns, strict=True)), policies, fixed, fractions, equal_of(s))


def _check_same_rule(folder: str, session: Session, s: Settings) -> None:
  """In a sweep a policy that matches gradients chooses anew: it must do so as the select run did that names it.

  Raises:
    UserError: another model or other flags of the choice.
  """
  run = run_folder.RunDir.load(folder).load_json("summary.json")["identity"]
  if run["model_hash"] != session.model.hash:
    raise UserError(
      f"--fractions chooses again by the rule of --select_runs={folder}, which took its gradients at another --model "
      f"(hash {run['model_hash'][:12]}) than {s.model} (hash {session.model.hash[:12]}): give evaluate the same"
    )
  policy = run["flags"].get("policy")
  names = ("layers", "modules", "sketch_size", "loss_reduction") if policy in coreset.GRADIENT_POLICIES else ()
  names += ("matching_target", "matching_shrink", "eval_weights") if policy in coreset.FEATURE_POLICIES else ()
  names += ("aggregate", "eval_weights") if policy in (*SIMILARITIES, "auto") else ()
  for name in names:
    default = Settings.__dataclass_fields__[name].default  # of a flag that older runs did not know
    theirs, ours = run["flags"].get(name, default), getattr(s, name)
    if theirs != ours:
      raise UserError(
        f"--fractions chooses again by the rule of --select_runs={folder}, which has --{name}={theirs} and not {ours}: "
        "give evaluate the same"
      )
  if policy in coreset.GRADIENT_POLICIES and run["checkpoint"] != train_loop.checkpoint_hash(s.checkpoint):
    raise UserError(
      f"--fractions chooses again by the rule of --select_runs={folder}, which took its gradients at another model "
      f"than --checkpoint={s.checkpoint}: give evaluate the --checkpoint of the select run"
    )


def fractions_of(s: Settings) -> tuple[float, ...]:
  """The budgets of --fractions; 1 is the policy `full`."""
  found = shares(s.fractions, "fractions")
  if found == (1.0,):
    raise UserError("--fractions=1 is all of the data: add a share below 1, such as 0.25,0.5")
  if found and Budget.read(s.budget).fraction is None:
    raise UserError(f"--fractions={s.fractions} with --budget={s.budget}: give one of them")
  return tuple(share for share in found if share < 1)


def candidates(session: Session, s: Settings, plan: Plan) -> tuple[list[TrainingSubset], list[str]]:
  """Every (budget, policy, seed) to retrain, with its rows; and what looks risky about the sets chosen here."""
  inputs = _inputs(session, s, plan)
  found, warnings = [], []
  if plan.fractions:
    budgets = [(fraction, Budget(fraction=fraction)) for fraction in plan.fractions]
  elif plan.runs:  # as many examples as the selections that they are compared with
    budgets = [(None, Budget(num_examples=int(plan.runs[0][1]["selected"].sum())))]
  else:
    budgets = [(None, budget_of(s))]
  for policy, seed in plan.policies:
    if policy == "full":
      found.append(TrainingSubset(policy, seed, trainable_rows(session)))
      continue
    for fraction, budget in budgets:
      rows, weights = coreset.select_by(policy, inputs, budget, seed).in_source_order
      found.append(TrainingSubset(policy, seed, rows, fraction, weights))
      if policy in coreset.GRADIENT_POLICIES:
        where = policy if fraction is None else f"{policy}, {fraction:.0%}"
        warnings += [f"{where}: {warning}" for warning in selection_warnings(rows, inputs, seed)]
  if not plan.fractions:
    for name, columns in plan.runs:
      rows = np.flatnonzero(columns["selected"])
      weights = columns["weight"][rows] if "weight" in columns else None
      found += [TrainingSubset(name, seed, rows, weights=weights) for seed in plan.seeds]
  return found, warnings


def _inputs(session: Session, s: Settings, plan: Plan) -> PolicyInputs:
  """What the policies of this call choose from; scores are those of the first select run."""
  scores = plan.runs[0][1] if plan.runs else {}
  inputs = inputs_of(session.splits["train"], scores.get("influence"), scores.get("loss"))
  # Gradients where the select stage would take them: at the model that was fine-tuned on all examples, if there is one.
  policies = {policy for policy, _ in plan.policies}
  params = session.checkpoint_params(s.checkpoint if policies & set(coreset.GRADIENT_POLICIES) else "")
  return dataclasses.replace(inputs, **ChoiceInputs(session, s, params).of(policies))


def kept_candidates(run_dir: run_folder.RunDir, session: Session, s: Settings, plan: Plan) -> list[TrainingSubset]:
  """`candidates`, chosen once and kept in the run folder: a run started again does not choose again."""
  if not run_dir.holds("candidates.json"):
    found, warnings = candidates(session, s, plan)
    for warning in warnings:  # before the trainings; write_tables says them again
      log.warning("%s", warning)
    rows = [_as_json(candidate) for candidate in found]
    run_dir.write_json("candidates.json", {"candidates": rows, "warnings": warnings})
  kept = run_dir.read_json("candidates.json")["candidates"]
  read = lambda item: {name: np.array(item[name], dtype) for name, dtype in _ARRAYS.items() if name in item}  # noqa: E731
  return [TrainingSubset(**item | read(item)) for item in kept]


_ARRAYS = {"rows": np.int64, "weights": np.float64}


def _as_json(candidate: TrainingSubset) -> dict:
  """A candidate as `candidates.json` keeps it; without weights where all examples count alike."""
  arrays = {name: getattr(candidate, name) for name in _ARRAYS}
  plain = {name: value for name, value in vars(candidate).items() if name not in arrays}
  return plain | {name: values.tolist() for name, values in arrays.items() if values is not None}
