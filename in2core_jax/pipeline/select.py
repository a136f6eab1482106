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
  layer_table,
  query_scores,
  score,
  token_table,
  trajectory_weights,
)
from in2core_jax.pipeline.select_results import chosen_by, rule_of, told, write_query_scores, write_results
from in2core_jax.pipeline.session import Workbench, choose
from in2core_jax.pipeline.settings import Settings
from in2core_jax.report import facts
from in2core_jax.runs import run_folder
from in2core_jax.runs.unfinished import Work
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import inputs_of, taking_no_part
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)


def run(settings: Settings, bench: Workbench | None = None) -> str:
  """Scores, selects, writes; returns the run folder. Returns at once when the folder holds this very run."""
  s = settings
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  bench = bench or Workbench(s)
  budget = budget_of(s)
  params = bench.checkpoint_params(s.checkpoint)
  chosen = choose(bench, params, s.layers, s.modules)
  check_select(bench, s)
  identity = bench.identity("select", s, ("data", "model", "select", "run"), ("train", "eval"))
  identity["flags"].pop("checkpoint")
  identity["checkpoint"] = train_loop.checkpoint_hash(s.checkpoint)
  if s.trajectory != "none":
    weights = trajectory_weights(s.checkpoint)
    identity["trajectory"] = {str(step): weight for step, weight in weights.items()}
    identity["trajectory_weights"] = train_loop.steps_hash(s.checkpoint, weights)
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  bench.write_skipped(run_dir)
  work = Work(run_dir, s.shard_batches)
  if run_dir.is_whole("summary.json"):
    work.remove()  # what a run that was killed at its very end has left
    log.info("%s is finished already", run_dir.path)
    return str(run_dir.path)
  log.info("\n%s", tokenizing.format_summary(bench.summary, told=False))
  run_dir.write_json("data_summary.json", bench.summary)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.select --flagfile=THIS"])
  for line in without_effect(s):
    log.warning("%s", line)
  log.info("influence of layers %s: %s numbers", chosen.tree.layers, f"{subtree.count(chosen.problem.sub):,}")
  scored = score(bench, s, chosen, work)
  clock = Clock()
  more = ChoiceInputs(bench, s, params).of({s.policy})
  inputs = inputs_of(bench.parts["train"], scored.influence, scored.loss, **more)
  choice = coreset.choose(s.policy, inputs, budget, s.seed)
  aim = inputs.aim if s.policy in coreset.SHRUNK_POLICIES else None
  if aim is not None and s.matching_shrink:
    gap = f"{100 * aim.beyond_chance:.0f} % exceeds sampling noise"
    log.info("%s: train/eval gradient gap: %s; the target is shrunk to %.0f %% of it", s.policy, gap, 100 * aim.kept)
  if s.policy in coreset.HYBRID_POLICIES:
    log.info("%s", chosen_by(s.policy, inputs.apart))
  clock.lap("selection")
  if s.writes("layer"):
    table = layer_table(bench, s, chosen, scored.result, work)
    run_dir.write_parquet("layer_scores.parquet", table)
    scored = dataclasses.replace(scored, layers=facts.layers_of(table))
  if s.writes("token"):
    run_dir.write_parquet("token_scores.parquet", token_table(bench, chosen, scored.result, work))
  if s.writes("layer") or s.writes("token"):
    clock.lap("per layer and token")
  if s.writes("query"):
    scored = dataclasses.replace(scored, queries=query_scores(bench, s, chosen, work))
    if run_dir.writer:
      write_query_scores(run_dir, bench, scored.queries)
    clock.lap("per query")
  warnings = of_selection(s, inputs, choice.rows, aim, bench.parts["eval"], rule_of(s, inputs))
  if run_dir.writer:
    scored = dataclasses.replace(scored, seconds=scored.seconds | clock.seconds)
    write_results(run_dir, bench, s, scored, choice, warnings, told(s, inputs, aim))
  work.remove()
  tokens, size = inputs.num_response_tokens[choice.rows].sum(), inputs.num_response_tokens.sum()
  log.info(
    "selected %d of %d examples%s by %s, %.0f %% of the response tokens: %s",
    len(choice.rows),
    len(inputs.ids),
    taking_no_part(inputs, bench.parts["train"].truncated),
    s.policy,
    100 * tokens / size,
    run_dir.path / "coreset.jsonl",
  )
  return str(run_dir.path)
