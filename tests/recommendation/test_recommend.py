"""The recommendation: folds, plan, correction, decision, what is written; and the command on a small real slice."""

import dataclasses
import gc
import json
import math
import pathlib
import re
import types

import jax
import numpy as np
import pytest
from tiny import CONFIG, Killed, open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

import in2core_jax as i2c
from experiments import demo
from experiments import settings as demo_flags
from experiments.recommend import calibration
from in2core_jax.errors import UserError
from in2core_jax.evaluation import tries
from in2core_jax.evaluation.statistics import FULL, RANDOM
from in2core_jax.evaluation.tries import LONGEST, MATCHED
from in2core_jax.parallel import sharding
from in2core_jax.pipeline import finetune
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.recommendation import plan as plans
from in2core_jax.recommendation import results, run, trial
from in2core_jax.recommendation.settings import RecommendSettings
from in2core_jax.recommendation.trial import TWIN, Closing, Judged
from in2core_jax.report import recommendation_page
from in2core_jax.runs import files
from in2core_jax.runs.run_folder import RunDir

RULES = ("hybrid", "bm25", "rds", "matching", "proponents")


# ---- folds -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_copies_stay_together_and_folds_are_of_one_size(seed):
  groups = np.repeat(np.arange(30), [7, 5, *[1] * 20, *[2] * 8])
  fold = tries.folds_of(groups, seed)
  assert all(len(set(fold[groups == group])) == 1 for group in range(30))
  assert abs(np.bincount(fold)[0] - np.bincount(fold)[1]) <= 1 and set(fold) == {0, 1}


@dataclasses.dataclass
class FewExamples:
  records: list
  num_response_tokens: np.ndarray

  def __len__(self):
    return len(self.records)


def test_another_seed_deals_other_folds_and_too_few_examples_are_refused(monkeypatch):
  assert np.any(tries.folds_of(np.arange(40), 0) != tries.folds_of(np.arange(40), 1))
  assert np.all(tries.folds_of(np.arange(40), 3) == tries.folds_of(np.arange(40), 3))
  with pytest.raises(UserError, match="5 evaluation examples, 1 different"):
    tries.folds_of(np.zeros(5), 0)
  said = [{"role": "assistant", "content": "yes"}]
  record = types.SimpleNamespace(messages=said, content_key="a")
  few = FewExamples([record] * 3, np.array([1, 0, 1]))
  monkeypatch.setattr(
    trial, "test_examples", lambda _: types.SimpleNamespace(tokens=np.ones(2), groups=np.zeros(2, int))
  )
  session = types.SimpleNamespace(splits={"eval": few}, settings=types.SimpleNamespace(max_length=9))
  with pytest.raises(
    UserError, match="has 1 different example with a response; 1 more have none within --max_length=9"
  ):
    Judged.of(session)


# ---- the correction, under a known truth -------------------------------------------------


def drawn_trial(rng, better=0.0, size=80, rules=8, seeds=3, budgets=(0.1, 0.2), spread=0.02, suited=0.12):
  """A whole trial of rules that are as good as random sets, but for the first, which is `better` nats lower.

  Each rule suits some examples and not others, each training is lucky, and luckier on some examples; rules are halved
  by what they show, and the finalists trained on with the same examples.
  """
  base, tokens = rng.normal(2, 1, size), np.maximum(np.exp(rng.normal(3, 0.8, size)), 1.0)
  suits = {rule: rng.normal(0, suited, size) - better * (rule == 0) for rule in range(rules)}
  luck = lambda far: rng.normal(0, far) + rng.normal(0, 0.08, size)  # noqa: E731
  of = lambda rule: base + suits.get(rule, 0.0) + luck(spread if rule == RANDOM else 0.01)  # noqa: E731
  losses = {(RANDOM, 0.1): [of(RANDOM)], (FULL, 1.0): [of(FULL) - 0.2]} | {(rule, 0.1): [of(rule)] for rule in suits}
  trial = lambda tried=1: tries.Trial({n: np.stack(o) for n, o in losses.items()}, tokens, None, tried, 0)  # noqa: E731
  finalists = trial().ranked(list(suits), 0.1)[:2]
  for budget in budgets:
    for rule in (RANDOM, *finalists):
      own = losses.setdefault((rule, budget), [])
      own += [of(rule) for _ in range(seeds - len(own))]
  return trial(rules), finalists, budgets


MANY = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
  ("draws", "shape"),
  [
    (60, {}),
    pytest.param(600, {}, **MANY),
    pytest.param(200, {"size": 40, "rules": 5, "budgets": (0.1,)}, **MANY),
    # the trainings decide, and random sets spread four times as far as rules
    pytest.param(400, {"size": 40, "spread": 0.04, "suited": 0.02}, **MANY),
  ],
)
def test_rules_that_are_as_good_as_random_sets_are_rarely_called_better(draws, shape):
  """And the first rule's intervals hold the truth, as often as their level says."""
  rng, false, held = np.random.default_rng(0), 0, {"token": 0, "example": 0}
  for _ in range(draws):
    trial, finalists, budgets = drawn_trial(rng, **shape)
    false += any(trial.decide(finalists, budgets, most=0.2).beats.values())
    for by, ratio in trial.ratios((0, 0.1), (RANDOM, 0.1)).items():
      held[by] += ratio.low <= 1 <= ratio.high
  error = 2 * math.sqrt(0.95 * 0.05 * draws)  # of a count over so many draws
  assert false <= 0.05 * draws and min(held.values()) >= 0.95 * draws - error, (false, held)


def test_without_the_correction_the_best_of_several_would_be_called_better_too_often():
  rng, draws, false = np.random.default_rng(0), 40, 0
  for _ in range(draws):
    trial, finalists, budgets = drawn_trial(rng)
    trial.level = 0.95
    false += any(trial.decide(finalists, budgets, most=0.2).beats.values())
  assert false > 0.05 * draws


def test_a_rule_that_is_better_is_found():
  rng, draws = np.random.default_rng(1), 12
  found = [drawn_trial(rng, better=0.15) for _ in range(draws)]
  right = sum(trial.decide(left, budgets, most=0.2).rule == 0 for trial, left, budgets in found)
  assert right >= 0.8 * draws


class Before(tries.Trial):
  """With equal shares of 0.05, two-sided."""

  def __init__(self, trial, tried):
    self.__dict__ |= trial.__dict__ | {"level": tries.corrected(tried), "first": None}


def test_the_share_of_the_first_rule_finds_more_than_equal_shares():
  """40 evaluation examples, three seeds, five rules: a rule that is 8 % better; false answers stay as rare."""
  rng, found, before = np.random.default_rng(5), [], []
  for _ in range(40):
    trial, finalists, _ = drawn_trial(rng, 0.08, size=40, rules=5, budgets=(0.1,))
    assert trial.level_of(0) == 0.95 and trial.level_of(1) == pytest.approx(1 - 0.05 / 4)
    for made, answers in ((trial, found), (Before(trial, 5), before)):
      answers.append(made.decide(finalists, (0.1,), most=0.2).rule)
  assert found.count(0) >= 0.45 * len(found) and found.count(0) > 1.5 * before.count(0)
  assert not set(found) - {0, RANDOM}


def test_a_rules_budgets_are_looked_at_in_turn_until_one_fails():
  assert tries.in_turn((0.05, 0.1, 0.25, 0.5), 0.1) == [0.1, 0.25, 0.5, 0.05]
  means = {("rule", 0.1): 0.0, ("rule", 0.2): 0.0, ("rule", 0.4): -0.3}
  trial = trial_of(means | {(RANDOM, budget): 0.1 * (budget != 0.2) for _, budget in means} | {(FULL, 1.0): -0.5})
  assert trial.beaten("rule", (0.1, 0.2, 0.4), 0.1) == [0.1] and trial.beaten("rule", (0.1, 0.2, 0.4), 0.2) == []
  assert trial.beaten("rule", (0.1, 0.2, 0.4), 0.4) == [0.4]
  assert trial.level_of("rule") == pytest.approx(1 - 0.05 / 4)  # and beside full data a third of it
  assert trial.ratio(("rule", 0.1), (FULL, 1.0), "token").level == pytest.approx(1 - 0.05 / 12)


def test_levels_are_those_of_bonferroni():
  assert tries.corrected(1) == pytest.approx(0.95) and tries.corrected(10) == pytest.approx(0.995)


# ---- the decision ------------------------------------------------------------------------


def trial_of(means, size=400, seeds=3):
  """A trial in which each candidate has this mean loss, with a little noise."""
  rng = np.random.default_rng(0)
  base = rng.normal(2, 0.3, size)
  losses = {name: base + mean + rng.normal(0, 0.01, (seeds, size)) for name, mean in means.items()}
  return tries.Trial(losses, np.full(size, 20), tries=4)


@pytest.mark.parametrize(
  ("means", "most", "rule", "budget"),
  [
    # what is as good as all of the data at the smallest budget, and better than random sets
    ({"rule .1": 0.0, "random .1": 0.1, "rule .2": 0.0, "random .2": 0.05}, 1.0, "rule", 0.1),
    # enough only at the larger budget
    ({"rule .1": 0.05, "random .1": 0.1, "rule .2": 0.0, "random .2": 0.05}, 1.0, "rule", 0.2),
    # no part is enough: all of the data, or the best of the largest budget
    ({"rule .1": 0.05, "random .1": 0.1, "rule .2": 0.03, "random .2": 0.05}, 1.0, FULL, 1.0),
    ({"rule .1": 0.05, "random .1": 0.1, "rule .2": 0.03, "random .2": 0.05}, 0.2, "rule", 0.2),
    # no rule beats random sets
    ({"rule .1": 0.1, "random .1": 0.1, "rule .2": 0.06, "random .2": 0.05}, 0.2, RANDOM, 0.2),
    ({"rule .1": 0.0, "random .1": 0.0, "rule .2": 0.0, "random .2": 0.0}, 1.0, RANDOM, 0.1),
    # a rule that beats them, surely and by next to nothing
    ({"rule .1": 0.0, "random .1": 0.004, "rule .2": 0.0, "random .2": 0.004}, 1.0, RANDOM, 0.1),
  ],
)
def test_the_smallest_budget_that_is_enough_is_named_and_random_and_all_are_answers(means, most, rule, budget):
  named = {(name.split()[0], float(name.split()[1])): mean for name, mean in means.items()}
  found = trial_of(named | {(FULL, 1.0): 0.0}).decide(["rule"], (0.1, 0.2), most)
  assert (found.rule, found.budget) == (rule, budget)


def test_full_data_without_duplicates_is_the_answer_where_it_loses_nothing():
  means = {("rule", 0.1): 0.2, (RANDOM, 0.1): 0.3, (FULL, 1.0): 0.0, (tries.DISTINCT, 0.8): 0.0}
  found = trial_of(means).decide(["rule"], (0.1,))
  assert (found.rule, found.budget) == (tries.DISTINCT, 0.8)


def test_more_examples_see_smaller_differences():
  trial = trial_of({("rule", 0.1): 0.0, (RANDOM, 0.1): 0.0, (FULL, 1.0): 0.0})
  estimate = trial.estimate(("rule", 0.1), (RANDOM, 0.1), "example")
  wide = dataclasses.replace(estimate, examples=4e-4, seeds=0.0)
  seen, more, then = tries.to_know_more(wide, trial.level)
  assert (
    seen > then
    and more > wide.count
    and then == pytest.approx(tries.sees(wide, more / wide.count, trial.level), rel=1e-3)
  )


# ---- the plan ----------------------------------------------------------------------------

PACE = plans.Pace(1.0, 2.0, 2.0, 100.0, dict.fromkeys(RULES, 1.0), 30.0)
WANTED = plans.Plan(RULES, (0.05, 0.1, 0.25, 0.5), 5, 2)


def steps_of(share):
  return max(1, round(100 * share))


def test_a_plan_fits_and_leaves_out_in_the_stated_order():
  before, least = WANTED, plans.Plan(RULES[:1], (0.05,), 2, 1)
  needed = plans.seconds_of(WANTED, PACE, steps_of)
  assert plans.fitted(WANTED, PACE, steps_of, 2 * needed).dropped == ()
  for seconds in np.linspace(needed, 1.2 * plans.seconds_of(least, PACE, steps_of), 12):
    found = plans.fitted(WANTED, PACE, steps_of, seconds)
    assert found.seconds <= seconds and found.tries < 30
    sizes = lambda plan: (plan.seeds, plan.finalists, len(plan.budgets), len(plan.rules))  # noqa: E731
    assert all(now <= then for now, then in zip(sizes(found), sizes(before), strict=True))
    assert len(found.rules) == len(RULES) or found.budgets == (0.05,)  # rules go after budgets
    assert found.seeds >= 3 or found.rules == RULES[:1]
    assert {MATCHED, LONGEST} < set(found.tried) and plans.Plan.from_json(found.as_json()) == found
    before = found
  assert (
    before.left_out.startswith("seeds 5, 4, 3; the second finalist") and "Left out to keep the time" in before.told()
  )


def test_too_few_minutes_are_refused_with_what_would_do():
  with pytest.raises(UserError, match="--minutes=0.5 is too short.*Give --minutes=") as told:
    plans.fitted(WANTED, PACE, steps_of, 30)
  minutes = int(re.search(r"Give --minutes=(\d+)", str(told.value))[1])
  assert plans.fitted(WANTED, PACE, steps_of, 60 * minutes).seeds == 2


def test_rules_are_halved_until_the_finalists_are_left():
  assert WANTED.rungs == [7, 4, 2] and WANTED.screening == 0.1 and WANTED.tries == 7
  assert plans.Plan(RULES[:1], (0.1,), 2, 1).rungs == [3, 2]


# ---- what is written ---------------------------------------------------------------------


def outcome_of(rule="hybrid", budget=0.1, **settings):
  means = {(RANDOM, 0.1): 0.1, ("hybrid", 0.1): 0.0, (MATCHED, 0.1): 0.1, (FULL, 1.0): 0.0, (TWIN, 0.1): 0.09}
  trial = trial_of(means)
  decision = tries.Decision(rule, budget, True, {0.1: "hybrid"}, {0.1: ["hybrid"]})
  closing = Closing(np.arange(10), (rule, budget), (rule, budget), (RANDOM, 0.1), (TWIN, 0.1))
  facts = {"sizes": dict.fromkeys(means, (10, 5)), "seeds_of": dict.fromkeys(means, [0, 1, 2]), "pool": 100}
  plan = plans.Plan(("hybrid",), (0.1,), 3, 1, dropped=("seeds 5, 4",))
  made = RecommendSettings(**settings)
  return results.Outcome(made, plan, (0, 1, 2), trial, trial_of(means), decision, closing, **facts)


def test_a_training_that_gains_nothing_is_warned_of():
  made = outcome_of()
  told = [results.warnings(dataclasses.replace(made, worth=worth)) for worth in (math.nan, 0.9, 1.001)]
  assert told[0] == told[1] == told[2][1:] and "1.001 times the perplexity of the model before it" in told[2][0]
  said = [results.sentence(dataclasses.replace(made, worth=worth)) for worth in (math.nan, 0.9, 1.001)]
  assert said[0] == said[1] and said[2].startswith("Cannot tell: training on all of the data leaves 1.001 times")


def test_a_short_training_is_told_by_its_steps_and_its_share_of_the_gain():
  made = dataclasses.replace(outcome_of(FULL, 1.0), worth=0.5)
  sizes = made.sizes | {(FULL, 1.0): (100, 50)}
  told = results.sentence(dataclasses.replace(made, sizes=sizes))
  assert re.search(
    r"so it has \d+ % of the gain in log perplexity, after 5 optimiser steps beside 50; for a smaller set", told
  )
  assert "steps beside" not in results.sentence(made)
  warned = results.warnings(dataclasses.replace(made, sizes=sizes))
  assert any(line.startswith("A training on 10 % has 5 optimiser steps, on all of the data 50") for line in warned)
  assert not any("optimiser step" in line for line in results.warnings(made))


@pytest.mark.parametrize(
  ("examples", "seeds", "said"),
  [
    (1e-2, 1e-9, r"400 evaluation examples see .* %; [\d,]+ would see "),
    (1e-9, 1e-2, r"and 3 seeds .*; 12 seeds would see "),
  ],
)
def test_what_it_would_take_to_know_more_names_what_limits(monkeypatch, examples, seeds, said):
  made = outcome_of()
  estimate = dataclasses.replace(results.compared(made)[0], examples=examples, seeds=seeds)
  monkeypatch.setattr(results, "compared", lambda _: (estimate, 0.95, 3))
  told = results.to_know_more(made)
  assert re.search(said, told["sentence"]) and told["would_see"] <= told["sees"] > told["would_see_by_seeds"]


def check_json(found):
  """The interface of recommendation.json."""
  ratios = {"ratio_to_random", "ratio_to_length_matched", "ratio_to_full"}
  assert {"sentence", "rule", "budget", "minutes", "candidates", "test", "validation"} <= set(found)
  for part in ("test", "validation"):
    assert set(found[part]) == ratios
    for ratio in found[part].values():
      assert set(ratio) == {"token", "example"}
      assert all({"estimate", "low", "high"} == set(one) for one in ratio.values())
      assert all(one["low"] <= one["estimate"] <= one["high"] for one in ratio.values())
  for row in found["candidates"]:
    assert row["seeds"] and {"ratio_to_random", "ratio_to_full"} < set(row)
  assert found["sentence"].endswith(".") and isinstance(found["minutes"], float)
  json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(("rule", "budget", "said"), [("hybrid", 0.1, "those that hybrid chooses"), (FULL, 1.0, "all")])
def test_the_json_has_its_keys_and_the_sentence_its_numbers(rule, budget, said):
  found = results.as_json(outcome_of(rule, budget), {})
  check_json(found)
  assert said in found["sentence"] and re.search(r"0\.9\d\d times that of random sets of that size", found["sentence"])
  assert found["correction"]["tries"] == 4 and "Bonferroni" in found["correction"]["method"]
  assert {row["rule"] for row in found["candidates"]} == {RANDOM, "hybrid", MATCHED, FULL}
  assert "evaluation examples see" in found["to_know_more"]["sentence"]


def test_the_page_escapes_what_it_shows_and_runs_nothing():
  hostile = outcome_of(eval_data="<script>alert(1)</script>", run_dir="runs/x")
  found = results.as_json(hostile, {}) | {"train": f"--eval_data={hostile.settings.eval_data}"}
  text = recommendation_page.page(found, {})
  assert "<script" not in text and "&lt;script&gt;" in text and "default-src 'none'; style-src 'sha256-" in text
  assert found["sentence"].replace("'", "&#39;") in text and text.count('<svg class="chart"') == 1


def test_the_printed_training_never_looks_at_what_was_chosen(tmp_path):
  """Also without --eval_data, where evaluation examples are a part of the training file; and copies are left out."""
  told = results.train_line(RecommendSettings(train_data="jsonl:a.jsonl", run_dir="runs/x/", epochs=3.0))
  assert (
    "a.jsonl" not in told
    and "--train_data=jsonl:runs/x/coreset.jsonl --eval_data=jsonl:runs/x/evaluation.jsonl" in told
  )
  assert "--test_data=jsonl:runs/x/test.jsonl --run_dir=runs/x-trained" in told and "--epochs=3.0" in told
  recipe = {"weight_decay": 0.1, "warmup_ratio": 0.3, "max_grad_norm": 5.0, "loss_reduction": "sum", "seed": 3}
  own = RecommendSettings(train_data="jsonl:a.jsonl", **recipe)
  assert all(own.as_flag(name) in results.train_line(own) and own.as_flag(name) not in told for name in recipe)
  part = lambda *keys: types.SimpleNamespace(records=[types.SimpleNamespace(content_key=k, raw=f'"{k}"') for k in keys])  # noqa: E731
  session = types.SimpleNamespace(splits={"train": part("a", "b", "c"), "eval": part("d", "b", "a"), "test": part("c")})
  run_dir = RunDir.open(tmp_path / "run", {"stage": "recommend"})
  results.write_held_out(run_dir, session, np.array([1, 2]))
  assert (run_dir.path / "evaluation.jsonl").read_text() == '"d"\n"a"\n'
  assert (run_dir.path / "test.jsonl").read_text() == ""


def test_other_trainers_are_told_the_epochs_of_the_answer():
  assert results.as_trained(outcome_of(equal="epochs", epochs=3.0)).epochs == 3.0
  by_steps = results.as_trained(outcome_of(equal="steps", batch_size=4))
  assert (by_steps.epochs, by_steps.steps) == (5 * 4 / 10, 0)


def test_a_pool_that_does_not_fit_is_tried_in_part_and_said_so():
  s = dataclasses.replace(WANTED, examples=8000)
  pace = dataclasses.replace(PACE, hidden=4000.0)
  part = lambda share, part=1.0: max(1, round(2000 * share * part))  # noqa: E731
  every = plans.seconds_of(s, pace, part)
  assert plans.fitted(s, pace, part, 1.2 * every).part == 1
  found = plans.fitted(s, pace, part, 1500)
  assert found.part < 1 and found.pool == round(found.part * 8000) and found.seconds <= 1500 and len(found.budgets) >= 2
  assert found.dropped[0].endswith("% of the pool") and f"{found.pool:,} of 8,000 examples, at random" in found.told()
  assert plans.fitted(s, pace, part, 60 * math.ceil(found.all_minutes)).part == 1
  assert plans.Plan.from_json(json.loads(json.dumps(found.as_json()))) == found
  with pytest.raises(UserError, match="of 250 of the 8,000 examples with 2 seeds.*Give --minutes="):
    plans.fitted(s, pace, part, 60)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"rules": "hybrid,none"}, "--rules=hybrid,none: unknown 'none'"),
    ({"rules": ""}, "rules= is empty"),
    ({"minutes": 0.0}, "minutes=0.0"),
  ],
)
def test_settings_that_cannot_be_are_told_in_one_line(flags, message):
  with pytest.raises(UserError, match=message):
    RecommendSettings(**flags)


def test_a_calibration_counts_what_is_right_safe_and_worse():
  found = results.as_json(outcome_of(), {})
  row = calibration.row_of("pool", "task", found)
  assert row["right, by token"] and row["safe, by example"] and not row["worse, by token"]
  wrong = json.loads(json.dumps(found))
  wrong["test"]["ratio_to_random"]["token"] = {"estimate": 1.1, "low": 1.05, "high": 1.15}
  told = calibration.summary([row, calibration.row_of("pool", "other", wrong), row | {"rule": "random"}])
  assert told[0].startswith("1 of 3 answers are a random set")
  assert told[1].startswith("By token: of 2 choices 1 have") and "1 are worse beyond" in told[1]
  assert "2 are at most 1 % worse" in told[2]


def test_a_pair_that_is_refused_stops_no_other_and_is_named_at_the_end(tmp_path, monkeypatch):
  def answered(settings, *_):
    if settings == "dear":
      raise UserError("--minutes=1 is too short")
    (tmp_path / "recommendation.json").write_text('{"rule": "bm25"}')
    return str(tmp_path)

  session = types.SimpleNamespace(splits=())
  pool = types.SimpleNamespace(
    name="pool", folder="runs/pool-0", session=session, settings=None, tasks=("dear", "cheap")
  )
  pool.task, pool.is_done = lambda label: (label, session), lambda: False
  monkeypatch.setattr(calibration.run, "run", answered)
  monkeypatch.setattr(calibration, "judge_of", lambda *_: types.SimpleNamespace(over=lambda session: session))
  found = []
  with pytest.raises(UserError, match="1 pair was refused: pool-0/dear; start the same command"):
    for pair in calibration.pairs([pool]):
      found.append(pair)
  assert found == [("pool", "cheap", {"rule": "bm25"})]


@pytest.mark.parametrize("flags", [{"equal": "steps,epochs"}, {"checkpoint": "x"}, {"policy": "bm25"}, {"seeds": ""}])
def test_flags_that_contradict_it_are_refused_before_the_data_are_read(flags):
  with pytest.raises(UserError, match=f"--{next(iter(flags))}"):
    run.run(RecommendSettings(train_data="file:not_there.jsonl", **flags))


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"budget": "400tok"}, "a share such as 0.1, or a number of examples"),
    ({"budget": "0.1", "fractions": ""}, None),
    ({"fractions": ""}, "names no budget below 1"),
    ({"seeds": "0"}, "intervals need 2 different seeds"),
  ],
)
def test_budgets_and_seeds_are_checked_before_the_work(flags, message):
  session = types.SimpleNamespace(splits={"train": types.SimpleNamespace(num_response_tokens=np.ones(100, int))})
  s = RecommendSettings(**flags)
  if message is None:
    assert run.wanted(s, session).budgets == (0.1,)
  else:
    with pytest.raises(UserError, match=message):
      run.wanted(s, session)


def test_python_reads_of_parameters_and_settings_keep_what_they_set():
  with pytest.raises(UserError, match="^rules=none: unknown 'none'"):
    i2c.recommend(rules="none")
  with pytest.raises(UserError, match="^no_such is no setting.*RecommendSettings"):
    i2c.recommend(no_such=1)
  with pytest.raises(UserError, match="^equal=steps,tokens: one word here, such as equal=epochs"):
    i2c.recommend(i2c.Settings(layers="last:2"), equal="steps,tokens")


# ---- the whole, on a small model ---------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return run_settings(
    tmp_path_factory.mktemp("recommend"),
    dataclasses.replace(CONFIG, num_layers=2),
    kind=RecommendSettings,
    train_limit=60,
    eval_limit=24,
    test_limit=16,
    trainable_layers="last:1",
    layers="last:1",
    sketch_size=4,
    steps=0,
    epochs=1.0,
    policy="auto",
    fixed_seeds="",
    rules="bm25,hybrid,proponents",
    fractions="0.2,0.5",
    minutes=60.0,
  )


@dataclasses.dataclass
class Train:
  """As much of a data set as `add_forms` looks at."""

  records: list

  def __len__(self):
    return len(self.records)


def test_a_form_that_is_added_later_has_the_same_examples_whatever_line_breaks_their_texts_hold(monkeypatch):
  raws = ['{"text": "a"}', '{"text": "b\u2028b"}', '{"text": "c\x85"}', '{"text": "a"}', '{"text": "\ud83d"}']
  train = Train([types.SimpleNamespace(raw=raw) for raw in raws])
  written = files.text_bytes("".join(raws[row] + "\n" for row in (0, 1, 2, 4)))
  run_dir, found = types.SimpleNamespace(read_bytes=lambda name: written), []
  monkeypatch.setattr(results.select_outputs, "write_forms", lambda _, __, columns, ___: found.append(columns))
  results.add_forms(run_dir, types.SimpleNamespace(splits={"train": train}), None)
  assert found[0]["selected"].tolist() == [True, True, True, False, True]


@pytest.mark.slow
@pytest.mark.real
def test_the_command_tries_decides_checks_and_goes_on(settings, monkeypatch):
  session, trained, train = open_session(settings), [], Retrainer.train
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(run, "close", lambda *_: (_ for _ in ()).throw(Killed()))
    run.run(settings, session)
  gc.collect()  # the lock of the folder
  with monkeypatch.context() as patch:
    patch.setattr(Retrainer, "train", lambda self, *given: trained.append(given[2]) or train(self, *given))
    folder = pathlib.Path(run.run(settings, session))
  assert trained and all(label.startswith(("test: ", TWIN)) for label in trained)  # the others were kept
  found = json.loads((folder / "recommendation.json").read_text())
  check_json(found)
  tried = {(row["rule"], row["budget"]) for row in found["candidates"]}
  assert {("bm25", 0.2), ("hybrid", 0.2), ("proponents", 0.2), (RANDOM, 0.5), (FULL, 1.0), (MATCHED, 0.2)} <= tried
  assert found["rule"] in (FULL, tries.DISTINCT, RANDOM) or all(
    one["high"] < 1 for one in found["validation"]["ratio_to_random"].values()
  )
  lines = (folder / "coreset.jsonl").read_text().splitlines()
  assert len(lines) == found["examples"] and found["train"] in (folder / "train_with.md").read_text()
  assert not set(lines) & set((folder / "evaluation.jsonl").read_text().splitlines())
  assert (folder / "recommendation.html").read_text().count("<h1>") == 1
  assert i2c.load(folder).sentence == found["sentence"] in repr(i2c.load(folder))
  with pytest.raises(UserError, match="--minutes=0.001 is too short"):
    run.dry_run(settings.replace(minutes=0.001), session)
  monkeypatch.setattr("in2core_jax.recommendation.run.Trainings", None)  # a finished run trains nothing
  assert run.run(settings.replace(coreset_format="tokens"), session) == str(folder)
  assert (folder / "coreset_tokens" / "state.json").exists()


@pytest.mark.slow
@pytest.mark.real
def test_the_demo_ends_in_a_recommendation_by_the_training_that_it_has(settings, tmp_path, monkeypatch):
  own = demo_flags.DemoFlags.of(settings, run_dir=str(tmp_path))
  session = open_session(own)
  finetune.run(own.replace(run_dir=f"{tmp_path}/finetune"), session)
  monkeypatch.setattr(finetune, "train", lambda *_: pytest.fail("all of the data was trained on again"))
  sentence = demo.recommended(own, session, str(tmp_path))
  assert sentence.endswith(".") and sentence == i2c.load(tmp_path / "recommend").sentence
  few = session.of_rows(eval=np.arange(6))
  assert demo.recommended(own, few, str(tmp_path)).startswith("There is no recommendation: the evaluation set has ")


@pytest.mark.slow
@pytest.mark.real
def test_a_real_slice_ends_in_a_sentence(tmp_path):
  """SmolLM2 on ChatterBot: questions of trivia against the whole corpus."""
  s = RecommendSettings(
    eval_topics="trivia",
    system_prompt="none",
    max_length=48,
    train_limit=64,
    eval_limit=24,
    test_limit=16,
    layers="last:1",
    trainable_layers="last:1",
    epochs=1.0,
    rules="bm25",
    fractions="0.25",
    seeds="0,1",
    minutes=600.0,
    run_dir=str(tmp_path / "run"),
  )
  alone = sharding.make_mesh("", jax.devices()[:1])  # eight simulated devices would hold the model eight times
  folder = run.run(s, sessions.open_session(s, alone))
  found = json.loads((pathlib.Path(folder) / "recommendation.json").read_text())
  check_json(found)
  assert found["checked"].startswith("On the test set")
