"""Which part of the data to train on, how much of it, and whether that is as good: rules tried on the user's own data.

The evaluation set is cut in two halves. Rules see one half, and models that are trained on their choices are judged on
the other, and the other way round. Random sets, length-matched ones, the longest examples and full data always take
part. The answer is one sentence: a rule with a budget, random examples, or all of the data.
"""

import dataclasses
import logging
import time

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.pipeline.checks import budget_of
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.judging import tell_size
from in2core_jax.pipeline.lists import shares
from in2core_jax.pipeline.retraining import equal_of, equal_steps
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.pipeline.settings import OTHER_POLICIES, listed, refuse, seeds_of
from in2core_jax.recommendation import plan as plans
from in2core_jax.recommendation import results
from in2core_jax.recommendation.settings import RecommendSettings
from in2core_jax.recommendation.trial import Judged, Trainings, close, run_rungs, run_seed
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

_DOES = "recommend's rules say themselves how they choose, and it fine-tunes by itself"
_REFUSED = (
  *("checkpoint", "select_runs", "normalize", "write", "trajectory", "score_path=projected", "fixed_seeds"),
  *("hardware", *OTHER_POLICIES),
)
_OF_THE_ANSWER = ("fraction", "num_examples", "token_budget", "policy")  # which trainings do not depend on


def budgets_of(s: RecommendSettings, bench: Session) -> tuple[tuple[float, ...], float]:
  """(budgets to try as shares of the pool, growing; the most that the answer may have).

  Raises:
    UserError: a budget in tokens, or nothing to try.
  """
  budget, size = budget_of(s), len(trainable_rows(bench))
  if budget.token_budget:
    raise UserError(f"{s.as_flag('budget')}: recommend takes a share such as 0.1, or a number of examples such as 500")
  most = budget.fraction or budget.limit(np.ones(size)) / size
  found = [share for share in shares(s.fractions, "fractions") if share < most and round(share * size) >= 1]
  found += [most] if most < 1 else []
  if not found:
    raise UserError(
      f"{s.as_flag('fractions')} names no budget below {most:g} of {size:,} examples: give some, such as 0.1,0.25"
    )
  return tuple(found), most


def check(s: RecommendSettings) -> None:
  """Refuses what flags alone tell, before the data are read.

  Raises:
    UserError: flags that would be passed over, lists that cannot be read, more than one word of --equal.
  """
  refuse(s, _REFUSED, _DOES)
  seeds_of(s), shares(s.fractions, "fractions"), budget_of(s)
  if len(equal_of(s)) != 1:
    raise UserError(f"{s.as_flag('equal')}: one word here, such as --equal=epochs or --equal=tokens")


def distinct_seeds(s: RecommendSettings) -> tuple[int, ...]:
  """Each seed once, in the given order."""
  return tuple(dict.fromkeys(seeds_of(s)[0]))


def wanted(s: RecommendSettings, bench: Session) -> plans.Plan:
  """Everything that would be tried without a clock."""
  seeds, (budgets, _) = distinct_seeds(s), budgets_of(s, bench)
  if len(seeds) < plans.LEAST_SEEDS:
    raise UserError(
      f"{s.as_flag('seeds')}: intervals need {plans.LEAST_SEEDS} different seeds: give two or more, as 0,1,2"
    )
  rules = tuple(listed(s.rules))
  return plans.Plan(rules, budgets, len(seeds), min(plans.FINALISTS, len(rules) + 1))


def planned(trainings: Trainings, began: float) -> dict:
  """Measures how fast this machine is, and what fits: {plan, pace}, as JSON values."""
  s, bench = trainings.settings, trainings.bench
  everything = wanted(s, bench)
  pace = trainings.pace(began, everything.rules)
  found = plans.fitted(everything, pace, steps_of(trainings), 60 * s.minutes)
  log.info("%.3g s a step, %.3g s to judge a model. What goes first: %s", pace.step, pace.judged, plans.ORDER)
  return {"plan": found.as_json(), "pace": dataclasses.asdict(pace)}


def steps_of(trainings: Trainings):
  """Share of the pool -> optimiser steps of a training on it, before any set is known."""
  usable = trainable_rows(trainings.bench)
  s = trainings.settings
  return lambda share: equal_steps(trainings.bench, s, usable[: max(1, round(share * len(usable)))], s.equal)


def run(settings: RecommendSettings, bench: Session | None = None) -> str:
  """Plans, tries, decides, checks once, writes; returns the run folder. Finished trainings are kept."""
  began, s = time.monotonic(), settings
  check(s)
  run_folder.RunDir.refuse_held(s.run_dir)
  bench = bench or open_session(s)
  judged = Judged.of(bench)
  wanted(s, bench)
  identity = bench.identity("recommend", s, ("data", "model", "finetune", "select", "run"), ("train", "eval", "test"))
  for name in _OF_THE_ANSWER:
    identity["flags"].pop(name, None)
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  asked = {name: getattr(s, name) for name in ("minutes", "rules", "fractions", "budget", "equal", "seeds")}
  if run_dir.is_whole(results.FILE) and run_dir.read_json(results.FILE)["asked"] == asked:
    log.info("%s is finished already; more --minutes goes on in it", run_dir.path)
    return str(run_dir.path)
  bench.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.recommend --flagfile=THIS"])
  tell_size(bench.splits["test"])
  trainings = Trainings(bench, s, run_dir, judged, budgets_of(s, bench)[0][-1])
  kept = trainings.cells.get(lambda: planned(trainings, began), "plan", asked)
  plan, pace = plans.Plan.from_json(kept["plan"]), plans.Pace(**kept["pace"])
  log.info("%s", plan.told())
  found = results.write(run_dir, trainings, tried(trainings, plan, pace, asked, began), asked)
  tell(found, run_dir, (time.monotonic() - began) / 60)
  return str(run_dir.path)


def tried(trainings: Trainings, plan: plans.Plan, pace: plans.Pace, asked: dict, began: float) -> results.Outcome:
  """The trial, its answer, and the look at the test set."""
  s, seeds = trainings.settings, distinct_seeds(trainings.settings)
  first, deadline = plan.rules[0], began + 60 * s.minutes
  start = time.monotonic()
  trainings.full(seeds[0])
  finalists = run_rungs(trainings, plan, seeds)
  shorter = lambda: {"plan": in_time(trainings, plan, pace, start, deadline).as_json()}  # noqa: E731
  plan = plans.Plan.from_json(trainings.cells.get(shorter, "rest", asked)["plan"])
  finalists = finalists[: plan.finalists]
  used = final_seeds(trainings, plan, pace, finalists, asked, deadline)
  decision = trainings.trial(plan).decide(finalists, plan.budgets, budgets_of(s, trainings.bench)[1])
  closing = close(trainings, decision, used, first)
  return results.Outcome.of(trainings, plan, used, decision, closing)


def in_time(trainings: Trainings, plan: plans.Plan, pace: plans.Pace, start: float, deadline: float) -> plans.Plan:
  """The plan for the rest, by how long the first part took beside what was expected.

  Args:
    trainings: that there are.
    plan: that was begun.
    pace: that was measured before it.
    start: when it was begun. deadline: when all is to be done.
  """
  now, steps = time.monotonic(), steps_of(trainings)
  expected = plans.rung_seconds(plan, pace, steps) + 2 * steps(1.0) * pace.step
  slower = max(1.0, (now - start) / max(expected, 1e-9))
  scaled = {name: slower * getattr(pace, name) for name in ("step", "judged", "tested")}
  found = plans.shortened(plan, dataclasses.replace(pace, **scaled), steps, deadline - now)
  if found.dropped != plan.dropped:
    log.warning("this machine is %.2g times slower than measured: also left out: %s", slower, found.left_out)
  return found


def final_seeds(
  trainings: Trainings, plan: plans.Plan, pace: plans.Pace, finalists: list[str], asked: dict, deadline: float
) -> tuple[int, ...]:
  """Trains the finalists at every budget, seed by seed, while there is time for the end too; the seeds that were done.

  Args:
    trainings: that there are.
    plan: of the rest.
    pace: that was measured.
    finalists: best first.
    asked: names what is kept of the clock.
    deadline: of `time.monotonic`.
  """
  steps, used, took = steps_of(trainings), [], 0.0
  for number, seed in enumerate(distinct_seeds(trainings.settings)[: plan.seeds]):
    if number >= plans.LEAST_SEEDS:
      end = plans.closing_seconds(dataclasses.replace(plan, seeds=number + 1), pace, steps)
      slower = max(1.0, took / plans.seed_seconds(plan, pace, steps))
      late = lambda took=took, end=slower * end: {"late": time.monotonic() + took + end > deadline}  # noqa: E731
      if trainings.cells.get(late, "late", asked, number)["late"]:
        break
    start = time.monotonic()
    run_seed(trainings, plan, finalists, seed)
    used.append(seed)
    took = time.monotonic() - start
  return tuple(used)


def tell(found: dict, run_dir: run_folder.RunDir, minutes: float) -> None:
  """The sentence, the check, what it would take to know more, the next command."""
  for line in found["warnings"]:
    log.warning("%s", line)
  log.info(
    "\n%s\n%s %s\ntrain: %s\n%.1f minutes; open %s",
    found["sentence"],
    found["checked"],
    found["to_know_more"]["sentence"],
    found["train"],
    minutes,
    run_dir.path / "recommendation.html",
  )


def dry_run(settings: RecommendSettings, bench: Session | None = None) -> plans.Plan:
  """Measures a few steps and tells the plan, without a run folder."""
  began = time.monotonic()
  check(settings)
  bench = bench or open_session(settings)
  trainings = Trainings(bench, settings, None, Judged.of(bench), budgets_of(settings, bench)[0][-1])
  plan = plans.Plan.from_json(planned(trainings, began)["plan"])
  log.info("%s", plan.told())
  return plan
