"""Stage 4, the heart: influence of every training example on the evaluation set, and the coreset that follows from it.

python -m experiments.select --train_data=jsonl:mine.jsonl --layers=last:8 --fraction=0.5 --run_dir=runs/mine
"""

import dataclasses
import logging

import numpy as np

from in2core_jax.data import tokenizing
from in2core_jax.params import subtree
from in2core_jax.pipeline.advice import (
  better_policy,
  few_queries,
  risky_data,
  risky_settings,
  too_few_to_aim,
  unsolved,
  without_effect,
)
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
from in2core_jax.selection.warnings import selection_warnings
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
  rows = coreset.select_rows(s.policy, inputs, budget, s.seed)
  aim = inputs.aim if s.policy in coreset.SHRUNK_POLICIES else None
  if aim is not None and s.matching_shrink:
    apart = f"{100 * aim.beyond_chance:.0f} % of what sets the evaluation set's gradient apart from the training set's"
    log.info("%s: %s is more than chance; %.0f %% of it is matched", s.policy, apart, 100 * aim.kept)
  if s.policy in coreset.HYBRID_POLICIES:
    log.info("%s", chosen_by(s.policy, inputs.apart))
  clock.lap("selection")
  if s.per_layer:
    table = layer_table(bench, s, chosen, scored.result, work)
    run_dir.write_parquet("layer_scores.parquet", table)
    scored = dataclasses.replace(scored, layers=facts.layers_of(table))
  if s.per_token:
    run_dir.write_parquet("token_scores.parquet", token_table(bench, chosen, scored.result, work))
  if s.per_layer or s.per_token:
    clock.lap("per layer and token")
  if s.per_query:
    scored = dataclasses.replace(scored, queries=query_scores(bench, s, chosen, work))
    if run_dir.writer:
      write_query_scores(run_dir, bench, scored.queries)
    clock.lap("per query")
  copies = risky_data(bench.summary)  # many of them are told of once, with the same remedy
  warnings = [*risky_settings(s), *copies, *better_policy(s, aim)]
  warnings += too_few_to_aim(s, inputs)
  warnings += few_queries(s, aim, int(np.count_nonzero(bench.parts["eval"].num_response_tokens)))
  aims = rule_of(s, inputs) == "hybrid"
  warnings += selection_warnings(rows, inputs, s.seed, copies=not copies, topics=not aims)
  for warning in [*warnings, *unsolved(s, scored.result)]:
    log.warning("%s", warning)
  if run_dir.writer:
    scored = dataclasses.replace(scored, seconds=scored.seconds | clock.seconds)
    write_results(run_dir, bench, s, scored, rows, warnings, told(s, inputs, aim))
  work.remove()
  tokens, size = inputs.num_response_tokens[rows].sum(), inputs.num_response_tokens.sum()
  log.info(
    "selected %d of %d examples%s by %s, %.0f %% of the response tokens: %s",
    len(rows),
    len(inputs.ids),
    taking_no_part(inputs, bench.parts["train"].truncated),
    s.policy,
    100 * tokens / size,
    run_dir.path / "coreset.jsonl",
  )
  return str(run_dir.path)
