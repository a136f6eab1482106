"""How often `recommend` is right: its predictions on many pools and tasks, each held against the test set.

python -m experiments.recommend.calibration --flagfile=experiments/flags/calibration.flags \
  --pools="chatterbot+jsonl:alpaca.json+jsonl:gsm8k.json" --tasks="gsm8k; psychology; alpaca; chatterbot"

A task is a source or a topic of a pool: its evaluation and test examples are asked for, the pool stays as it is. A
prediction is right if the ratio to random sets on the test set lies in its interval; an answer is safe if that ratio is
at most 1.01. Every pair has a run folder of its own, and finished ones are read.
"""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from experiments import cli, flags
from experiments.recommend.settings import CalibrationSettings
from experiments.targets.targets import labels_of
from in2core_jax.data.records import firsts
from in2core_jax.errors import UserError
from in2core_jax.evaluation.paired import BY
from in2core_jax.evaluation.tries import MARGIN
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.pipeline.settings import listed
from in2core_jax.recommendation import results, run
from in2core_jax.recommendation.settings import RecommendSettings
from in2core_jax.recommendation.trial import LEAST_QUERIES
from in2core_jax.report import table_text
from in2core_jax.report.recommendation_page import shown
from in2core_jax.runs import files
from in2core_jax.selection.whitening import spread_rows

log = logging.getLogger(__name__)

_MOST = 200  # evaluation, and test examples of a task


def tasks_of(bench: Session, wanted: str) -> dict[str, dict[str, np.ndarray]]:
  """Label -> part -> rows: at most `_MOST` different examples of evaluation and test set.

  Args:
    bench: a pool.
    wanted: --tasks; those that the pool has.
  """
  rows: dict[str, dict[str, list[int]]] = {}
  for part in ("eval", "test"):
    dataset = bench.splits[part]
    answered = (dataset.num_response_tokens > 0) & firsts(dataset.records)
    for row in np.flatnonzero(answered):
      for label in labels_of(dataset.records[row]):
        rows.setdefault(label, {}).setdefault(part, []).append(int(row))
  found = {}
  for label in listed(wanted, ";") or sorted(rows):
    own = rows.get(label, {})
    if min((len(own.get(part, ())) for part in ("eval", "test")), default=0) >= 2 * LEAST_QUERIES:
      ids = {part: [bench.splits[part].ids[row] for row in own[part]] for part in own}
      found[label] = {part: np.sort(np.array(own[part])[spread_rows(ids[part], _MOST)]) for part in own}
  return found


def of_task(bench: Session, rows: dict[str, np.ndarray]) -> Session:
  """The pool with the evaluation and test examples of a task; hidden states stay those of all."""
  parts = {part: bench.splits[part].take(own) for part, own in rows.items()}
  hidden = bench.hidden
  for part, own in rows.items():
    hidden = hidden.with_rows(part, own)
  return dataclasses.replace(bench, splits=bench.splits.with_parts(**parts), hidden=hidden)


def pairs(s: CalibrationSettings) -> Iterator[tuple[str, str, dict]]:
  """(pool, task, recommendation.json) of every pair."""
  own = {field.name: getattr(s, field.name) for field in dataclasses.fields(RecommendSettings)}
  count = 0
  for number, pool in enumerate(listed(s.pools, ";") or [s.train_data]):
    settings = RecommendSettings(**own | {"train_data": pool})
    bench = open_session(settings.replace(run_dir=f"{s.run_dir}/pool-{number}/session"))
    for task, rows in tasks_of(bench, s.tasks).items():
      name = re.sub(r"\W+", "-", task)
      one = settings.replace(run_dir=f"{s.run_dir}/pool-{number}/{name}")
      folder = run.run(one, of_task(bench, rows))
      count += 1
      yield pool, task, json.loads((pathlib.Path(folder) / results.FILE).read_text())
  if not count:
    raise UserError(f"--tasks={s.tasks}: no pool has {2 * LEAST_QUERIES} evaluation and test examples of one of them")


def row_of(pool: str, task: str, found: dict) -> dict:
  """A row of the table."""
  line = {"pool": pool, "task": task, "rule": found["rule"], "budget": f"{100 * found['budget']:.3g} %"}
  for by in BY:
    predicted, tested = (found[part]["ratio_to_random"][by] for part in ("validation", "test"))
    line |= {f"predicted, by {by}": shown(predicted), f"test, by {by}": shown(tested)}
    line[f"right, by {by}"] = predicted["low"] <= tested["estimate"] <= predicted["high"]
    line[f"safe, by {by}"] = tested["estimate"] <= 1 + MARGIN
    line[f"worse, by {by}"] = tested["low"] > 1 + MARGIN
  return line


def summary(rows: list[dict]) -> list[str]:
  """How often it was right, in sentences."""
  found, size = [], len(rows)
  for by in BY:
    right, safe, worse = (sum(row[f"{word}, by {by}"] for row in rows) for word in ("right", "safe", "worse"))
    found.append(
      f"By {by}: of {size} recommendations {right} have the test ratio inside their predicted interval, {safe} are at "
      f"most {100 * MARGIN:g} % worse than random sets on the test set, and {worse} are worse beyond their interval."
    )
  return found


def main(_) -> None:
  """Writes calibration.md and calibration.json after every pair."""
  s, rows = flags.read(CalibrationSettings), []
  for pool, task, found in pairs(s):
    rows.append(row_of(pool, task, found))
    text = ["# How often the recommendation is right", *summary(rows), table_text.markdown_table(rows).rstrip()]
    files.write_text(f"{s.run_dir}/calibration.md", "\n\n".join(text) + "\n")
    files.write_json(f"{s.run_dir}/calibration.json", {"summary": summary(rows), "rows": rows})
  log.info("%s", "\n".join(summary(rows)))


if __name__ == "__main__":
  flags.define(CalibrationSettings)
  cli.run(main, alone=True)
