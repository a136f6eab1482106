"""What training on each rule's choice is worth to each target: trainings, tables, `recommend` as one more rule."""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping

import numpy as np

from experiments.study.report import MATCHED, SetFacts, comparison
from experiments.study.variants import Variant, make_variant
from experiments.targets.settings import TargetsSettings
from experiments.targets.target import Target, size_of
from in2core_jax.evaluation import statistics, verdict
from in2core_jax.evaluation.paired import BY
from in2core_jax.evaluation.tries import LONGEST
from in2core_jax.evaluation.tries import MATCHED as MATCHED_ANSWER
from in2core_jax.pipeline.finetune import start_params, trainable_rows
from in2core_jax.pipeline.retraining import Retrainer, TrainingSubset, equal_steps, retrain_row
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import seeds_of, words
from in2core_jax.recommendation import results
from in2core_jax.recommendation import run as recommend
from in2core_jax.recommendation.rules import RULES
from in2core_jax.recommendation.settings import RecommendSettings
from in2core_jax.report import table_text
from in2core_jax.runs import run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.selection import coreset

log = logging.getLogger(__name__)

FULL, RANDOM = statistics.FULL, statistics.RANDOM
RECOMMEND = "recommend"


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
  """What is compared.

  Attributes:
    session: data and model.
    settings: the recipe and the seeds.
    cells: keep trainings.
    targets: judged each on its own test examples.
    orders: rule -> target -> all rows or enough of them, best first.
    matched: whether random sets with the response lengths of the first rule's choices take part.
    budgets: shares of the pool.
    equal: what trainings have in common.
  """

  session: Session
  settings: TargetsSettings
  cells: ResultCache
  targets: list[Target]
  orders: dict[str, dict[str, np.ndarray]]
  matched: bool
  budgets: tuple[float, ...]
  equal: list[str]

  @property
  def usable(self) -> np.ndarray:
    """The pool's rows with a response."""
    return trainable_rows(self.session)

  def size(self, budget: float) -> int:
    """Examples of a budget."""
    return size_of(budget, len(self.usable))

  def random(self, budget: float, seed: int) -> np.ndarray:
    """A random set."""
    drawn = np.random.default_rng((seed, 17)).permutation(len(self.usable))
    return np.sort(self.usable[drawn][: self.size(budget)])

  def chosen(self, rule: str, target: Target, budget: float) -> np.ndarray:
    """What a rule chooses."""
    return np.sort(self.orders[rule][target.name][: self.size(budget)])

  def of_its_lengths(self, target: Target, budget: float, seed: int) -> np.ndarray:
    """A random set with the response lengths of what the first rule chooses."""
    rows, lengths = (
      self.chosen(next(iter(self.orders)), target, budget),
      self.session.splits["train"].num_response_tokens,
    )
    drawn = coreset.length_matched(np.searchsorted(self.usable, rows), lengths[self.usable], seed)
    return np.sort(self.usable[drawn])


# ---- recommend as a rule -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
  """What `recommend` says for a target.

  Attributes:
    told: sentence, rule, budget, and the rule of every budget.
    rows: (budget, seed) -> the set that it takes there.
  """

  told: dict
  rows: Callable[[float, int], np.ndarray]


def recommended(trial: Trial, chooser) -> dict[str, Answer]:
  """Target -> what `recommend` answers from the target's queries, in run folders in that of this command.

  Args:
    trial: what is compared.
    chooser: of `targets`, for rules that are not among those of --retrained.
  """
  s, session = trial.settings, trial.session
  own = {"minutes": s.recommend_minutes, "rules": ",".join(rules_of(s)), "fractions": s.fractions}
  own |= {"budget": str(max(trial.budgets)), "equal": trial.equal[0], "seeds": s.seeds}
  given = RecommendSettings.of(s, "run", "data", "model", "finetune", "select", **own)
  root, found, tree = f"{s.run_dir.rstrip('/')}/recommend", {}, start_params(session, s)[1]
  for part in session.splits:  # once for all targets
    session.packer(part, tree, session.model.params)
  for target in trial.targets:
    name = re.sub(r"\W+", "-", target.name)
    of_target = session.of_rows(eval=target.queries, test=target.tests)
    folder = recommend.run(given.replace(run_dir=f"{root}/{name}"), of_target, f"{root}/full")
    told = run_folder.RunDir.load(folder).load_json(results.FILE)
    found[target.name] = _answer(trial, chooser, target, told)
  return found


def rules_of(s: TargetsSettings) -> list[str]:
  """The rules of `recommend` that are among --retrained, by their policies; all but influence where none is."""
  named = " ".join(words(s.retrained, "retrained", (), ";"))
  known = [rule for rule, one in RULES.items() if not one.trained]
  return [rule for rule in known if re.search(rf"\b{RULES[rule].policy.replace('_', '[ _]')}\b", named)] or known


def _answer(trial: Trial, chooser, target: Target, told: dict) -> Answer:
  winners = {one["budget"]: one["rule"] for one in told["winners"]}

  def rule_at(budget: float) -> str:
    """Of a budget that there was no time for: that of the nearest smaller one, or of the smallest."""
    smaller = [tried for tried in winners if tried <= budget]
    return winners[max(smaller) if smaller else min(winners)]

  def rows(budget: float, seed: int) -> np.ndarray:
    rule = rule_at(budget)
    if rule == RANDOM:
      return trial.random(budget, seed)
    if rule == MATCHED_ANSWER:
      return trial.of_its_lengths(target, budget, seed)
    policy = LONGEST if rule == LONGEST else RULES[rule].policy
    order = _order(trial, chooser, make_variant(policy), target)
    return np.sort(order[: trial.size(budget)])

  at = {f"{100 * budget:g} %": rule_at(budget) for budget in trial.budgets}
  return Answer({name: told[name] for name in ("sentence", "rule", "budget", "winners")} | {"at": at}, rows)


def _order(trial: Trial, chooser, variant: Variant, target: Target) -> np.ndarray:
  order = lambda: {"rows": chooser.order(variant, target, 0).tolist()}  # noqa: E731
  kept = trial.cells.get(order, "order", RECOMMEND, variant.policy, target.name, target.queries.tolist())
  return np.array(kept["rows"], np.int64)


# ---- trainings ---------------------------------------------------------------------------


def retrain(trial: Trial, answers: Mapping[str, Answer]) -> dict:
  """Trains on every choice, on random sets and on all data; one training serves all targets that it is right for.

  Returns:
    {"tables": {title: rows}, "overview": rows, "by_token": rows, "first": rows, "notes": sentences}, with
    length-matched sets also "over_matched".
  """
  sets = {
    (target.name, budget): candidates(trial, target, budget, answers)
    for budget in trial.budgets
    for target in trial.targets
  }
  judge = Retrainer(trial.session, trial.settings, [candidate.rows for own in sets.values() for candidate in own])
  tables, every = {}, {}
  for word in trial.equal:
    for budget in trial.budgets:
      for target in trial.targets:
        own, title = sets[target.name, budget], f"{target.name}, {100 * budget:g} % of the pool, equal {word}"
        every[title] = [_row(trial, judge, target, candidate, word, title) for candidate in own]
        tables[title] = comparison(every[title], SetFacts({}, _of_target(target, own)))
        log.info("%s\n%s", title, table_text.markdown_table(tables[title]))
  names = list(dict.fromkeys(candidate.policy for own in sets.values() for candidate in own))
  notes = verdict.many_comparisons(every) + verdict.sensitivity(list(every.values()))
  rules = [name for name in names if name != RANDOM]
  found = {"tables": tables, "overview": overview(every, rules), "by_token": overview(every, rules, by="token")}
  found |= {"first": first_to_others(every, list(trial.orders)), "notes": notes}
  if trial.matched:
    found["over_matched"] = overview(every, [name for name in names if name not in (RANDOM, MATCHED)], MATCHED)
  return found


def candidates(trial: Trial, target: Target, budget: float, answers: Mapping[str, Answer]) -> list[TrainingSubset]:
  """All that is compared for a target at a budget."""
  seeds, fixed = seeds_of(trial.settings)
  found = [TrainingSubset(FULL, fixed[0], trial.usable)]
  found += [TrainingSubset(RANDOM, seed, trial.random(budget, seed)) for seed in seeds]
  if trial.matched:
    found += [TrainingSubset(MATCHED, seed, trial.of_its_lengths(target, budget, seed)) for seed in seeds]
  found += [TrainingSubset(name, seed, trial.chosen(name, target, budget)) for name in trial.orders for seed in fixed]
  if target.name in answers:
    rows = answers[target.name].rows
    found += [TrainingSubset(RECOMMEND, seed, rows(budget, seed)) for seed in seeds]
  return found


def _row(
  trial: Trial, judge: Retrainer, target: Target, candidate: TrainingSubset, word: str, title: str
) -> statistics.RetrainRow:
  """A training, done now unless it was; full data and random sets are measured on the test examples of all targets."""
  session = trial.session
  steps = equal_steps(session, trial.settings, candidate.rows, word)
  serves_all = candidate.policy in (FULL, RANDOM)
  tests = np.arange(len(session.splits["test"])) if serves_all else target.tests

  def train() -> dict:
    result = judge.train(candidate.rows, candidate.seed, f"{title}: {candidate}", steps)
    return {"losses": judge.losses(result.sub, rows=tests).tolist(), "trained": result.trained_response_tokens}

  key = run_folder.hash_of([candidate.rows.tolist(), tests.tolist()])
  kept = trial.cells.get(train, "training", key, candidate.seed, steps)
  measured = np.array(kept["losses"])[target.tests if serves_all else slice(None)]
  test = session.splits["test"].take(target.tests)
  return retrain_row(candidate, session.splits["train"], test, measured, kept["trained"], steps)


def _of_target(target: Target, own: list[TrainingSubset]) -> dict[str, float]:
  """Rule -> share of its examples that are of the target, a mean over its sets."""
  shares: dict[str, list[float]] = {}
  for candidate in own:
    if candidate.policy != FULL:
      shares.setdefault(candidate.policy, []).append(float(target.mine[candidate.rows].mean()))
  return {name: float(np.mean(found)) for name, found in shares.items()}


def first_to_others(every: dict[str, list[statistics.RetrainRow]], rules: list[str]) -> list[dict]:
  """A row for each comparison: the first rule's perplexity over that of each other rule, by token and by example."""
  first, *others = rules
  found = []
  for title, rows in every.items():
    compared = verdict.Comparison(rows)
    ratio = lambda name, by, compared=compared: verdict.shown(compared.difference(first, name, by).ratio())  # noqa: E731
    found.append({"compared": title} | {f"{name}, by {by}": ratio(name, by) for name in others for by in BY})
  return found if others else []


def overview(
  every: dict[str, list[statistics.RetrainRow]], names: list[str], other: str = RANDOM, by: str = "example"
) -> list[dict]:
  """A row for each comparison: every rule's perplexity over that of others, and which is told apart.

  Args:
    every: title -> trainings.
    names: of the rules.
    other: what they are held against.
    by: a word of `paired.BY`.

  Returns:
    The rows; where there are several, the last one has their geometric means.
  """
  found, means = [], {name: [] for name in names}
  for title, rows in every.items():
    compared = verdict.Comparison(rows)
    line = {"compared": title}
    for name in names:
      difference = compared.difference(name, other, by)
      means[name].append(difference.mean)
      line[name] = verdict.shown(difference.ratio())
    found.append(line)
  if len(found) > 1:
    found.append({"compared": "geometric mean"} | {name: f"{np.exp(np.mean(own)):.3f}" for name, own in means.items()})
  return found
