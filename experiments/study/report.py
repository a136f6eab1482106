"""What a study writes: rules against random sets and full data, and what each rule is."""

import dataclasses
import logging
import re

import numpy as np

from experiments.study.settings import StudySettings
from experiments.study.variants import Variant, rules_of, settings_of, variants_of
from in2core_jax.errors import how_many
from in2core_jax.evaluation import statistics, verdict
from in2core_jax.pipeline.evaluate_results import Group
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.judging import of_the_target, test_examples
from in2core_jax.pipeline.retraining import (
  EQUAL,
  TrainingSubset,
  many_passes,
  perplexity_on_test,
)
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.solver_inputs import num_curvature_examples
from in2core_jax.report import table_text
from in2core_jax.report.plots import perplexity_plot, write_figure
from in2core_jax.runs import run_folder
from in2core_jax.selection import coreset

log = logging.getLogger(__name__)


FULL = statistics.FULL


RANDOM = statistics.RANDOM


MATCHED = "length-matched random"  # held against, too, where it takes part


_RATIOS = {"to ": "token", "by example, to ": "example"}


_PERPLEXITIES = {"perplexity": "random sets beaten", "example_perplexity": "beaten by example"}


def shared_with_their_rule(chosen: list[TrainingSubset]) -> dict[str, float]:
  """For each variant the share of its examples that the rule which it changes has chosen too.

  "proponents, cg, cut at 96" changes "proponents, cg", or "proponents" where that was not asked for; rules without one
  are left out. Of several seeds the first counts.
  """
  first: dict[str, np.ndarray] = {}
  for candidate in chosen:
    first.setdefault(candidate.policy, candidate.rows)
  shared = {}
  for name, rows in first.items():
    rule = next((rule for rule in rules_of(name) if rule in first), None)
    if rule is not None:
      shared[name] = len(np.intersect1d(rows, first[rule])) / max(1, len(rows))
  return shared


def shares_of_target(session: Session, chosen: list[TrainingSubset]) -> dict[str, float]:
  """For each rule the share of its examples that come from where the evaluation examples do, a mean over its seeds.

  Empty where that is not known (`judging.of_the_target`).
  """
  mask = of_the_target(session.splits["train"], session.splits["eval"])
  if mask is None:
    return {}
  found: dict[str, list[float]] = {}
  for candidate in chosen:
    found.setdefault(candidate.policy, []).append(float(mask[candidate.rows].mean()))
  return {name: float(np.mean(shares)) for name, shares in found.items()}


@dataclasses.dataclass(frozen=True)
class SetFacts:
  """What is told of the sets that rules choose, by name of the rule.

  Attributes:
    shared: see `shared_with_their_rule`.
    of_target: see `shares_of_target`.
  """

  shared: dict[str, float] = dataclasses.field(default_factory=dict)
  of_target: dict[str, float] = dataclasses.field(default_factory=dict)


def comparison(rows: list[statistics.RetrainRow], of_sets: SetFacts = SetFacts()) -> list[dict]:
  """A row for each rule: perplexities, their ratios to random sets' and full data's, how many random sets it beats.

  Args:
    rows: trainings that have something in common, full data and random sets among them.
    of_sets: of the rules' sets.
  """
  by_rule: dict[str, list[statistics.RetrainRow]] = {}
  for row in rows:
    by_rule.setdefault(row.policy, []).append(row)
  random = {field: np.array([getattr(row, field) for row in by_rule[RANDOM]]) for field in _PERPLEXITIES}
  compared = verdict.Comparison(rows)
  found = []
  for name, own in by_rule.items():
    mean = lambda field, own=own: float(np.mean([getattr(row, field) for row in own]))  # noqa: E731
    line = {
      "rule": name,
      "seeds": len(own),
      "examples": round(mean("examples")),
      "steps": round(mean("steps")),
      "trained tokens": round(mean("trained_tokens")),
      "perplexity": round(mean("perplexity"), 3),
      "by example": round(mean("example_perplexity"), 3),
    }
    for column, by in _RATIOS.items():
      for other in (RANDOM, FULL, *({MATCHED} & set(by_rule))):
        ratio = "" if name == other else verdict.shown(compared.difference(name, other, by).ratio())
        line[f"{column}{other}"] = ratio
    for field, column in _PERPLEXITIES.items():
      beaten = int(np.sum(mean(field) < random[field]))
      line[column] = "" if name == RANDOM else f"{beaten} of {len(random[field])}"
    line["shared with its rule"] = f"{of_sets.shared[name]:.2f}" if name in of_sets.shared else ""
    line["of the target"] = f"{of_sets.of_target[name]:.2f}" if name in of_sets.of_target else ""
    found.append(line)
  return found


def ranges(rows: list[statistics.RetrainRow]) -> str:
  """The lowest and the highest perplexity of every rule that was trained several times, by token and by example."""
  by_rule: dict[str, list[statistics.RetrainRow]] = {}
  for row in rows:
    by_rule.setdefault(row.policy, []).append(row)
  told = []
  for name, own in by_rule.items():
    if len(own) > 1:
      token, example = (sorted(getattr(row, field) for row in own) for field in _PERPLEXITIES)
      told.append(f"{name} {token[0]:.3f} to {token[-1]:.3f} ({example[0]:.3f} to {example[-1]:.3f})")
  return f"Lowest and highest of several trainings, by example in brackets: {'; '.join(told)}." if told else ""


_COLUMNS = (
  '"to random" is the ratio of a rule\'s perplexity by token to random sets\', "to full" to full data\'s, both also by '
  "example. In brackets: 95 % intervals that hold for new test examples and for new trainings; a rule with one "
  "training has the spread of those with several. "
  '"Beaten": below how many of the random sets it is. "Of the target": the share of its examples that have the '
  "topic, or else the source, of evaluation examples. Each rule, and what it chose by:"
)


def rules_table(s: StudySettings, usable: int) -> list[dict]:
  """For every variant its policy, where its gradients are taken, its solver and what else it changes.

  Args:
    s: the flags.
    usable: training examples with a response.
  """
  found = []
  for name, variant in variants_of(s).items():
    own, policy = settings_of(s, variant), variant.policy
    scored = policy in coreset.SCORE_POLICIES and policy != "highest_loss" and not variant.unrolled
    compared = policy in coreset.GRADIENT_POLICIES
    damped = scored and own.solver != "identity"
    shown = ("solver", "damping_ratio", "layers")
    more = [f"--{flag}={str(getattr(own, flag)).lower()}" for flag, _ in variant.changes if flag not in shown]
    more += ["no text twice before every text is in"] if variant.copies_last else []
    more += ["weights of the losses"] if policy in coreset.WEIGHTED_POLICIES else []
    more += [f"{variant.rounds} rounds, each by a model trained on those before"] if variant.rounds > 1 else []
    more += ["through the training on all data"] if variant.unrolled else []
    line = {
      "rule": name,
      "policy": policy,
      "gradients at": _where(variant) if scored or compared else "",
      "layers": own.layers if scored or compared else "",
      "solver": own.solver if scored else "",
      "damping ratio": f"{own.damping_ratio:g}" if damped else "",
      "curvature of": _curvature_of(own, usable) if damped else "",
      "more": "; ".join(more),
    }
    found.append(line)
  return found


def _where(variant: Variant) -> str:
  """Where a rule's gradients are taken, in words."""
  if variant.warm_up:
    return f"{variant.warm_up} checkpoints of a warm-up"
  return "the fine-tuned model" if variant.trained else "the base model"


def _curvature_of(s: StudySettings, usable: int) -> str:
  """Which training examples a solver's curvature is that of, in words."""
  if s.solver == "datainf" or s.solver == "ekfac" and not s.ekfac_examples:
    return "all examples"
  if s.solver == "ekfac":
    return how_many(min(s.ekfac_examples, usable), "example")
  if s.solver == "lissa":
    return f"{s.depth} minibatches of {min(s.curvature_batch, usable)}"
  return how_many(num_curvature_examples(s, usable), "example")


def _sources(s: StudySettings) -> str:
  """The training data without the folders of files, and which block of it."""
  named = " + ".join(
    re.sub(r"^((?:\w[\w.-]*=)?(?:jsonl|file):).*/", r"\1", source) for source in s.train_data.split("+")
  )
  return f"{named} (block {s.limit_block} of the limits' size)" if s.limit_block else named


def remove_pictures(run_dir: run_folder.RunDir, equal: list[str]) -> None:
  """Removes the pictures of a longer --equal: they would be published beside tables that do not show them."""
  for word in EQUAL:
    for kind in ("svg", "png") if word not in equal else ():
      run_dir.remove(f"plots/study-{word}.{kind}")


def write_tables(run_dir, session: Session, s: StudySettings, groups: list[Group], base, of_sets: SetFacts) -> None:
  """study.md, .csv, .tex, .json and the pictures."""
  num_test, perplexity = np.count_nonzero(session.splits["test"].num_response_tokens), perplexity_on_test(session, base)
  parts = [
    "# Rules of selection, retrained",
    f"{len(trainable_rows(session)):,} training examples of {_sources(s)}, {s.model}, layers "
    f"{s.trainable_layers} trained, learning rate {s.learning_rate:g}, batches of {s.batch_size}; "
    f"{num_test} test examples; the base model's test perplexity is {perplexity:.3f}. In brackets: 95 % intervals "
    "that hold for new test examples and for new trainings.",
    test_examples(session.splits["test"]).about,
  ]
  titled = {f"equal {group.equal}" if len(groups) > 1 else "": group.rows for group in groups}
  notes = [note for group in groups for note in many_passes(group.equal, group.rows, s.batch_size)]
  notes += [*verdict.many_comparisons(titled), *verdict.sensitivity(list(titled.values()))]
  parts += [table_text.escape_markdown(note, 4000) for note in notes]
  every = []
  remove_pictures(run_dir, [group.equal for group in groups])
  for group in groups:
    table = comparison(group.rows, of_sets)
    every += [{"equal": group.equal} | row for row in table]
    write_figure(run_dir, f"study-{group.equal}", perplexity_plot(verdict.summarise(group.rows)))
    parts += [f"## Equal {group.equal}", table_text.markdown_table(table).rstrip(), ranges(group.rows)]
    parts += [f"![Test perplexity at equal {group.equal}](plots/study-{group.equal}.png)"]
  rules = rules_table(s, len(trainable_rows(session)))
  parts += ["## Rules", _COLUMNS, table_text.markdown_table(rules).rstrip()]
  run_dir.write_text("study.md", "\n\n".join(filter(None, parts)) + "\n")
  run_dir.write_text("study.csv", table_text.csv_table(every))
  run_dir.write_text("study.tex", table_text.latex_table(every))
  facts = {"base_perplexity": perplexity, "table": every, "notes": notes}
  run_dir.write_json("study.json", facts | {"devices": run_folder.device_summary()})
  log.info("\n%s", "\n\n".join(parts))
