"""The trainings of a trial: every candidate on sets chosen without the examples that it is judged on; all are kept."""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence

import numpy as np

from in2core_jax.data.records import spoken
from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation import tries
from in2core_jax.evaluation.statistics import FULL, RANDOM
from in2core_jax.evaluation.tries import DISTINCT, LONGEST, MATCHED, WHOLE
from in2core_jax.pipeline import finetune
from in2core_jax.pipeline.judging import test_examples
from in2core_jax.pipeline.retraining import Retrainer, equal_steps
from in2core_jax.pipeline.session import Session
from in2core_jax.recommendation.chooser import Chooser, guided
from in2core_jax.recommendation.plan import Plan
from in2core_jax.recommendation.rules import RULES
from in2core_jax.recommendation.settings import RecommendSettings
from in2core_jax.report import near_duplicates
from in2core_jax.runs import run_folder
from in2core_jax.runs.progress import Progress
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)

TWIN = "random_of_its_lengths"  # with the response lengths of the chosen set
ANSWER = "random_without_duplicates"
LEAST_QUERIES = 16  # different evaluation examples


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
  """The evaluation examples with a response, and how they are dealt into folds.

  Attributes:
    rows: int [N], of the evaluation set.
    tokens: int [N], response tokens.
    copies: int [N], equal for copies and near copies, which share a fold.
    groups: int [N], equal for those that intervals redraw as a whole: copies, and where there are enough topics those
      of one topic. A topic is in both folds, as it is in the evaluation set and in the test set.
  """

  rows: np.ndarray
  tokens: np.ndarray
  copies: np.ndarray
  groups: np.ndarray

  @classmethod
  def of(cls, session: Session, part: str = "eval") -> "Judged":
    """Of a part.

    Raises:
      UserError: too few different evaluation examples for two folds.
    """
    dataset = session.splits[part]
    rows, points = np.flatnonzero(dataset.num_response_tokens), test_examples(dataset)
    records = [dataset.records[row] for row in rows]
    texts = [" ".join(spoken(one) for one in record.messages if one["role"] != "system") for record in records]
    copies = near_duplicates.alike(texts, [record.content_key for record in records])
    found, different = cls(rows, points.tokens, copies, points.groups), len(np.unique(copies))
    if part == "eval" and different < LEAST_QUERIES:
      without = len(dataset) - len(rows)
      lost = f"; {without} more have none within --max_length={session.settings.max_length}" if without else ""
      raise UserError(
        f"the evaluation set has {how_many(different, 'different example')} with a response{lost}. Rules that see one "
        f"half of them are judged on the other: give {LEAST_QUERIES} or more (--eval_data, --eval_limit, --split)"
      )
    return found

  def folds(self, seed: int) -> np.ndarray:
    """int [N], 0 or 1; another seed deals them anew, so that intervals hold for other halves too."""
    return tries.folds_of(self.copies, seed)


def judge_of(session: Session, s: RecommendSettings) -> Retrainer:
  """One start and few batch shapes for all sets; batches that fit in none of them get their own."""
  usable = finetune.trainable_rows(session)
  longest = usable[np.argsort(-session.splits["train"].num_tokens[usable], kind="stable")]
  return Retrainer(session, s, [usable, longest[: max(s.batch_size, len(usable) // 10)]])


class Trainings:
  """Trains, measures, keeps."""

  def __init__(
    self,
    retrainer: Retrainer,
    s: RecommendSettings,
    run_dir: run_folder.RunDir,
    judged: Judged,
    plan: Plan,
    full: str = "",
  ):
    """Trains nothing yet.

    Args:
      retrainer: over the plan's part of the pool (`judge_of`).
      s: the recipe.
      run_dir: keeps trainings and orders.
      judged: the evaluation examples.
      plan: what is tried; rules choose no more than its largest budget.
      full: run folder of the training on all data; beside `run_dir` when empty.
    """
    # One display for all trainings: most take seconds, and a line for each would bury the answer.
    self.retrainer = retrainer.over(retrainer.session, shown=False)
    self.session, self.settings, self.run_dir = retrainer.session, s, run_dir
    self.progress: Progress | None = None
    self.judged, self.largest = judged, plan.budgets[-1]
    self.test_rows = np.flatnonzero(self.session.splits["test"].num_response_tokens)
    part = () if plan.part == 1 else (f"{plan.pool} examples",)  # names what is kept of a part of the pool
    self.cells = ResultCache(run_dir, *part, told=False)
    self._full = full or "-".join([f"{s.run_dir.rstrip('/')}-full", *(str(plan.pool) for _ in part)])
    self.checkpoint = ""  # of the training on all data, once `full` was called
    self.losses: dict[tries.Name, dict[int, np.ndarray]] = {}  # of evaluation examples, by seed
    self.tested: dict[tries.Name, dict[int, np.ndarray]] = {}  # of test examples
    self.sizes: dict[tries.Name, tuple[int, int]] = {}  # examples, steps
    self.worth = math.nan  # perplexity by example after the training on all data over that before it, once `full` ran

  @functools.cached_property
  def chooser(self) -> Chooser:
    """The sets."""
    size = len(finetune.trainable_rows(self.session))
    return Chooser(self.session, self.settings, self.run_dir, max(1, round(self.largest * size)), self.cells)

  def steps(self, rows: np.ndarray) -> int:
    """Optimiser steps of a training on these rows."""
    return equal_steps(self.session, self.settings, rows, self.settings.equal)

  # ---- one training --------------------------------------------------------------------

  def _measured(self, rows: np.ndarray, seed: int, places: np.ndarray, test: bool, label: str) -> dict:
    """Losses of a model trained on `rows`: of evaluation examples (places among the judged) and of test examples."""
    steps = self.steps(rows)
    asked = run_folder.hash_of([np.sort(rows).tolist(), places.tolist()])

    def train() -> dict:
      trained = self.retrainer.train(np.sort(rows), seed, label, steps)
      if self.progress is not None:
        self.progress.update(1, last=label)
      return self._losses(trained.sub, places, test) | {"trained_tokens": trained.trained_response_tokens}

    return self.cells.get(train, "training", asked, seed, steps, "test" if test else "eval")

  def _losses(self, sub, places: np.ndarray, test: bool) -> dict:
    found = {}
    if len(places):
      found["eval"] = self.retrainer.losses(sub, "eval", self.judged.rows[places]).tolist()
    if test:
      found["test"] = self.retrainer.losses(sub, "test", self.test_rows).tolist()
    return found

  # ---- one candidate -------------------------------------------------------------------

  def fold_sets(self, name: tries.Name, seed: int, first: str) -> list[np.ndarray]:
    """For each fold the rows that the candidate takes when it sees the others."""
    rule, budget = name
    if rule == MATCHED:
      leading = self.fold_sets((first, budget), seed, first)
      return [self.chooser.matched(rows, budget, seed) for rows in leading]
    fold = self.judged.folds(seed)
    seen = [self.judged.rows[fold != number] for number in range(2)]
    return [order[: self.chooser.size(budget)] for order in self.orders(rule, seen)]

  def orders(self, rule: str, queries: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`Chooser.orders`, at the training on all data for a rule that is taken there."""
    return self.chooser.orders(rule, queries, self.checkpoint if RULES[rule].trained else "")

  def out_of_fold(self, name: tries.Name, sets: Sequence[np.ndarray], seed: int) -> None:
    """Trains on a set for each fold; each model is judged on its own fold."""
    fold, losses = self.judged.folds(seed), np.empty(len(self.judged.rows))
    for number, rows in enumerate(sets):
      places = np.flatnonzero(fold == number)
      label = f"{name[0]} {name[1]:.3g}, seed {seed}, half {number + 1}"
      losses[places] = self._measured(rows, seed, places, False, label)["eval"]
    self._note(name, seed, sets[0], losses)

  def unguided(self, name: tries.Name, rows: np.ndarray, seed: int, test: bool = False) -> None:
    """Trains on a set that depends on no evaluation example: one model for all of them."""
    label = f"{name[0]} {name[1]:.3g}, seed {seed}"
    found = self._measured(rows, seed, np.arange(len(self.judged.rows)), test, label)
    self._note(name, seed, rows, np.array(found["eval"]))
    if test:
      self.tested.setdefault(name, {})[seed] = np.array(found["test"])

  def on_test(self, name: tries.Name, rows: np.ndarray, seed: int) -> None:
    """Trains on a set for the test examples alone: it may depend on every evaluation example."""
    found = self._measured(rows, seed, np.zeros(0, np.int64), True, f"test: {name[0]} {name[1]:.3g}, seed {seed}")
    self.tested.setdefault(name, {})[seed] = np.array(found["test"])
    self.sizes.setdefault(name, (len(rows), self.steps(rows)))

  def _note(self, name: tries.Name, seed: int, rows: np.ndarray, losses: np.ndarray) -> None:
    self.losses.setdefault(name, {})[seed] = losses
    self.sizes.setdefault(name, (len(rows), self.steps(rows)))

  def candidate(self, name: tries.Name, seed: int, first: str) -> None:
    """A seed of a candidate, done now unless it was.

    Args:
      name: rule and budget.
      seed: of the folds, of the order of the data and of random sets.
      first: the rule whose response lengths length-matched random sets take.
    """
    rule, budget = name
    if seed in self.losses.get(name, {}):
      return
    if guided(rule):
      self.out_of_fold(name, self.fold_sets(name, seed, first), seed)
    elif rule == LONGEST:
      self.unguided(name, self.chooser.longest(budget), seed)
    else:
      self.unguided(name, self.chooser.random(budget, seed), seed, test=True)

  def full(self, seed: int) -> None:
    """Full data, by a run folder of its own, whose checkpoint rules may score at."""
    s = self.settings.replace(run_dir=self._full, seed=seed)
    self.checkpoint = finetune.run(s, self.session)
    everyone, load = np.arange(len(self.judged.rows)), train_loop.load_sub
    measure = lambda: self._losses(load(self.checkpoint, self.retrainer.sub), everyone, True)  # noqa: E731
    found = self.cells.get(measure, "full", seed)
    name = (FULL, 1.0)
    self._note(name, seed, self.chooser.usable, np.array(found["eval"]))
    before = self.cells.get(lambda: self._losses(self.retrainer.sub, everyone, False), "before")
    self.worth = math.exp(np.mean(found["eval"]) - np.mean(before["eval"]))
    self.tested.setdefault(name, {})[seed] = np.array(found["test"])
    distinct = self.chooser.distinct
    if len(distinct) < len(self.chooser.usable):
      self.unguided((DISTINCT, len(distinct) / len(self.chooser.usable)), distinct, seed, test=True)

  # ---- all of them ---------------------------------------------------------------------

  def trial(self, plan: Plan) -> tries.Trial:
    """What the trainings so far allow to say."""
    stacked = {name: np.stack(list(own.values())) for name, own in self.losses.items()}
    return tries.Trial(stacked, self.judged.tokens, self.judged.groups, plan.tries, plan.rules[0])

  def test_trial(self) -> tries.Trial:
    """The same on the test set, where one comparison was named in advance: no correction."""
    stacked = {name: np.stack(list(own.values())) for name, own in self.tested.items()}
    points = test_examples(self.session.splits["test"])
    return tries.Trial(stacked, points.tokens, points.groups)


def run_rungs(trainings: Trainings, plan: Plan, seeds: Sequence[int]) -> list[str]:
  """Halves the rules at the screening budget; the finalists, best first."""
  left = list(plan.tried)
  for place, count in enumerate(plan.rungs):
    left = left[:count]
    for rule in (RANDOM, *left):
      trainings.candidate((rule, plan.screening), seeds[place], plan.rules[0])
    left = trainings.trial(plan).ranked(left, plan.screening)
    log.info("%d of %d seeds at %.3g %%, best first: %s", place + 1, plan.seeds, 100 * plan.screening, ", ".join(left))
  return left[: plan.finalists]


def run_seed(trainings: Trainings, plan: Plan, finalists: Sequence[str], seed: int) -> None:
  """A seed of the finalists and of random sets at every budget."""
  for budget in plan.budgets:
    for rule in (RANDOM, *finalists):
      trainings.candidate((rule, budget), seed, plan.rules[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Closing:
  """What is held against what, once the answer is known.

  Attributes:
    rows: int, the answer.
    name: of the candidate on the evaluation set. tested: on the test set.
    random: of the random sets that it is held against. twin: of random sets with its response lengths.
  """

  rows: np.ndarray
  name: tries.Name
  tested: tries.Name
  random: tries.Name
  twin: tries.Name


def close(trainings: Trainings, decision: tries.Decision, seeds: Sequence[int], first: str) -> Closing:
  """Trains what only the answer needs: the set chosen for all evaluation examples, random sets of its lengths.

  Args:
    trainings: of the trial.
    decision: the answer.
    seeds: of the finalists.
    first: the rule whose response lengths length-matched random sets take.
  """
  rule, budget = decision.rule, decision.budget
  size = max(decision.winners) if rule in WHOLE else budget  # all of the data is held against the largest random sets
  rows = answer_rows(trainings, decision, seeds[0], first)
  has_copies = len(trainings.chooser.distinct) < len(trainings.chooser.usable)
  tested = (ANSWER, budget) if rule == RANDOM and has_copies else (rule, budget)
  found = Closing(rows, (rule, budget), tested, (RANDOM, size), (TWIN, size))
  for seed in seeds:
    own = answer_rows(trainings, decision, seed, first)
    if seed not in trainings.tested.get(tested, {}) and rule not in WHOLE:
      trainings.on_test(tested, own, seed)
    _twins(trainings, found, own, seed, first)
  return found


def _twins(trainings: Trainings, closing: Closing, own: np.ndarray, seed: int, first: str) -> None:
  """Random sets with the response lengths of what the answer's rule chose, in every half and in all."""
  chooser, (rule, _), (_, size) = trainings.chooser, closing.name, closing.twin
  if not guided(rule):
    trainings.unguided(closing.twin, chooser.matched(own, size, seed), seed, test=True)
    return
  sets = trainings.fold_sets(closing.name, seed, first)
  trainings.out_of_fold(closing.twin, [chooser.matched(rows, size, seed) for rows in sets], seed)
  trainings.on_test(closing.twin, chooser.matched(own, size, seed), seed)


def answer_rows(trainings: Trainings, decision: tries.Decision, seed: int, first: str) -> np.ndarray:
  """The rows of the answer, chosen for all evaluation examples; a random set takes no copy before every text is in."""
  rule, budget, chooser = decision.rule, decision.budget, trainings.chooser
  if rule in WHOLE:
    return chooser.whole(rule)
  if rule == RANDOM:
    return chooser.random(budget, seed, copies_last=True)
  if rule == LONGEST:
    return chooser.longest(budget)
  leading = first if rule == MATCHED else rule
  (order,) = trainings.orders(leading, [trainings.judged.rows])
  chosen = order[: chooser.size(budget)]
  return chooser.matched(chosen, budget, seed) if rule == MATCHED else chosen
