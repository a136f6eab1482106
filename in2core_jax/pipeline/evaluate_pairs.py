"""What an evaluation writes whose test examples are preference pairs: DPO loss and accuracy, with paired intervals."""

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from in2core_jax.evaluation import statistics, verdict
from in2core_jax.evaluation.paired import Estimate, Paired, by_chance
from in2core_jax.pipeline.advice import tell
from in2core_jax.pipeline.evaluate_results import Group
from in2core_jax.pipeline.finetune import recipe_of, trainable_rows
from in2core_jax.pipeline.judging import test_examples
from in2core_jax.pipeline.retraining import many_passes
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.report import findings, table_text
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

_LABELS = {statistics.RANDOM: "random sets", statistics.FULL: "full data"}
_ABOUT = (
  "The DPO loss of a pair is -log sigmoid(u), u = beta ((log pi_w - log ref_w) - (log pi_l - log ref_l)); the base "
  "model has log 2 = 0.6931. A pair is right where u > 0; accuracy is the share of right pairs. In brackets: 95 % "
  "intervals that hold for new test pairs and for new trainings."
)


def accuracies(losses: np.ndarray) -> np.ndarray:
  """1 where the chosen answer has the higher reward, that is where the loss is below log 2; one half where it is equal.

  Args:
    losses: DPO losses, any shape.
  """
  return (np.sign(math.log(2) - losses) + 1) / 2


class PairComparison:
  """Retrained models judged on the same pairs: losses and accuracies by policy, and the intervals of both."""

  def __init__(self, rows: Sequence[statistics.RetrainRow]):
    """Groups the rows by policy; they hold the DPO loss of each test pair."""
    self.groups = statistics.by_policy(rows)
    losses = {name: np.stack([row.loss_per_test_example for row in own]) for name, own in self.groups.items()}
    ones = np.ones(rows[0].loss_per_test_example.size)
    self.of = {
      "loss": Paired(losses, ones, rows[0].test_groups),
      "accuracy": Paired({name: accuracies(own) for name, own in losses.items()}, ones, rows[0].test_groups),
    }

  def mean(self, name: str, what: str) -> Estimate:
    """The mean of a policy's losses (nats) or its accuracy."""
    return self.of[what].mean(name, "example")

  def difference(self, name: str, other: str, what: str) -> Estimate:
    """The same, minus that of another policy."""
    return self.of[what].difference(name, other, "example")

  def others(self, name: str) -> list[str]:
    """What a policy is held against: random sets and full data, where they are there; random sets against nothing."""
    if name == statistics.RANDOM:
      return []
    return [other for other in (statistics.RANDOM, statistics.FULL) if other in self.groups and other != name]


def summarise(rows: Sequence[statistics.RetrainRow]) -> list[dict]:
  """A plain dict for each policy: sizes, loss and accuracy with their intervals, differences to random and full."""
  compared, table = PairComparison(rows), []
  for name, own in compared.groups.items():
    mean = lambda field, own=own: round(float(np.mean([getattr(row, field) for row in own])))  # noqa: E731
    found = {"policy": name, "seeds": len(own), "examples": mean("examples"), "steps": mean("steps")}
    for what in ("loss", "accuracy"):
      found |= _cells(what, compared.mean(name, what))
    for other in (statistics.RANDOM, statistics.FULL):
      for what in ("loss", "accuracy") if other in compared.others(name) else ():
        found |= _cells(f"{what}_minus_{other}", compared.difference(name, other, what))
    table.append(found)
  return table


def _cells(name: str, estimate: Estimate) -> dict[str, float]:
  interval = estimate.interval()
  low, high = (interval.low, interval.high) if name != "accuracy" else np.clip((interval.low, interval.high), 0, 1)
  return {name: interval.mean, f"{name}_low": float(low), f"{name}_high": float(high)}


def sentences(rows: Sequence[statistics.RetrainRow]) -> list[str]:
  """One for each policy; a difference is called one only where its interval excludes 0."""
  compared, lines = PairComparison(rows), []
  for name in compared.groups:
    loss, right = compared.mean(name, "loss"), compared.mean(name, "accuracy")
    parts = [f"{name}: DPO loss {loss.mean:.4f}, accuracy {100 * right.mean:.1f} %"]
    for other in compared.others(name):
      less, more = (compared.difference(name, other, what) for what in ("loss", "accuracy"))
      label = _LABELS[other]
      word = verdict.word(less)
      said = "" if less.note else f"; its loss {'' if word.startswith('cannot') else 'is '}{word} that of {label}"
      unit = f"difference {_shown(less, 1, '+.4f')}; accuracy {_shown(more, 100, '+.1f', ' points')}"
      parts.append(f"{said or f'; against {label}'} ({unit})")
    lines.append("".join(parts) + ".")
  return lines


def _shown(estimate: Estimate, times: float, digits: str, unit: str = "") -> str:
  interval = estimate.interval()
  mean, low, high = (format(times * value, digits) for value in (interval.mean, interval.low, interval.high))
  if estimate.note:
    return f"{mean}{unit}, without an interval: {estimate.note}"
  return f"{mean}{unit}, 95 % interval {low} to {high}"


def chance(groups: Mapping[str, Sequence[statistics.RetrainRow]]) -> list[str]:
  """How many of all the comparisons of losses are expected to be chance; nothing where there are fewer than two."""
  every = {}
  for title, rows in groups.items():
    compared = PairComparison(rows)
    for name in compared.groups:
      every |= {f"{title}{name}-{other}": compared.difference(name, other, "loss") for other in compared.others(name)}
  count = sum(not one.note for one in every.values())
  if count < 2:
    return []
  alone, together = by_chance(every)
  return [
    f"{count} comparisons of losses, each at 95 %: where nothing differs, about {0.05 * count:.2g} intervals exclude 0 "
    f"by chance; {len(alone)} do, and {len(together)} with Holm's correction for all {count}."
  ]


def write_tables(
  run_dir: run_folder.RunDir, session: Session, s: Settings, groups: list[Group], base: np.ndarray
) -> str:
  """evaluation.md, .csv and .json, which comes last; arguments as in `evaluate_results.write_tables`."""
  test, many = session.splits["test"], len(groups) > 1
  about = test_examples(test).about
  titled = {f"{group.title}: " if many else "": group.rows for group in groups}
  lines = [title + line for title, rows in titled.items() for line in sentences(rows)]
  risky = [*run_dir.read_json("candidates.json")["warnings"]]
  risky += [note for group in groups for note in many_passes(group.equal, group.rows, s.batch_size)]
  notes = [*chance(titled), *filter(None, [about])]
  tables = [
    [{"equal": group.equal, "fraction": group.fraction} | row for row in summarise(group.rows)] for group in groups
  ]
  every = [row for table in tables for row in table]
  recipe = {
    "loss": "DPO, of preference pairs",
    "beta": s.beta,
    "base model's DPO loss": f"{base[test.num_response_tokens > 0].mean():.4f}",
    "test pairs": int(np.count_nonzero(test.num_response_tokens)),
    "trained": f"{s.trainable}, layers {s.trainable_layers}, {s.trainable_modules}",
    "learning rate": s.learning_rate,
    "batch size": s.batch_size,
    "steps of full data": recipe_of(s, len(trainable_rows(session))).steps,
  }
  page = ["# Retrained on preference pairs\n", _ABOUT + "\n"]
  for group, table in zip(groups, tables, strict=True):
    page += [f"## {group.title[0].upper()}{group.title[1:]}\n", table_text.markdown_table(list(map(_printed, table)))]
  warnings = list(map(findings.as_line, risky))
  for title, said in (("Verdict", lines), ("Notes", notes), ("Warnings", warnings)):
    page += [f"## {title}\n", *(f"- {table_text.escape_markdown(line, 2000)}" for line in said), ""] if said else []
  page += ["## Recipe\n", table_text.markdown_table([{"what": name, "value": value} for name, value in recipe.items()])]
  run_dir.write_text("evaluation.csv", table_text.csv_table(every))
  run_dir.write_text("evaluation.md", "\n".join(page))
  found = {"table": every, "verdict": lines + notes, "recipe": recipe, "warnings": warnings}
  run_dir.write_json("evaluation.json", found | {"devices": run_folder.device_summary()})
  log.info("\n%s\n%s", table_text.markdown_table(list(map(_printed, every))), "\n".join(lines))
  tell(warnings)
  return str(run_dir.path)


def _printed(row: dict) -> dict:
  """A row for readers: estimate and interval in one cell."""
  shown = {name: row[name] for name in ("policy", "seeds", "examples", "steps")}
  for name in (name for name in row if f"{name}_low" in row):
    values = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
    times, digits = (100, ".1f") if name.startswith("accuracy") else (1, ".4f")
    mean, low, high = (format(times * value, digits) for value in values)
    unit = " %" if name == "accuracy" else " points" if times == 100 else ""
    shown[name.replace("_", " ")] = mean + unit + ("" if math.isnan(values[1]) else f" ({low} to {high})")
  return shown
