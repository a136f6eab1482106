"""How often `recommend` is right: its predictions on many pools and tasks, each held against the test set.

python -m experiments.recommend.calibration --flagfile=experiments/flags/calibration.flags \
  --pools="chatterbot+jsonl:alpaca.json+jsonl:gsm8k.json" --tasks="gsm8k; psychology; alpaca; chatterbot"

A task is a source or a topic of a pool: its evaluation and test examples are asked for, the pool stays as it is. A
prediction is right if the ratio to random sets on the test set lies in its interval; an answer is safe if that ratio is
at most 1.01. Every pair has a run folder of its own, and finished ones are read. What all tasks of a pool share, hidden
states and the training on all data, is made once. `--dry_run` counts the pairs and measures how long they take.
"""

import dataclasses
import json
import logging
import pathlib
import re
import time
from collections.abc import Iterator

import numpy as np

from experiments import cli, flags
from experiments.recommend.settings import CalibrationSettings
from experiments.targets.target import label_of, labels_of
from in2core_jax.data.records import firsts
from in2core_jax.data.sources import names_of
from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation.paired import BY
from in2core_jax.evaluation.statistics import RANDOM
from in2core_jax.evaluation.tries import MARGIN
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.pipeline.settings import listed
from in2core_jax.recommendation import plan as plans
from in2core_jax.recommendation import results, run
from in2core_jax.recommendation.rules import RULES
from in2core_jax.recommendation.settings import RecommendSettings
from in2core_jax.recommendation.trial import LEAST_QUERIES, Judged, judge_of
from in2core_jax.report import table_text
from in2core_jax.report.recommendation_page import shown
from in2core_jax.runs import files
from in2core_jax.selection.whitening import spread_rows

log = logging.getLogger(__name__)


def tasks_of(session: Session, wanted: str, most: int) -> dict[str, dict[str, np.ndarray]]:
  """Label -> part -> rows: different examples of evaluation and test set.

  Args:
    session: a pool.
    wanted: --tasks; those that the pool has.
    most: examples of a part.
  """
  rows: dict[str, dict[str, list[int]]] = {}
  for part in ("eval", "test"):
    dataset = session.splits[part]
    answered = (dataset.num_response_tokens > 0) & firsts(dataset.records)
    for row in np.flatnonzero(answered):
      for label in labels_of(dataset.records[row]):
        rows.setdefault(label, {}).setdefault(part, []).append(int(row))
  found = {}
  for label in listed(wanted, ";") or sorted(rows):
    own = rows.get(label, {})
    if min((len(own.get(part, ())) for part in ("eval", "test")), default=0) >= 2 * LEAST_QUERIES:
      ids = {part: [session.splits[part].ids[row] for row in own[part]] for part in own}
      found[label] = {part: np.sort(np.array(own[part])[spread_rows(ids[part], most)]) for part in own}
  return found


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
  """A pool and its tasks.

  Attributes:
    name: of its sources, joined by +.
    folder: of its run folders.
    session: its examples; of evaluation and test set those of the tasks alone.
    tasks: label -> part -> rows of `session`.
    settings: of its recommendations.
  """

  name: str
  folder: str
  session: Session
  tasks: dict[str, dict[str, np.ndarray]]
  settings: RecommendSettings

  def task(self, label: str) -> tuple[RecommendSettings, Session]:
    """(flags, examples) of a task; what is there of hidden states serves."""
    rows = self.tasks[label]
    name = re.sub(r"\W+", "-", label)
    return self.settings.replace(run_dir=f"{self.folder}/{name}"), self.session.of_rows(**rows)

  def is_done(self) -> bool:
    """Whether every task has its answer."""
    return all((pathlib.Path(self.task(label)[0].run_dir) / results.FILE).exists() for label in self.tasks)


def pools_of(s: CalibrationSettings) -> list[Pool]:
  """Reads the pools; the weights are read once for all.

  Raises:
    UserError: no pool has one of the tasks.
  """
  own = {field.name: getattr(s, field.name) for field in dataclasses.fields(RecommendSettings)} | {"dry_run": False}
  found: list[Pool] = []
  for number, name in enumerate(listed(s.pools, ";") or [s.train_data]):
    folder = f"{s.run_dir}/pool-{number}"
    settings = RecommendSettings(**own | {"train_data": name})
    session = open_session(
      settings.replace(run_dir=f"{folder}/session"), model=found[0].session.model if found else None
    )
    tasks = tasks_of(session, s.tasks, s.task_examples)
    if not tasks:
      log.warning("%s has %d examples of none of --tasks=%s", name, 2 * LEAST_QUERIES, s.tasks)
      continue
    used = {part: np.unique(np.concatenate([rows[part] for rows in tasks.values()])) for part in ("eval", "test")}
    tasks = {
      label: {part: np.searchsorted(used[part], own) for part, own in rows.items()} for label, rows in tasks.items()
    }
    sources = "+".join(dict.fromkeys(map(label_of, names_of(session.splits["train"].records))))
    found.append(Pool(sources, folder, session.of_rows(**used), tasks, settings))
  if not found:
    raise UserError(f"--tasks={s.tasks}: no pool has {2 * LEAST_QUERIES} evaluation and test examples of one of them")
  return found


def told(pools: list[Pool], s: CalibrationSettings) -> str:
  """What is to be done, before any of it."""
  count = sum(len(pool.tasks) for pool in pools)
  lines = [
    f"{pool.name}: {how_many(len(pool.session.splits['train']), 'example')}; {', '.join(pool.tasks)}" for pool in pools
  ]
  lines.append(
    f"{how_many(count, 'recommendation')} of at most {s.minutes:g} minutes each: {count * s.minutes:.0f} minutes, and "
    f"for each of {how_many(len(pools), 'pool')} its hidden states and a training on all of it"
  )
  return "\n".join(lines)


def dry_run(pools: list[Pool], s: CalibrationSettings) -> None:
  """Measures on a few examples of the first task of each pool what a recommendation can try, and the time of all."""
  once = 0.0
  for pool in pools:
    settings, session = pool.task(next(iter(pool.tasks)))
    Judged.of(session)
    everything, judge = run.wanted(settings, session), judge_of(session, settings)
    pace = run.measured(judge, settings, everything.rules, everything.budgets[-1], time.monotonic(), False)
    hidden = pace.hidden / len(session.splits["train"]) * sum(len(pool.session.splits[part]) for part in session.splits)
    once += hidden + run.steps_of(session, settings)(1.0) * pace.step
    later = dataclasses.replace(pace, spent=30.0, hidden=0.0, wholes=pace.wholes - 1)
    plan = plans.fitted(everything, later, run.steps_of(session, settings), 60 * s.minutes)
    log.info("%s: %s", pool.name, plan.told())
  count = sum(len(pool.tasks) for pool in pools)
  log.info("about %.0f minutes in all, %.0f of them for what tasks share", count * s.minutes + once / 60, once / 60)


def pairs(pools: list[Pool]) -> Iterator[tuple[str, str, dict]]:
  """(pool, task, recommendation.json) of every pair; one that is refused, as with too few minutes, stops no other.

  Raises:
    UserError: after all others, names those that were refused.
  """
  refused = []
  for pool in pools:
    judge = judge_of(pool.session, pool.settings)
    for part in () if pool.is_done() else pool.session.splits:  # once for all tasks
      pool.session.packer(part, judge.chosen, pool.session.model.params)
      if part != "test" and any(RULES[rule].hidden for rule in listed(pool.settings.rules)):
        pool.session.hidden.pooled(part)
    for label in pool.tasks:
      settings, session = pool.task(label)
      try:
        folder = run.run(settings, session, f"{pool.folder}/full", judge.over(session))
      except UserError as error:
        log.warning("%s, %s: %s", pool.name, label, error)
        refused.append(f"{pathlib.Path(pool.folder).name}/{label}")
        continue
      yield pool.name, label, json.loads((pathlib.Path(folder) / results.FILE).read_text())
  if refused:
    raise UserError(
      f"{how_many(len(refused), 'pair[s] [was|were]')} refused: {', '.join(refused)}; start the same command on an "
      "idle machine, or give more --minutes: the others are kept"
    )


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
  chosen = [row for row in rows if row["rule"] != RANDOM]
  found = [
    f"{len(rows) - len(chosen)} of {len(rows)} answers are a random set, which no test set can show to be wrong: its "
    f"ratio to random sets is 1. The other {len(chosen)} are judged here."
  ]
  for by in BY:
    right, safe, worse = (sum(row[f"{word}, by {by}"] for row in chosen) for word in ("right", "safe", "worse"))
    found.append(
      f"By {by}: of {how_many(len(chosen), 'choice')} {right} have the test ratio inside their predicted interval, "
      f"{safe} are at most {100 * MARGIN:g} % worse than random sets on the test set, and {worse} are worse beyond "
      "their interval."
    )
  return found


def main(_) -> None:
  """Writes calibration.md and calibration.json after every pair."""
  s, rows = flags.read(CalibrationSettings, tells_costs=True), []
  pools = pools_of(s)
  log.info("%s", told(pools, s))
  if s.dry_run:
    dry_run(pools, s)
    return
  for pool, task, found in pairs(pools):
    rows.append(row_of(pool, task, found))
    text = ["# How often the recommendation is right", *summary(rows), table_text.markdown_table(rows).rstrip()]
    files.write_text(f"{s.run_dir}/calibration.md", "\n\n".join(text) + "\n")
    files.write_json(f"{s.run_dir}/calibration.json", {"summary": summary(rows), "rows": rows})
  log.info("%s", "\n".join(summary(rows)))


if __name__ == "__main__":
  flags.define(CalibrationSettings)
  cli.run(main, alone=True)
