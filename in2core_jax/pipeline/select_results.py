"""What a select run writes."""

import dataclasses
import logging
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np

from in2core_jax.data import records, summaries, tokenizing
from in2core_jax.errors import how_many
from in2core_jax.pipeline import select_outputs, target_weights
from in2core_jax.pipeline.advice import spares_nothing, tell, unused_inverse, without_effect
from in2core_jax.pipeline.phases import WHITENED, score_aggregate
from in2core_jax.pipeline.policy_inputs import shown
from in2core_jax.pipeline.scoring import Scored
from in2core_jax.pipeline.session import BoundSubtree, Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.splits import Splits
from in2core_jax.report import answer, facts, findings, html_page
from in2core_jax.report.markdown import select_report_markdown
from in2core_jax.report.plots import figure_bytes, residual_plot, score_histogram_plot
from in2core_jax.runs import run_folder
from in2core_jax.selection import aggregation, coreset, matching, two_samples
from in2core_jax.selection.inputs import PolicyInputs, taking_no_part

log = logging.getLogger(__name__)


def write_query_scores(run_dir, splits: Splits, scores: np.ndarray) -> None:
  """query_scores.parquet, by the process that writes."""
  if not run_dir.writer:
    return
  evals, train = splits["eval"].ids, splits["train"].ids
  run_dir.write_parquet(
    "query_scores.parquet",
    {
      "query": np.repeat(np.array(evals, dtype=object), len(train)),
      "example": np.tile(np.array(train, dtype=object), len(evals)),
      "influence": scores.reshape(-1),
    },
  )


def ranks(values: np.ndarray, ids: Sequence[str]) -> np.ndarray:
  """1 for the highest influence; ties by `example_id`, as in the selection."""
  by_id = aggregation.id_order(ids)
  order = by_id[np.argsort(-np.asarray(values, np.float64)[by_id], kind="stable")]
  rank = np.empty(len(values), np.int64)
  rank[order] = np.arange(1, len(values) + 1)
  return rank


def write_results(
  run_dir,
  session: Session,
  s: Settings,
  scored: Scored,
  choice: coreset.Choice,
  warnings: list[str],
  told: dict | None = None,
) -> None:
  """coreset.jsonl, scores.parquet, plots, reports, and at the very end summary.json, which marks the run as done.

  Also says on the terminal what the reports say first: the answer and the warnings.
  """
  train = session.splits["train"]
  selected = np.zeros(len(train), bool)
  selected[choice.rows] = True
  columns = score_columns(train, scored, selected) | choice_columns(choice, len(train))
  run_dir.write_text("coreset.jsonl", records.raw_lines(train.records, np.sort(choice.rows), columns.get("weight")))
  run_dir.write_parquet("scores.parquet", columns)
  summary = _summary(run_dir, session, s, scored, selected, warnings) | (told or {})
  summary["sources"] = select_outputs.write_sources(run_dir, train, selected, columns.get("weight"))
  select_outputs.write_forms(run_dir, train, columns, s)
  images = _write_plots(run_dir, s, scored, selected)
  found = facts.SelectRun(
    columns,
    train.records,
    train.truncated,
    session.splits.summary,
    summary,
    scored.layers,
    session.splits["eval"].records,
    scored.queries,
  )
  summary["warnings"] = findings.warnings(found)
  said = answer.answer(found)
  known = {"policy": s.policy} | {name: value for name, value in (told or {}).items() if value is not None}
  if "eval_sources" in known:
    known["eval_sources"] = target_weights.in_words(known["eval_sources"])
  run_dir.write_text("report.md", _page(found, known, images, said))
  run_dir.write_text("report.html", html_page.select_page(found))
  for name, figure in facts.figures(found).items():
    run_dir.write_bytes(f"plots/{name}", figure_bytes(figure, "svg"))
  run_dir.write_json("summary.json", summary)
  tell(summary["warnings"], [*without_effect(s), *summaries.told_lines(session.splits.summary)])
  log.info("%s", " ".join([str(said), *said.more]))


def _page(run: facts.SelectRun, selection: dict, images: dict[str, str], said: answer.Answer) -> str:
  """report.md: the answer, the strongest examples, and what is known of the run."""
  summary = run.summary
  sections = {
    "Selection": selection,
    "Solver": summary["solver"] | {"steps": summary["solver_steps"], "residual": summary["solver_residual"]},
    "Data": _flat(run.data),
  }
  first = [said.word, said.why, *said.more]
  texts = [shown(record) for record in run.records]
  return select_report_markdown(run.columns, texts, sections, summary["warnings"], images, answer=first)


def told(session: Session, s: Settings, inputs: PolicyInputs, aim: matching.Shrunk | None) -> dict[str, Any]:
  """What summary.json says of the rule that chose, and of what it aimed at."""
  sources = target_weights.rows_of(session, s)
  return {
    "rule": rule_of(s, inputs),
    "apart": dataclasses.asdict(inputs.apart) if inputs.apart else None,
    "another_kind": coreset.apart_enough(inputs.apart) if inputs.apart else None,
    "queries": len(inputs.similarities["hybrid"]) if s.policy in coreset.HYBRID_POLICIES else None,
    "target_kept": aim.kept if aim else None,
    "target_beyond_chance": aim.beyond_chance if aim else None,
  } | ({"eval_sources": sources} if sources else {})


def note_inputs(run_dir: run_folder.RunDir, splits: Splits, s: Settings, given: Settings) -> None:
  """Notes what goes in before anything is scored: the examples, the flags, and flags that change nothing.

  Args:
    run_dir: of the run.
    splits: its examples.
    s: the flags in force.
    given: as they were given, for flags.txt.
  """
  log.info("\n%s", summaries.format_summary(splits.summary, told=False))
  run_dir.write_json("data_summary.json", splits.summary)
  run_dir.write_flags("flags.txt", given.as_flags(), ["python -m experiments.select --flagfile=THIS"])
  for line in without_effect(s):
    log.warning("%s", line)


def tell_selected(
  s: Settings, train: tokenizing.TokenizedDataset, inputs: PolicyInputs, rows: np.ndarray, run_dir: run_folder.RunDir
) -> None:
  """Logs how much was selected, and where it is."""
  tokens = inputs.num_response_tokens
  log.info(
    "selected %d of %s%s by %s, %.0f %% of the response tokens: %s",
    len(rows),
    how_many(len(inputs.ids), "example"),
    taking_no_part(inputs, train.truncated),
    s.policy,
    100 * tokens[rows].sum() / tokens.sum(),
    run_dir.path / "coreset.jsonl",
  )


def rule_of(s: Settings, inputs: PolicyInputs) -> str:
  """The rule that chose: with --policy=auto the one that was taken."""
  if s.policy != "auto":
    return s.policy
  return "hybrid" if coreset.aims(inputs) else "random without copies"


def about_scores(session: Session, s: Settings, chosen: BoundSubtree) -> list[str]:
  """What the log says before examples are scored: of an inverse, sources and few bits, as far as the flags ask."""
  found = [line] if (line := unused_inverse(s)) else []
  if sources := target_weights.rows_of(session, s):
    found.append(f"evaluation examples count by their sources: {target_weights.in_words(sources)}")
  return found + spares_nothing(s, chosen.params, chosen.tree)


def about_choice(
  s: Settings, apart: two_samples.Apart | None, aim: matching.Shrunk | None, weights: np.ndarray | None = None
) -> list[str]:
  """What the log says of how the policy has chosen.

  Args:
    s: flags of the run.
    apart: how far evaluation and training set are apart, where a hybrid policy measured it.
    aim: of the matching; None where nothing was matched.
    weights: of the chosen examples, mean 1; None where the policy gives none.
  """
  found = []
  if weights is not None:
    spread = f"{weights.min():.3g} to {weights.max():.3g} with mean 1"
    found.append(f"{s.policy}: examples have weights, {spread}, as `weight` in coreset.jsonl")
  if aim is not None and s.matching_shrink:
    gap = f"train/eval gradient gap: {100 * aim.beyond_chance:.0f} % exceeds sampling noise"
    found.append(f"{s.policy}: {gap}; the target is shrunk to {100 * aim.kept:.0f} % of it")
  return found + ([chosen_by(s.policy, apart)] if s.policy in coreset.HYBRID_POLICIES else [])


def chosen_by(policy: str, apart: two_samples.Apart | None) -> str:
  """How far the evaluation set is from the training set, and what follows from it with --policy=auto."""
  if apart is None:
    told = "the distance between evaluation and training set is not known: one example does not show sampling noise"
  else:
    told = (
      f"the squared distance between evaluation and training set is {apart.distance:.3g}, p = {apart.p:.2g}; "
      f"{apart.share:.0%} of their gap exceeds sampling noise"
    )
  if policy != "auto":
    return f"{policy}: {told}"
  if coreset.apart_enough(apart):
    return f"auto: {told}. The evaluation set is of another kind, so the rule is hybrid: what is most like it"
  return (
    f"auto: {told}. Another kind takes {coreset.LEAST_DISTANCE:g} or more at p = {coreset.MOST_P:g} or below. For sets "
    "of the same kind no rule was reliably better than random examples, so the choice is random without duplicates "
    "(--policy names a rule)"
  )


def choice_columns(choice: coreset.Choice, size: int) -> dict[str, np.ndarray]:
  """The columns of scores.parquet about the choice: its order (1 first, 0 left out) and the reason of each.

  Of a policy that gives weights also these, 0 where left out.

  Args:
    choice: S rows.
    size: N examples.
  """
  place, reason = np.zeros(size, np.int64), np.full(size, "", dtype=object)
  place[choice.rows] = np.arange(1, len(choice.rows) + 1)
  reason[choice.rows] = choice.reasons
  found = {"choice": place, "reason": reason}
  if choice.weights is not None:
    found["weight"] = np.zeros(size)
    found["weight"][choice.rows] = choice.weights
  return found


def score_columns(train: tokenizing.TokenizedDataset, scored: Scored, selected: np.ndarray) -> dict[str, np.ndarray]:
  """The columns of scores.parquet, in source order.

  Args:
    train: N examples.
    scored: their influence and losses.
    selected: bool [N].
  """
  columns = {
    "example_id": np.array(train.ids, dtype=object),
    "influence": np.asarray(scored.influence, np.float32),
    "rank": ranks(scored.influence, train.ids),
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
  histogram = score_histogram_plot(scored.influence, selected)
  run_dir.write_bytes("plots/scores.png", figure_bytes(histogram))
  curve = scored.result.curve
  if len(curve) > 1:
    figure = residual_plot([residual for _, residual in curve], s.solver, [step for step, _ in curve])
    run_dir.write_bytes("plots/residual.png", figure_bytes(figure))
    where = "examples that it has not seen" if s.solver == "lissa" else "the fixed examples of its curvature"
    images[f"Residual of the solver on {where}"] = "plots/residual.png"
  return images


def _summary(run_dir, session: Session, s: Settings, scored: Scored, selected: np.ndarray, warnings: list[str]) -> dict:
  """What summary.json says: the meaning of the numbers, the solver, sizes, what looks risky."""
  train, result = session.splits["train"], scored.result
  known = np.all(np.isfinite(result.residual))
  return {
    "sign": "positive influence = proponent: more weight on the example lowers the evaluation loss",
    "unit": _unit(s, session.splits["eval"].second is not None),
    "divided_by_number_of_examples": False,
    "loss_reduction": s.loss_reduction,
    **({"beta": s.beta} if any(part.second is not None for part in session.splits.values()) else {}),
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
    "batch_tokens": session.batching.batch_tokens,
    "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "identity": run_dir.identity,
    "versions": run_folder.package_versions(),
    "devices": run_folder.device_summary(),
  }


def _unit(s: Settings, pairs: bool = False) -> str:
  """What a score is a number of; `pairs`: whether the evaluation examples are preference pairs."""
  how = score_aggregate(s)
  if how == "topic_max":
    return "none: each evaluation topic's scores are divided by their root mean square, then the largest is taken"
  if how in ("topic_quota", "round_robin", "weighted_turns"):
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
  loss = f"loss: DPO with beta {s.beta:g}, in nats" if pairs else loss
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
