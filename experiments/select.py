"""Stage 4, the heart: influence of every training example on the evaluation set, and the coreset that follows from it.

python -m experiments.select --train_data=jsonl:mine.jsonl --layers=last:8 --fraction=0.5 --run_dir=runs/mine
"""

import dataclasses
import logging
import resource
from typing import Any

import numpy as np

from experiments import cli, dry_run, flags
from experiments.flags import Settings
from experiments.policy_inputs import ChoiceInputs, shown
from experiments.refusals import budget_of, check_select
from experiments.resuming import Work
from experiments.scoring import (
  WHITENED,
  Clock,
  Scored,
  layer_table,
  query_scores,
  score,
  score_aggregate,
  token_table,
  trajectory_weights,
)
from experiments.workbench import Workbench, choose
from in2core_jax import (
  artifacts,
  coreset,
  data,
  finetune,
  ihvp,
  matching,
  records,
  report,
  report_facts,
  report_html,
  subtree,
  two_samples,
)

log = logging.getLogger(__name__)

_MANY_COPIES = 0.05  # share of the training set from which select warns of them
# Retrained halves of four pools with 0.35 and more: proponents a little ahead of matching at equal tokens; 0: behind.
_ANOTHER_KIND = 0.3
_ENOUGH_QUERIES = 40  # of a source that is 43 % of a pool, 40 were told apart from it in 15 of 20 draws, 20 in none
_HARDLY_MATCHED = 0.1  # share of the way to the evaluation set's mean gradient below which it decides next to nothing


def run(settings: Settings, bench: Workbench | None = None) -> str:
  """Scores, selects, writes; returns the run folder. Returns at once when the folder holds this very run."""
  s = settings
  artifacts.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  bench = bench or Workbench(s)
  budget = budget_of(s)
  params = bench.checkpoint_params(s.checkpoint)
  chosen = choose(bench, params, s.layers, s.modules)
  check_select(bench, s)
  identity = bench.identity("select", s, ("data", "model", "select", "run"), ("train", "eval"))
  identity["flags"].pop("checkpoint")
  identity["checkpoint"] = finetune.checkpoint_hash(s.checkpoint)
  if s.trajectory != "none":
    weights = trajectory_weights(s.checkpoint)
    identity["trajectory"] = {str(step): weight for step, weight in weights.items()}
    identity["trajectory_weights"] = finetune.steps_hash(s.checkpoint, weights)
  run_dir = artifacts.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  bench.write_skipped(run_dir)
  work = Work(run_dir, s.shard_batches)
  if run_dir.is_whole("summary.json"):
    work.remove()  # what a run that was killed at its very end has left
    log.info("%s is finished already", run_dir.path)
    return str(run_dir.path)
  log.info("\n%s", data.format_summary(bench.summary, told=False))
  run_dir.write_json("data_summary.json", bench.summary)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.select --flagfile=THIS"])
  for line in without_effect(s):
    log.warning("%s", line)
  log.info("influence of layers %s: %s numbers", chosen.tree.layers, f"{subtree.count(chosen.problem.sub):,}")
  scored = score(bench, s, chosen, work)
  clock = Clock()
  more = ChoiceInputs(bench, s, params).of({s.policy})
  inputs = coreset.inputs_of(bench.parts["train"], scored.influence, scored.loss, **more)
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
    scored = dataclasses.replace(scored, layers=report_facts.layers_of(table))
  if s.per_token:
    run_dir.write_parquet("token_scores.parquet", token_table(bench, chosen, scored.result, work))
  if s.per_layer or s.per_token:
    clock.lap("per layer and token")
  if s.per_query:
    scored = dataclasses.replace(scored, queries=query_scores(bench, s, chosen, work))
    if run_dir.writer:
      _write_query_scores(run_dir, bench, scored.queries)
    clock.lap("per query")
  copies = risky_data(bench.summary)  # many of them are told of once, with the same remedy
  warnings = [*risky_settings(s), *copies, *better_policy(s, aim)]
  warnings += too_few_to_aim(s, inputs)
  warnings += few_queries(s, aim, int(np.count_nonzero(bench.parts["eval"].num_response_tokens)))
  aims = rule_of(s, inputs) == "hybrid"
  warnings += coreset.selection_warnings(rows, inputs, s.seed, copies=not copies, topics=not aims)
  for warning in [*warnings, *unsolved(s, scored.result)]:
    log.warning("%s", warning)
  if run_dir.writer:
    scored = dataclasses.replace(scored, seconds=scored.seconds | clock.seconds)
    write_results(run_dir, bench, s, scored, rows, warnings, _told(s, inputs, aim))
  work.remove()
  tokens, size = inputs.num_response_tokens[rows].sum(), inputs.num_response_tokens.sum()
  log.info(
    "selected %d of %d examples%s by %s, %.0f %% of the response tokens: %s",
    len(rows),
    len(inputs.ids),
    coreset.taking_no_part(inputs, bench.parts["train"].truncated),
    s.policy,
    100 * tokens / size,
    run_dir.path / "coreset.jsonl",
  )
  return str(run_dir.path)


def without_effect(s: Settings) -> list[str]:
  """Flags that are of another solver or policy, one sentence each: a flagfile may serve several."""
  given = [name for name in ("repeat", "scale", "acceleration", "average") if s.solver != "lissa" and s.is_set(name)]
  found = [f"{s.as_flag(name)} is LiSSA's and changes nothing with --solver={s.solver}" for name in given]
  if s.policy not in coreset.FEATURE_POLICIES:
    idle = [name for name in ("matching_target", "matching_shrink") if s.is_set(name)]
    found += [f"{s.as_flag(name)} is of greedy matching and changes nothing with --policy={s.policy}" for name in idle]
  if s.policy in (*coreset.FEATURE_POLICIES, "matching_hybrid") and s.is_set("aggregate"):
    found.append(f"{s.as_flag('aggregate')} changes the reported scores alone: --policy={s.policy} matches a mean")
  return found


def risky_settings(s: Settings) -> list[str]:
  """What made the plain rule lose to random halves where it was measured (docs/selection.md), one sentence each."""
  found = []
  if s.policy in ("proponents", "topic_quota"):
    if not s.checkpoint:
      found.append(
        "The scores are those of the base model, where short responses rank high. Give --checkpoint, the fine-tuned "
        "model, or use the policy matching."
      )
    if s.solver == "identity" and s.normalize == "none" and s.trajectory == "none":
      found.append(
        "The scores are plain products of gradients, in which large gradients decide. Use --solver=cg, --solver=lissa "
        "or the policy matching."
      )
  return found


def unsolved(s: Settings, result: ihvp.SolveResult) -> list[str]:
  """That a solver has stopped above its tolerance, in one sentence; nothing where it has none."""
  if result.info.get("converged") is not False:
    return []
  damping = "--damping_ratio" if np.isnan(s.damping) else "--damping"
  other = "" if s.solver == "cg" else "--solver=cg, "
  return [
    f"{s.solver} stopped above its tolerance of {s.solver_tol:g}, at a relative residual of "
    f"{float(np.max(result.residual)):.3g} after {result.steps} steps. What helps: {other}more --depth, a higher "
    f"{damping}."
  ]


def risky_data(summary: dict) -> list[str]:
  """What of the training set made rules lose where it was measured (docs/selection.md), one sentence each.

  Args:
    summary: `data.data_summary`.
  """
  copies, size = (summary["parts"]["train"][name] for name in ("duplicates", "examples"))
  if copies <= _MANY_COPIES * size:
    return []
  return [
    f"{copies:,} of the {size:,} training examples repeat an earlier one, message for message, and may fill the "
    "selection. Give --drop_copies, to finetune, select and evaluate alike: they choose among different examples then."
  ]


def better_policy(s: Settings, aim: matching.Shrunk | None) -> list[str]:
  """Where the scores that are there anyway did better than matching (docs/selection.md), in one sentence.

  Args:
    s: flags of the run.
    aim: of the matching (`PolicyInputs.aim`); None where nothing was matched.
  """
  # With LiSSA at 0.1 the highest scores did worse than matching: by CG they did not.
  trusted = s.checkpoint and s.solver == "cg" and s.matching_shrink and s.policy == "matching"
  if aim is None or aim.beyond_chance < _ANOTHER_KIND or not trusted:
    return []
  return [
    "The evaluation set is of another kind than the training set, as far as gradients tell "
    f"({100 * aim.beyond_chance:.0f} % of the difference of their means is more than chance). For such sets the half "
    "with the highest influence by CG retrained as well as matching's, a little better at equal response tokens. "
    "To compare both: evaluate with --policies=full,random,proponents."
  ]


def too_few_to_aim(s: Settings, inputs: coreset.PolicyInputs) -> list[str]:
  """Where --policy=auto draws at random and more evaluation examples might show otherwise, in one sentence."""
  if s.policy != "auto" or coreset.aims(inputs) or (size := len(inputs.similarities["hybrid"])) >= _ENOUGH_QUERIES:
    return []
  return [
    f"{size:,} distinct evaluation examples are few to tell whether they are of another kind than the training set: "
    f"give {_ENOUGH_QUERIES} or more (--eval_data, --eval_limit), or --policy=hybrid where you know that they are."
  ]


def few_queries(s: Settings, aim: matching.Shrunk | None, size: int) -> list[str]:
  """Where the evaluation set is too small to say what should be matched, in one sentence.

  Args:
    s: flags of the run.
    aim: of the matching (`PolicyInputs.aim`); None where nothing was matched.
    size: evaluation examples.
  """
  if aim is None or not s.matching_shrink or aim.kept >= _HARDLY_MATCHED:
    return []
  return [
    f"The {size:,} evaluation examples know their own mean gradient less well than the training set does: "
    f"{100 * aim.kept:.0f} % of the difference is matched, so that the selection stands for the training set and "
    "hardly for them. Give more of them (--eval_data, --eval_limit), ten times as many where there are."
  ]


def _write_query_scores(run_dir, bench: Workbench, scores: np.ndarray) -> None:
  evals, train = bench.parts["eval"].ids, bench.parts["train"].ids
  run_dir.write_parquet(
    "query_scores.parquet",
    {
      "query": np.repeat(np.array(evals, dtype=object), len(train)),
      "example": np.tile(np.array(train, dtype=object), len(evals)),
      "influence": scores.reshape(-1),
    },
  )


def ranks(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """1 for the highest influence; ties by `example_id`, as in the selection."""
  order = np.lexsort((ids, -np.asarray(values, np.float64)))
  rank = np.empty(len(values), np.int64)
  rank[order] = np.arange(1, len(values) + 1)
  return rank


def write_results(
  run_dir,
  bench: Workbench,
  s: Settings,
  scored: Scored,
  rows: np.ndarray,
  warnings: list[str],
  told: dict | None = None,
) -> None:
  """coreset.jsonl, scores.parquet, plots, reports, and at the very end summary.json, which marks the run as done."""
  train = bench.parts["train"]
  selected = np.zeros(len(train), bool)
  selected[rows] = True
  columns = score_columns(train, scored, selected)
  run_dir.write_text("coreset.jsonl", records.raw_lines(train.records, np.sort(rows)))
  run_dir.write_parquet("scores.parquet", columns)
  summary = _summary(run_dir, bench, s, scored, selected, warnings) | (told or {})
  known = {name: value for name, value in (told or {}).items() if value is not None}
  sections = {
    "Selection": {"policy": s.policy} | known,
    "Solver": summary["solver"] | {"steps": summary["solver_steps"], "residual": summary["solver_residual"]},
    "Data": _flat(bench.summary),
  }
  images = _write_plots(run_dir, s, scored, selected)
  texts = [shown(record) for record in train.records]
  found_risky = [*warnings, *unsolved(s, scored.result)]  # report.html has the solver's facts beside its other findings
  run_dir.write_text("report.md", report.select_report_markdown(columns, texts, sections, found_risky, images))
  found = report_facts.SelectRun(
    columns,
    train.records,
    train.truncated,
    bench.summary,
    summary,
    scored.layers,
    bench.parts["eval"].records,
    scored.queries,
  )
  run_dir.write_text("report.html", report_html.select_page(found))
  for name, figure in report_facts.figures(found).items():
    run_dir.write_bytes(f"plots/{name}", report.figure_bytes(figure, "svg"))
  run_dir.write_json("summary.json", summary)


def _told(s: Settings, inputs: coreset.PolicyInputs, aim: matching.Shrunk | None) -> dict[str, Any]:
  """What summary.json says of the rule that chose, and of what it aimed at."""
  return {
    "rule": rule_of(s, inputs),
    "apart": dataclasses.asdict(inputs.apart) if inputs.apart else None,
    "target_kept": aim.kept if aim else None,
    "target_beyond_chance": aim.beyond_chance if aim else None,
  }


def rule_of(s: Settings, inputs: coreset.PolicyInputs) -> str:
  """The rule that chose: with --policy=auto the one that was taken."""
  if s.policy != "auto":
    return s.policy
  return "hybrid" if coreset.aims(inputs) else "random without copies"


def chosen_by(policy: str, apart: two_samples.Apart | None) -> str:
  """How far the evaluation set is from the training set, and what follows from it with --policy=auto."""
  if apart is None:
    told = "how far evaluation and training set are apart is not known, for a single example tells nothing of chance"
  else:
    told = (
      f"{apart.share:.0%} of the distance between evaluation and training set is beyond chance (squared distance of "
      f"their means {apart.distance:.3g}, p = {apart.p:.2g})"
    )
  if policy != "auto":
    return f"{policy}: {told}"
  if coreset.apart_enough(apart):
    return f"auto: {told}: what is similar to the evaluation examples is chosen (--policy=hybrid)"
  return (
    f"auto: {told}; for another kind it takes {coreset.LEAST_DISTANCE:g} at p = {coreset.MOST_P:g} or below. For a set "
    "of the training set's own kind no rule was reliably better than a random choice without copies, so that is taken "
    "(--policy names a rule)"
  )


def score_columns(train: data.TokenizedDataset, scored: Scored, selected: np.ndarray) -> dict[str, np.ndarray]:
  """The columns of scores.parquet, in source order.

  Args:
    train: N examples.
    scored: their influence and losses.
    selected: bool [N].
  """
  columns = {
    "example_id": np.array(train.ids, dtype=object),
    "influence": np.asarray(scored.influence, np.float32),
    "rank": ranks(scored.influence, np.array(train.ids, dtype=np.str_)),
    "selected": selected,
    "loss": np.asarray(scored.loss, np.float32),
    "num_tokens": train.num_tokens,
    "num_response_tokens": train.num_response_tokens,
    "topic": np.array(train.topics, dtype=object),
  }
  if scored.self_influence is not None:
    columns["self_influence"] = np.asarray(scored.self_influence, np.float32)
  return columns


def _write_plots(run_dir, s: Settings, scored: Scored, selected: np.ndarray) -> dict[str, str]:
  """Pictures of scores and solver; {caption: file} for the report."""
  images = {"Influence of the training examples": "plots/scores.png"}
  histogram = report.score_histogram_plot(scored.influence, selected)
  run_dir.write_bytes("plots/scores.png", report.figure_bytes(histogram))
  curve = scored.result.curve
  if len(curve) > 1:
    figure = report.residual_plot([residual for _, residual in curve], s.solver, [step for step, _ in curve])
    run_dir.write_bytes("plots/residual.png", report.figure_bytes(figure))
    where = "examples that it has not seen" if s.solver == "lissa" else "the fixed examples of its curvature"
    images[f"Residual of the solver on {where}"] = "plots/residual.png"
  return images


def _summary(run_dir, bench: Workbench, s: Settings, scored: Scored, selected: np.ndarray, warnings: list[str]) -> dict:
  """What summary.json says: the meaning of the numbers, the solver, sizes, what looks risky."""
  train, result = bench.parts["train"], scored.result
  known = np.all(np.isfinite(result.residual))
  return {
    "sign": "positive influence = proponent: more weight on the example lowers the evaluation loss",
    "unit": _unit(s),
    "divided_by_number_of_examples": False,
    "loss_reduction": s.loss_reduction,
    "policy": s.policy,
    "examples": len(train),
    "selected": int(selected.sum()),
    "response_tokens": int(train.num_response_tokens.sum()),
    "selected_response_tokens": int(train.num_response_tokens[selected].sum()),
    "without_response": [train.ids[row] for row in np.flatnonzero(train.num_response_tokens == 0)],
    "solver": {k: v for k, v in result.info.items() if isinstance(v, str | int | float | bool)},
    "solver_steps": result.steps,
    "solver_residual": float(np.max(result.residual)) if known else None,
    "solver_curve": [[step, np.asarray(r).tolist()] for step, r in result.curve],
    "warnings": warnings,
    "seconds": scored.seconds,
    "batch_tokens": bench.batch_tokens,
    "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "identity": run_dir.identity,
    "versions": artifacts.package_versions(),
    "devices": artifacts.device_summary(),
  }


def _unit(s: Settings) -> str:
  """What a score is a number of."""
  how = score_aggregate(s)
  if how == "topic_max":
    return "none: each evaluation topic's scores are divided by their root mean square, then the largest is taken"
  if how in ("topic_quota", "round_robin"):
    return "none: a priority, the number of examples for the first choice down to 1 for the last"
  if s.trajectory == "less":
    return "learning rate: a sum of cosines, each times the mean learning rate before its checkpoint"
  if s.trajectory == "tracin":
    return "loss, summed over the checkpoints: what steps along the example's gradient take off the evaluation loss"
  if s.normalize == WHITENED:
    return "none: cosines of projected gradients in the whitened metric of the training set's, over the queries"
  if s.normalize == "cosine":
    return "none: the cosine of the example's gradient and the direction that the solver made of the query's"
  if s.normalize != "none":
    return f"that of the influence, divided by the example's own length under the inverse (--normalize={s.normalize})"
  loss = f"loss: {s.loss_reduction} over response tokens, in nats"
  if s.solver == "identity":
    return f"loss^2 per squared parameter, an inner product of gradients ({loss})"
  return f"loss, the first-order change of the evaluation loss per unit of weight on the example, times -1 ({loss})"


def _flat(summary: dict, prefix: str = "") -> dict:
  flat = {}
  for name, value in summary.items():
    if isinstance(value, dict) and name != "topics":
      flat |= _flat(value, f"{prefix}{name} ")
    elif isinstance(value, int | float | str):
      flat[f"{prefix}{name}"] = value
  return flat


def main(_) -> None:
  """Entry point."""
  settings = flags.read(tells_costs=True)
  if settings.dry_run:
    dry_run.run(settings, "select")
  else:
    run(settings)


if __name__ == "__main__":
  flags.define(run_dir="runs/select")
  cli.run(main)
