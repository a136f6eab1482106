"""Which part of the data to train on, how much of it, and whether that is as good: rules tried on the user's own data.

The evaluation set is cut in two halves. Rules see one half, and models that are trained on their choices are judged on
the other, and the other way round. Random sets, length-matched ones, the longest examples and full data always take
part. The answer is one sentence: a rule with a budget, random examples, or all of the data.
"""

import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.pipeline import advice
from in2core_jax.pipeline.checks import budget_of
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.judging import tell_size
from in2core_jax.pipeline.lists import shares
from in2core_jax.pipeline.retraining import Retrainer, equal_of, equal_steps
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.pipeline.settings import OTHER_POLICIES, listed, refuse, seeds_of
from in2core_jax.recommendation import plan as plans
from in2core_jax.recommendation import results
from in2core_jax.recommendation.measuring import measured
from in2core_jax.recommendation.settings import RecommendSettings
from in2core_jax.recommendation.trial import Judged, Trainings, close, judge_of, run_rungs, run_seed
from in2core_jax.report import findings
from in2core_jax.runs import run_folder
from in2core_jax.runs.progress import Progress, silent
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.selection.whitening import spread_among

log = logging.getLogger(__name__)

_LINES = 8  # that a log gets of the progress of all trainings
_DOES = "recommend's rules say themselves how they choose, and it fine-tunes by itself"
_REFUSED = (
  *("checkpoint", "select_runs", "normalize", "write", "trajectory", "score_path=projected", "fixed_seeds"),
  *("hardware", "eval_weights", *OTHER_POLICIES),
)
_OF_THE_ANSWER = ("fraction", "num_examples", "token_budget", "policy")  # which trainings do not depend on


def budgets_of(s: RecommendSettings, session: Session) -> tuple[tuple[float, ...], float]:
  """(budgets to try as shares of the pool, growing; the most that the answer may have).

  Raises:
    UserError: a budget in tokens, or nothing to try.
  """
  budget, size = budget_of(s), len(trainable_rows(session))
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


def wanted(s: RecommendSettings, session: Session) -> plans.Plan:
  """Everything that would be tried without a clock."""
  seeds, (budgets, _) = distinct_seeds(s), budgets_of(s, session)
  if len(seeds) < plans.LEAST_SEEDS:
    raise UserError(
      f"{s.as_flag('seeds')}: intervals need {plans.LEAST_SEEDS} different seeds: give two or more, as 0,1,2"
    )
  rules, size = tuple(listed(s.rules)), len(trainable_rows(session))
  return plans.Plan(rules, budgets, len(seeds), min(plans.FINALISTS, len(rules) + 1), examples=size)


def planned(judge: Retrainer, s: RecommendSettings, began: float, full: str = "") -> dict:
  """Measures how fast this machine is on a few examples, and what fits: {plan, pace}, as JSON values."""
  session = judge.session
  everything = wanted(s, session)
  trained = bool(full) and (pathlib.Path(full) / "finetune.json").exists()
  log.info("measuring the seconds of a step on a few examples")
  with silent():
    pace = measured(judge, s, everything.rules, everything.budgets[-1], began, trained)
  found = plans.fitted(everything, pace, steps_of(session, s), 60 * s.minutes)
  log.info(
    "%.3g s a step, %.3g s to judge a model, %.3g s for the hidden states of all examples. What goes first: %s",
    *(pace.step, pace.judged, pace.hidden, plans.ORDER),
  )
  return {"plan": found.as_json(), "pace": dataclasses.asdict(pace)}


def steps_of(session: Session, s: RecommendSettings) -> Callable[..., int]:
  """(share, part=1.0) -> optimiser steps of a training on a share of a part of the pool, before any set is known."""
  usable = trainable_rows(session)

  def steps(share: float, part: float = 1.0) -> int:
    pool = usable[: max(1, round(part * len(usable)))]
    of = session if part == 1 else session.with_train(pool)
    rows = usable if part == 1 else trainable_rows(of)
    return equal_steps(of, s, rows[: max(1, round(share * len(rows)))], s.equal)

  return steps


def part_of(session: Session, plan: plans.Plan) -> Session:
  """The plan's part of the pool: examples with a response, drawn by a hash of their ids; a larger part holds it."""
  if plan.part == 1:
    return session
  return session.of_rows(train=spread_among(session.splits["train"].ids, trainable_rows(session), plan.pool))


def folder_of(s: RecommendSettings, session: Session) -> run_folder.RunDir:
  """The run folder, which other minutes, rules and budgets go on in."""
  parts = ("data", "model", "finetune", "select", "run"), ("train", "eval", "test")
  identity = session.own_identity("recommend", s, *parts)
  for name in _OF_THE_ANSWER:
    identity["flags"].pop(name, None)
  return run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)


def run(
  settings: RecommendSettings, session: Session | None = None, full: str = "", judge: Retrainer | None = None
) -> str:
  """Plans, tries, decides, checks once, writes; returns the run folder. Finished trainings are kept.

  Args:
    settings: the flags.
    session: data and model; read when None.
    full: run folder of a training on all data, which may be there already; beside the run folder when empty.
    judge: of these examples (`judge_of`); made when None.
  """
  began, s = time.monotonic(), settings
  check(s)
  run_folder.RunDir.refuse_held(s.run_dir)
  session = session or open_session(s)
  judged = Judged.of(session)
  wanted(s, session)
  run_dir = folder_of(s, session)
  asked = {name: getattr(s, name) for name in ("minutes", "rules", "fractions", "budget", "equal", "seeds")}
  if run_dir.is_whole(results.FILE) and run_dir.read_json(results.FILE)["asked"] == asked:
    log.info("%s is finished already; give more --minutes to continue in it", run_dir.path)
    results.add_forms(run_dir, session, s)
    return str(run_dir.path)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.recommend --flagfile=THIS"])
  tell_size(session.splits["test"])
  advice.tell(findings.overlap_warnings(session.splits.summary["overlap"]))
  judge = judge or judge_of(session, s)
  kept = ResultCache(run_dir, told=False).get(lambda: planned(judge, s, began, full), "plan", asked)
  plan, pace = plans.Plan.from_json(kept["plan"]), plans.Pace(**kept["pace"])
  log.info("%s", plan.told())
  clock = Clock(
    *plans.on_part(plan, pace, steps_of(session, s)), asked, began + 60 * s.minutes, budgets_of(s, session)[1]
  )
  trainings = Trainings(judge.over(part_of(session, plan)), s, run_dir, judged, plan, full)
  every = max(10.0, min(60 * s.minutes, plan.seconds) / _LINES)
  with Progress(None, "rules tried", "trainings", every=every) as trainings.progress:
    outcome = tried(trainings, plan, clock)
  found = results.write(run_dir, trainings, outcome, asked)
  tell(found, run_dir, (time.monotonic() - began) / 60)
  return str(run_dir.path)


@dataclasses.dataclass(frozen=True)
class Clock:
  """What decides on how much is tried, and on what may be the answer.

  Attributes:
    pace: that was measured.
    steps_of: share of the pool -> optimiser steps.
    asked: names what is kept of the clock.
    deadline: of `time.monotonic`.
    most: share of the pool that the answer may have.
  """

  pace: plans.Pace
  steps_of: Callable[[float], int]
  asked: dict
  deadline: float
  most: float


def tried(trainings: Trainings, plan: plans.Plan, clock: Clock) -> results.Outcome:
  """The trial, its answer, and the look at the test set."""
  seeds, first = distinct_seeds(trainings.settings), plan.rules[0]
  start = time.monotonic()
  trainings.full(seeds[0])
  finalists = run_rungs(trainings, plan, seeds)
  shorter = lambda: {"plan": in_time(plan, clock, start).as_json()}  # noqa: E731
  plan = plans.Plan.from_json(trainings.cells.get(shorter, "rest", clock.asked)["plan"])
  finalists = finalists[: plan.finalists]
  used = final_seeds(trainings, plan, finalists, clock)
  decision = trainings.trial(plan).decide(finalists, plan.budgets, clock.most, plan.screening)
  closing = close(trainings, decision, used, first)
  return results.Outcome.of(trainings, plan, used, decision, closing)


def in_time(plan: plans.Plan, clock: Clock, start: float) -> plans.Plan:
  """The plan for the rest, by how long the first part took beside what was expected.

  Args:
    plan: that was begun.
    clock: what was measured before it.
    start: when it was begun.
  """
  now, steps, pace = time.monotonic(), clock.steps_of, clock.pace
  expected = plans.rung_seconds(plan, pace, steps) + pace.wholes * steps(1.0) * pace.step + pace.hidden
  slower = max(1.0, (now - start) / max(expected, 1e-9))
  scaled = {name: slower * getattr(pace, name) for name in ("step", "judged", "tested")}
  found = plans.shortened(plan, dataclasses.replace(pace, **scaled), steps, clock.deadline - now)
  if found.dropped != plan.dropped:
    log.warning("this machine is %.2g times slower than measured: also left out: %s", slower, found.left_out)
  return found


def final_seeds(trainings: Trainings, plan: plans.Plan, finalists: list[str], clock: Clock) -> tuple[int, ...]:
  """Trains the finalists at every budget, seed by seed, while there is time for the end too; the seeds that were done.

  Args:
    trainings: that there are.
    plan: of the rest.
    finalists: best first.
    clock: the time that there is.
  """
  (pace, steps), used, took = (clock.pace, clock.steps_of), [], 0.0
  for number, seed in enumerate(distinct_seeds(trainings.settings)[: plan.seeds]):
    if number >= plans.LEAST_SEEDS:
      end = plans.closing_seconds(dataclasses.replace(plan, seeds=number + 1), pace, steps)
      slower = max(1.0, took / plans.seed_seconds(plan, pace, steps))
      finish = took + slower * end
      late = lambda finish=finish: {"late": time.monotonic() + finish > clock.deadline}  # noqa: E731
      if trainings.cells.get(late, "late", clock.asked, number)["late"]:
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


def dry_run(settings: RecommendSettings, session: Session | None = None) -> plans.Plan:
  """Measures a few steps and tells the plan, without a run folder."""
  began = time.monotonic()
  check(settings)
  session = session or open_session(settings)
  Judged.of(session)
  plan = plans.Plan.from_json(planned(judge_of(session, settings), settings, began)["plan"])
  log.info("%s", plan.told())
  return plan
