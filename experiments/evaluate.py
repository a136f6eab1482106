"""Stage 5: retrains from the base model on each selection with one recipe and compares perplexities on the test set.

python -m experiments.evaluate --select_runs=runs/a,runs/b --policies=full,random,opponents --seeds=0,1,2
"""

import dataclasses
import logging

import numpy as np
from etils import epath

from experiments import cli, dry_run, flags
from experiments.finetune import trainable_rows
from experiments.flags import Settings, integers, listed
from experiments.retraining import Candidate, Judge
from experiments.select import budget_of, sketch_inputs
from experiments.workbench import Workbench
from in2core_jax import artifacts, coreset, evaluation, report
from in2core_jax.errors import UserError
from in2core_jax.records import raw_lines

log = logging.getLogger(__name__)


def read_selection(folder: str, bench: Workbench) -> tuple[str, dict[str, np.ndarray]]:
  """(policy, columns of scores.parquet) of a select run, checked against the training set.

  Raises:
    UserError: not a finished select run, or one over other examples.
  """
  path = epath.Path(folder)
  if not (path / "summary.json").exists():
    raise UserError(f"--select_runs: {folder} has no summary.json, so it is no finished select run; run select first")
  columns = artifacts.read_scores(path / "scores.parquet")
  if tuple(columns["example_id"]) != bench.parts["train"].ids:
    raise UserError(f"--select_runs: {folder} scored other training examples: give evaluate the same data flags")
  # Equal ids do not make equal examples: what was selected must be what stands there now.
  train, rows = bench.parts["train"], np.flatnonzero(columns["selected"])
  kept = raw_lines(train.records, rows).encode("utf-8", errors="backslashreplace")
  coreset_file = path / "coreset.jsonl"
  if not coreset_file.exists() or coreset_file.read_bytes() != kept:
    raise UserError(
      f"--select_runs: {folder}/coreset.jsonl is not what it selected from --train_data: the data changed"
    )
  return artifacts.read_json(path / "summary.json")["policy"], columns


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be compared, before any policy has chosen.

  Attributes:
    runs: (name, columns of scores.parquet) of each of --select_runs.
    policies: (policy, seed) of this call, in order.
    seeds: of the selections of `runs`.
  """

  runs: list[tuple[str, dict[str, np.ndarray]]]
  policies: list[tuple[str, int]]
  seeds: tuple[int, ...]


def plan_of(bench: Workbench, s: Settings) -> Plan:
  """Reads the flags and the select runs.

  Raises:
    UserError: an unknown policy, two candidates of one name, a run that does not fit.
  """
  seeds = integers(s.seeds, "seeds")
  if not seeds:
    raise UserError("--seeds is empty: give at least one, such as 0,1,2")
  fixed = integers(s.fixed_seeds, "fixed_seeds") or seeds
  folders = listed(s.select_runs)
  runs = [read_selection(folder, bench) for folder in folders]
  wanted = listed(s.policies)
  for policy in wanted:
    if policy != "full" and policy not in coreset.POLICIES:
      raise UserError(f"--policies={s.policies}: unknown {policy!r}; use full, {', '.join(coreset.POLICIES)}")
    if not runs and policy in coreset.SCORE_POLICIES:
      raise UserError(f"--policies={s.policies}: {policy} needs the scores of a select run: give --select_runs")
  names = [policy for policy, _ in runs]
  called = [
    name if names.count(name) == 1 else f"{name} ({epath.Path(folder).name})"
    for name, folder in zip(names, folders, strict=True)
  ]
  twice = sorted({name for name in wanted + called if (wanted + called).count(name) > 1})
  if twice:
    raise UserError(f"--policies={s.policies} --select_runs={s.select_runs}: two candidates are named {twice[0]!r}")
  policies = [(name, seed) for name in wanted for seed in (seeds if name in coreset.SEEDED_POLICIES else fixed)]
  return Plan([(name, columns) for name, (_, columns) in zip(called, runs, strict=True)], policies, fixed)


def candidates(bench: Workbench, s: Settings, plan: Plan) -> tuple[list[Candidate], list[str]]:
  """Every (policy, seed) to retrain, with its rows; and what looks risky about the sets chosen here."""
  train, usable = bench.parts["train"], trainable_rows(bench)
  scores = plan.runs[0][1] if plan.runs else {}
  inputs = coreset.PolicyInputs(
    scores.get("influence"), scores.get("loss"), train.num_tokens, train.num_response_tokens, train.topics, train.ids
  )
  if any(policy in coreset.FEATURE_POLICIES for policy, _ in plan.policies):
    inputs = dataclasses.replace(inputs, **sketch_inputs(bench, s, bench.params))
  # The policies of this call keep as many examples as the selections that they are compared with.
  budget = coreset.Budget(num_examples=int(scores["selected"].sum())) if plan.runs else budget_of(s)
  found, warnings = [], []
  for policy, seed in plan.policies:
    rows = usable if policy == "full" else np.sort(coreset.select_rows(policy, inputs, budget, seed))
    found.append(Candidate(policy, seed, rows))
    if policy in coreset.FEATURE_POLICIES:
      warnings += [f"{policy}: {warning}" for warning in coreset.selection_warnings(rows, inputs, seed)]
  for name, columns in plan.runs:
    found += [Candidate(name, seed, np.flatnonzero(columns["selected"])) for seed in plan.seeds]
  return found, warnings


def kept_candidates(run_dir: artifacts.RunDir, bench: Workbench, s: Settings, plan: Plan) -> list[Candidate]:
  """`candidates`, chosen once and kept in the run folder: a run started again does not choose again."""
  if not run_dir.holds("candidates.json"):
    found, warnings = candidates(bench, s, plan)
    for warning in warnings:
      log.warning("%s", warning)
    rows = [dataclasses.asdict(candidate) | {"rows": candidate.rows.tolist()} for candidate in found]
    run_dir.write_json("candidates.json", {"candidates": rows, "warnings": warnings})
  kept = run_dir.read_json("candidates.json")["candidates"]
  return [Candidate(item["policy"], item["seed"], np.array(item["rows"], np.int64)) for item in kept]


def run(settings: Settings, bench: Workbench | None = None) -> str:
  """Retrains, compares, writes; returns the run folder. Finished trainings are kept, also when the run is killed."""
  s = settings
  bench = bench or Workbench(s)
  plan = plan_of(bench, s)
  identity = bench.identity("evaluate", s, ("data", "model", "finetune", "evaluate", "run"), ("train", "eval", "test"))
  of_policies = ("fraction", "num_examples", "token_budget", "layers", "sketch_size")
  identity["flags"] |= {name: getattr(s, name) for name in of_policies}
  identity["select_runs"] = {
    name: artifacts.hash_of([columns[part].tolist() for part in ("influence", "loss", "selected")])[:16]
    for name, columns in plan.runs
  }
  budget_of(s).limit(bench.parts["train"].num_tokens[trainable_rows(bench)])  # told before there is a run folder
  run_dir = artifacts.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.evaluate --flagfile=THIS"])
  chosen = kept_candidates(run_dir, bench, s, plan)
  records = bench.parts["train"].records
  for candidate in chosen:
    name = f"coresets/{candidate.policy.replace(' ', '_').replace('/', '_')}-{candidate.seed}.jsonl"
    run_dir.write_text(name, raw_lines(records, candidate.rows))
  judge: Judge | None = None
  sets = [candidate.rows for candidate in chosen]
  rows = []
  if not run_dir.holds("base.json"):
    judge = Judge(bench, s, sets)
    run_dir.write_json("base.json", {"losses": judge.losses(judge.sub).tolist()})
  for number, candidate in enumerate(chosen):
    file = f"trainings/{artifacts.hash_of([candidate.policy, candidate.seed])[:12]}.json"
    if not run_dir.holds(file):
      judge = judge or Judge(bench, s, sets)
      row = judge.retrain(candidate, f"train {number + 1}/{len(chosen)}: {candidate.policy}, seed {candidate.seed}")
      stored = dataclasses.asdict(row) | {"loss_per_test_example": row.loss_per_test_example.tolist()}
      run_dir.write_json(file, stored)
      log.info("%s, seed %d: test perplexity %.3f", row.policy, row.seed, row.perplexity)
    stored = run_dir.read_json(file)
    stored["loss_per_test_example"] = np.array(stored["loss_per_test_example"])
    rows.append(evaluation.RetrainRow(**stored))
  return write_table(run_dir, bench, s, rows, np.array(run_dir.read_json("base.json")["losses"]))


def write_table(run_dir, bench: Workbench, s: Settings, rows: list[evaluation.RetrainRow], base: np.ndarray) -> str:
  """The table as Markdown and JSON, the verdict, the plot."""
  test = bench.parts["test"]
  counted = test.num_response_tokens > 0
  tokens = test.num_response_tokens[counted]
  base_perplexity = evaluation.perplexity(base[counted] * tokens, tokens)
  table, words = evaluation.summarise(rows), evaluation.verdict(rows)
  run_dir.write_bytes("plots/perplexity.png", report.figure_bytes(report.perplexity_plot(table)))
  recipe = {
    "base model's test perplexity": f"{base_perplexity:.3f}",
    "test examples": int(counted.sum()),
    "test response tokens": int(tokens.sum()),
    "trained": f"{s.trainable}, layers {s.trainable_layers}, {s.trainable_modules}",
    "learning rate": s.learning_rate,
    "batch size": s.batch_size,
    "steps": rows[0].steps,
  }
  images = {"Test perplexity": "plots/perplexity.png"}
  text = report.retrain_report_markdown(table, words, recipe, images)
  run_dir.write_text("evaluation.md", text)
  run_dir.write_json(
    "evaluation.json",
    {"base_perplexity": base_perplexity, "table": table, "verdict": words.splitlines(), "recipe": recipe},
  )
  log.info("\n%s\n%s", report.markdown_table(report.retrain_rows(table)), words)
  return str(run_dir.path)


def main(_) -> None:
  """Entry point."""
  settings = flags.read(tells_costs=True)
  if settings.dry_run:
    dry_run.run(settings, "evaluate")
  else:
    run(settings)


if __name__ == "__main__":
  flags.define(run_dir="runs/evaluate")
  cli.run(main)
