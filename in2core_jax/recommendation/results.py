"""What `recommend` writes: the sentence, recommendation.json, coreset.jsonl, the page, how to train on the choice."""

import collections
import dataclasses
import math
import shlex

import numpy as np

from in2core_jax.data.records import Raws, raw_lines
from in2core_jax.errors import how_many
from in2core_jax.evaluation import tries, verdict
from in2core_jax.evaluation.paired import BY, Estimate
from in2core_jax.evaluation.statistics import FULL, RANDOM, Interval
from in2core_jax.evaluation.tries import DISTINCT, LONGEST, MARGIN, MATCHED, WHOLE
from in2core_jax.pipeline import select_outputs
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.train_elsewhere import recipe_elsewhere, write_train_with
from in2core_jax.recommendation.plan import ORDER, Plan
from in2core_jax.recommendation.rules import ABOUT, RULES
from in2core_jax.recommendation.settings import RecommendSettings
from in2core_jax.recommendation.trial import TWIN, Closing, Trainings
from in2core_jax.report import findings, recommendation_page
from in2core_jax.runs import files
from in2core_jax.runs.run_folder import RunDir

FILE = "recommendation.json"
_FEW_STEPS = 10  # of the optimiser, below which a warm-up of the learning rate is much of a training
_MORE_SEEDS = 4  # times as many, which halve what the spread of the trainings hides
_FEW = 10  # degrees of freedom, below which an interval of many comparisons is very wide
_CHOSEN_BY = {MATCHED: "random ones with the response lengths of the first rule's choice", LONGEST: "the longest ones"}


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
  """All that the reports are made of.

  Attributes:
    settings: the flags.
    plan: what was tried.
    seeds: of the finalists, as many as there was time for.
    trial: on the evaluation set. test: on the test set.
    decision: the answer.
    closing: what it is held against.
    sizes: (rule, budget) -> (examples, steps).
    seeds_of: (rule, budget) -> seeds that were trained.
    pool: examples with a response.
    worth: perplexity by example after the training on all data over that before it; NaN: not known.
  """

  settings: RecommendSettings
  plan: Plan
  seeds: tuple[int, ...]
  trial: tries.Trial
  test: tries.Trial
  decision: tries.Decision
  closing: Closing
  sizes: dict
  seeds_of: dict
  pool: int
  worth: float = math.nan

  @classmethod
  def of(cls, trainings: Trainings, plan: Plan, seeds: tuple[int, ...], decision, closing: Closing) -> "Outcome":
    """Of finished trainings."""
    seeds_of = {name: sorted(own) for name, own in trainings.losses.items()}
    pool, trials = len(trainings.chooser.usable), (trainings.trial(plan), trainings.test_trial())
    found = trainings.sizes, seeds_of, pool, trainings.worth
    return cls(trainings.settings, plan, seeds, *trials, decision, closing, *found)


# ---- sentences -------------------------------------------------------------------------


def sentence(outcome: Outcome) -> str:
  """The answer: which examples, how many, and what they are worth; ratios are by example."""
  rule, trial, name = outcome.decision.rule, outcome.trial, outcome.closing.name
  if _gains_nothing(outcome):
    why = f"training on all of the data leaves {outcome.worth:.3f} times the perplexity of the model before it"
    return f"Cannot tell: {why}. Take random examples, or try again with more epochs or a higher learning rate."
  if rule in WHOLE:
    return _whole_sentence(outcome)
  count, tried = len(outcome.closing.rows), len(outcome.plan.tried)
  part = f"{count:,} of {outcome.pool:,} examples ({100 * count / outcome.pool:.2g} %){_of_the_whole(outcome)}"
  to_full = _times(trial.ratio(name, (FULL, 1.0), "example"), "all of the data")
  lost = f"no more than {100 * MARGIN:g} % is lost" if outcome.decision.enough else "all of the data may be better"
  if rule == RANDOM:
    none = f"none of {how_many(tried, 'rule')} is reliably better than random sets of that size"
    return f"Take {part} at random, without duplicates: {none}, and their perplexity is {to_full}, so {lost}."
  chosen = _CHOSEN_BY.get(rule, f"those that {rule} chooses")
  to_random = _times(trial.ratio(name, outcome.closing.random, "example"), "random sets of that size")
  return f"Train on {part}, {chosen}: their perplexity is {to_random} and {to_full}, so {lost}."


def _gains_nothing(outcome: Outcome) -> bool:
  """Whether training on all of the data leaves the evaluation examples where they were; False where nobody knows."""
  return outcome.worth > 1 - MARGIN


def _of_the_whole(outcome: Outcome) -> str:
  whole = outcome.plan.examples
  return "" if outcome.plan.part == 1 else f", which were drawn at random from all {whole:,}"


def _whole_sentence(outcome: Outcome) -> str:
  rule, trial, decision = outcome.decision.rule, outcome.trial, outcome.decision
  count, largest = len(outcome.closing.rows), max(decision.winners)
  best = (decision.winners[largest], largest)
  said = f"Use all {how_many(count, 'example')}{_of_the_whole(outcome)}"
  if rule == DISTINCT:
    said += f", each once, for the other {how_many(outcome.pool - count, '[is a duplicate|are duplicates]')}"
  of_best = _times(trial.ratio(best, (FULL, 1.0), "example"), "all of the data")
  said += (
    f": no smaller set that was tried is reliably within {100 * MARGIN:g} % of them, and the perplexity of the best "
    f"{100 * largest:g} %, by {best[0]}, is {of_best}{_how_far(outcome, best)}"
  )
  useful = [budget for budget, found in decision.beats.items() if found]
  if not useful:
    return f"{said}; for a smaller set take random examples, as no rule is reliably better."
  name = (decision.winners[useful[0]], useful[0])
  ratio = _times(trial.ratio(name, (RANDOM, useful[0]), "example"), "random sets of that size")
  return f"{said}; for a smaller set, that of {name[0]} at {100 * useful[0]:g} % is {ratio}."


def _how_far(outcome: Outcome, name: tries.Name) -> str:
  """What a set gains of what all of the data gains, as log perplexity, and in how many steps, where these differ."""
  (_, steps), (_, every) = outcome.sizes[name], outcome.sizes[FULL, 1.0]
  lost = math.log(outcome.trial.ratio(name, (FULL, 1.0), "example").mean)
  gained = 1 + lost / math.log(outcome.worth) if outcome.worth < 1 else math.nan
  said = "" if math.isnan(gained) else f", so it has {100 * gained:.0f} % of the gain in log perplexity"
  return said if steps == every else f"{said}, after {how_many(steps, 'optimiser step')} beside {every:,}"


def _times(ratio: Interval, what: str) -> str:
  shown = lambda value: f"{value:.3f}" if value < 10 else f"{value:.3g}"  # noqa: E731
  bounds = "" if ratio.low == ratio.high or math.isnan(ratio.low) else f" ({shown(ratio.low)} to {shown(ratio.high)})"
  return f"{shown(ratio.mean)} times that of {what}{bounds}"


def _said(ratio: Interval) -> str:
  return f"{ratio.mean:.3f}" if ratio.low == ratio.high else verdict.shown(ratio)


def checked(outcome: Outcome) -> str:
  """The one look at the test set, beside what was predicted."""
  closing, what = outcome.closing, "random sets"
  if closing.name[0] == RANDOM:
    pair, predicted, what = (closing.name, (FULL, 1.0)), (closing.tested, (FULL, 1.0)), "all of the data"
    found, expected = outcome.test.ratio(*predicted, "example"), outcome.trial.ratio(*pair, "example")
  else:
    found = outcome.test.ratio(closing.tested, closing.random, "example")
    expected = outcome.trial.ratio(closing.name, closing.random, "example")
  return f"On the test set, used only once, the ratio to {what} is {_said(found)}; predicted was {expected.mean:.3f}."


def compared(outcome: Outcome) -> tuple[Estimate, float, int]:
  """The comparison whose sharpness is told, its level, its seeds: of the answer, or of the best that was tried."""
  decision, trial = outcome.decision, outcome.trial
  name, other = outcome.closing.name, outcome.closing.random
  if decision.rule in (*WHOLE, RANDOM):
    budget = outcome.plan.screening
    name, other = (trial.ranked(outcome.plan.tried, budget)[0], budget), (RANDOM, budget)
  return trial.estimate(name, other, "example"), trial.level_of(name[0]), len(outcome.seeds_of[name])


def to_know_more(outcome: Outcome) -> dict:
  """What these evaluation examples and seeds can see, and what more of that would see which limits it; a sentence."""
  estimate, level, seeds = compared(outcome)
  if estimate.note:
    return {"sentence": f"There is no interval: {estimate.note}.", "examples": estimate.count}
  seen, more, then = tries.to_know_more(estimate, level)
  more, by_seeds = verdict.rounded(more), tries.sees(estimate, 1.0, level, _MORE_SEEDS)
  facts = {"examples": estimate.count, "sees": math.expm1(seen), "more_examples": more, "would_see": math.expm1(then)}
  facts |= {"seeds": seeds, "more_seeds": _MORE_SEEDS * seeds, "would_see_by_seeds": math.expm1(by_seeds)}
  if tries.sees(estimate, 1e6, level) > seen / 2:  # however many examples there were
    said = f"{estimate.count:,} evaluation examples and {how_many(seeds, 'seed')} see {verdict.percent(seen)}"
    said += f"; {_MORE_SEEDS * seeds} seeds would see {verdict.percent(by_seeds)} (--seeds, and more --minutes)"
  else:
    said = f"{estimate.count:,} evaluation examples see {verdict.percent(seen)}"
    said += f"; {more:,} would see {verdict.percent(then)}" if more > 1.2 * estimate.count else ""
  return {"sentence": f"{said}."} | facts


def warnings(outcome: Outcome) -> list[str]:
  """What to mind of the answer."""
  found = []
  if _gains_nothing(outcome):
    found.append(
      f"Training on all of the data leaves the evaluation examples at {outcome.worth:.3f} times the perplexity of the "
      "model before it. Such trainings cannot show a difference between sets: give more --epochs, a higher "
      "--learning_rate, or data that is closer to the evaluation set."
    )
  if outcome.plan.dropped:
    found.append(f"Left out to keep {outcome.settings.minutes:g} minutes: {outcome.plan.left_out}.")
  if outcome.plan.part < 1:
    found.append(_how_for_all(outcome))
  if len(outcome.seeds) < outcome.plan.seeds:
    found.append(f"There was time for {len(outcome.seeds)} of {outcome.plan.seeds} seeds.")
  found += _too_few_steps(outcome)
  (estimate, _, _), closing = compared(outcome), outcome.closing
  if estimate.examples_freedom < _FEW:
    found.append(
      f"The {estimate.count:,} evaluation examples say as much as {estimate.examples_freedom + 1:.0f} equal ones: "
      "many are copies or of one topic, or a few long responses decide. Give more different ones."
    )
  if closing.name[0] not in (*WHOLE, RANDOM, MATCHED) and not outcome.trial.beats(closing.name, closing.twin):
    ratio = _said(outcome.trial.ratio(closing.name, closing.twin, "example"))
    found.append(f"Against random sets of its response lengths the ratio is {ratio}: its gain may be one of length.")
  return found


def _too_few_steps(outcome: Outcome) -> list[str]:
  """That sets were judged by trainings of a few steps."""
  budget = outcome.plan.budgets[0]
  (_, steps), (_, every) = outcome.sizes[RANDOM, budget], outcome.sizes[FULL, 1.0]
  if steps >= min(_FEW_STEPS, every):
    return []
  return [
    f"A training on {100 * budget:g} % has {how_many(steps, 'optimiser step')}, on all of the data {every:,}: so few "
    "leave the model nearly as it was, whatever the set. Give more --epochs, a smaller --batch_size or larger "
    "--fractions."
  ]


def _how_for_all(outcome: Outcome) -> str:
  """What to do where a part of the pool was tried."""
  plan, (rule, share) = outcome.plan, outcome.closing.name
  minutes = math.ceil(plan.all_minutes)
  said = (
    f"coreset.jsonl has examples of the {plan.pool:,} that took part. --minutes={minutes} takes all {plan.examples:,}"
  )
  if rule in RULES and not RULES[rule].trained:  # a trained rule scores at a model of all of them, which nobody has
    flags = f"--policy={RULES[rule].policy} --layers={outcome.settings.layers} --budget={share:g}"
    said += f"; ./run.sh select {flags}, with the same data and model, chooses from all of them now"
  return f"{said}."


# ---- JSON ------------------------------------------------------------------------------


def _interval(ratio: Interval) -> dict:
  numbers = {"estimate": ratio.mean, "low": ratio.low, "high": ratio.high}
  return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def _ratios(trial: tries.Trial, name: tries.Name, other: tries.Name) -> dict:
  return {by: _interval(trial.ratio(name, other, by)) for by in BY}


def against(trial: tries.Trial, name: tries.Name, closing: Closing) -> dict:
  """The ratios of the answer."""
  others = {"random": closing.random, "length_matched": closing.twin, "full": (FULL, 1.0)}
  return {f"ratio_to_{word}": _ratios(trial, name, other) for word, other in others.items()}


def candidates(outcome: Outcome) -> list[dict]:
  """A row for each candidate: its seeds, its ratios with corrected intervals on the folds."""
  found = []
  for name in outcome.trial.names:
    rule, budget = name
    if rule == TWIN:
      continue
    random = (RANDOM, budget if (RANDOM, budget) in outcome.trial.names else max(outcome.plan.budgets))
    examples, steps = outcome.sizes[name]
    row = {"rule": rule, "budget": budget, "examples": examples, "steps": steps, "seeds": outcome.seeds_of[name]}
    row["level"] = outcome.trial.level_of(rule)
    row |= {f"ratio_to_{word}": _ratios(outcome.trial, name, other) for word, other in _yardsticks(random).items()}
    if (MATCHED, budget) in outcome.trial.names:
      row["ratio_to_length_matched"] = _ratios(outcome.trial, name, (MATCHED, budget))
    found.append(row)
  return found


def _yardsticks(random: tries.Name) -> dict[str, tries.Name]:
  return {"random": random, "full": (FULL, 1.0)}


def as_json(outcome: Outcome, asked: dict) -> dict:
  """recommendation.json."""
  closing, decision, trial = outcome.closing, outcome.decision, outcome.trial
  correction = tries.CORRECTION.format(tries=trial.tries, first=trial.first, level=trial.level)
  return {
    "sentence": sentence(outcome),
    "checked": checked(outcome),
    "rule": decision.rule,
    "budget": decision.budget,
    "examples": len(closing.rows),
    "minutes": outcome.settings.minutes,
    "enough": decision.enough,
    "validation": against(trial, closing.name, closing),
    "test": against(outcome.test, closing.tested, closing),
    "candidates": candidates(outcome),
    "winners": [{"budget": budget, "rule": rule} for budget, rule in decision.winners.items()],
    "compared_with": {"random_budget": closing.random[1], "margin_to_full": MARGIN},
    "correction": {"method": correction, "tries": trial.tries, "level": trial.level, "of_the_test": tries.LEVEL},
    "to_know_more": to_know_more(outcome),
    "warnings": warnings(outcome),
    "plan": outcome.plan.as_json() | {"order": ORDER},
    "seeds": list(outcome.seeds),
    "asked": asked,
  }


# ---- files -----------------------------------------------------------------------------

HELD_OUT = {"eval": "evaluation.jsonl", "test": "test.jsonl"}  # what the command that trains on the choice looks at


def as_trained(outcome: Outcome) -> RecommendSettings:
  """The flags with the epochs of the answer's trainings, whatever --equal and --steps were."""
  s = outcome.settings
  if s.equal == "epochs" and not s.steps:
    return s
  _, steps = outcome.sizes[outcome.closing.tested]
  return s.replace(steps=0, epochs=steps * s.batch_size / len(outcome.closing.rows))


def train_line(s: Settings) -> str:
  """The command that trains on the choice, with the recipe of the trial; it holds out what the trial held out."""
  folder = s.run_dir.rstrip("/")
  own = ("model", "data_fields", "max_length", "system_prompt", "trainable", "trainable_layers", "trainable_modules")
  own += ("lora_rank", "learning_rate", "epochs", "batch_size", "warmup_ratio", "weight_decay", "max_grad_norm")
  own += ("loss_reduction", "template_date", "dtype", "seed")
  flags = [s.as_flag(name) for name in own if s.is_set(name) or s.has_own_default(name)]
  data = [f"--train_data=jsonl:{folder}/coreset.jsonl"]
  data += [f"--{part}_data=jsonl:{folder}/{file}" for part, file in HELD_OUT.items()]
  return shlex.join(["./run.sh", "finetune", *data, f"--run_dir={folder}-trained", *flags])


def write_held_out(run_dir: RunDir, session: Session, rows: np.ndarray) -> None:
  """Evaluation and test examples as they were read, without copies of what was chosen."""
  train = session.splits["train"].records
  chosen = {train[row].content_key for row in rows}
  for part, file in HELD_OUT.items():
    records = session.splits[part].records
    others = [row for row, record in enumerate(records) if record.content_key not in chosen]
    run_dir.write_text(file, raw_lines(records, others))


def add_forms(run_dir: RunDir, session: Session, s: RecommendSettings) -> None:
  """What a finished run is asked for besides and does not have (--coreset_format)."""
  train = session.splits["train"]
  lines = collections.Counter(run_dir.read_bytes("coreset.jsonl").split(b"\n"))  # a text may hold other line breaks
  selected = np.zeros(len(train), bool)
  for row, raw in enumerate(map(files.text_bytes, Raws(train.records))):  # copies are alike in every form
    selected[row] = lines[raw] > 0
    lines[raw] -= 1
  select_outputs.write_forms(run_dir, train, {"selected": selected}, s)


def write(run_dir: RunDir, trainings: Trainings, outcome: Outcome, asked: dict) -> dict:
  """Everything; recommendation.json last, which marks the run as done."""
  session, s, rows = trainings.session, as_trained(outcome), np.sort(outcome.closing.rows)
  train, selected = session.splits["train"], np.isin(np.arange(len(session.splits["train"])), rows)
  found = as_json(outcome, asked) | {"train": train_line(s)}
  found["warnings"] = [*findings.overlap_warnings(session.splits.summary["overlap"]), *found["warnings"]]
  run_dir.write_text("coreset.jsonl", raw_lines(train.records, rows))
  write_held_out(run_dir, session, rows)
  select_outputs.write_sources(run_dir, train, selected)
  select_outputs.write_forms(run_dir, train, {"selected": selected}, s)
  write_train_with(run_dir, session, s, rows, recipe_elsewhere(s, session), ("recommend", found["train"]))
  run_dir.write_text("recommendation.html", recommendation_page.page(found, ABOUT))
  run_dir.write_json(FILE, found)
  return found
