"""Which of several tried training sets to take: folds, intervals corrected for the number of tries, the decision.

A candidate is a rule with a budget. Its rule saw one fold of the evaluation set and is judged on the other, so that
every evaluation example has a loss of a model whose training set was chosen without it. The intervals are those of
`paired`. The candidate that looks best of m looks better than it is. "Better than random" is a question of the upper
end of an interval, and alpha = 0.05 is shared among the m rules before anything is seen (weighted Bonferroni):

  alpha / 2 for the rule that was named the most promising, alpha / 2 / (m - 1) for each of the others

So the first rule's intervals have the level 0.95 and the others' 1 - alpha / (m - 1). A rule's budgets are looked at
in a fixed order: the one at which all rules were tried, larger ones, smaller ones; the first that fails ends it, so
more budgets cost nothing. With probability 1 - alpha no rule is called better that is not, however rules depend on each
other. Comparisons with full data are another question, in no such order: there budgets divide their rule's part.
A rule passes by token and by example.

At such levels Student's t of two or three trainings is endless. All candidates are trained by one recipe, so a
candidate's spread over trainings is drawn towards that of all, which counts as _SHARED more trainings, with the degrees
of freedom of all. Simulations with a known truth, in which random sets spread up to four times as far as rules, call a
rule better that is not in less than 5 of 100 trials (tests/recommendation/test_recommend.py).

Letters: N evaluation examples, S trainings of a candidate, m tries. NumPy and SciPy only.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize

from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation.paired import BY, POWER, SEEN, Estimate, Paired
from in2core_jax.evaluation.statistics import FULL, RANDOM, Interval

LEVEL = 0.95
MARGIN = 0.01  # a budget is enough where its perplexity is at most 1 % above that of full data
LEAST_GAIN = 0.005  # a rule is named where it gains that much: less is nobody's reason to prefer it, however sure
_MOST_TIMES = 100.0  # as many evaluation examples as that: more is no advice
MATCHED, LONGEST, DISTINCT = "length_matched_random", "longest", "full_deduplicated"
WHOLE = (FULL, DISTINCT)  # rules without a budget
_SHARED = 2  # as many trainings as the spread of all candidates counts beside a candidate's own
CORRECTION = (
  "Bonferroni over {tries} rules: half of 0.05 for {first}, whose intervals have the level 0.95; the other half for "
  "the rest, whose intervals have {level:.4g}. A rule's budgets are looked at in turn until one fails; beside all of "
  "the data, budgets divide the rule's part"
)

Name = tuple[str, float]  # rule, budget as a share of the pool


def corrected(tries: int, level: float = LEVEL) -> float:
  """The level of each of so many intervals that hold together at `level`."""
  return 1 - (1 - level) / max(1, tries)


def folds_of(groups: np.ndarray, seed: int, count: int = 2) -> np.ndarray:
  """Deals evaluation examples into folds of about equal size; copies stay together. Another seed, other folds.

  Args:
    groups: int [N], equal for copies and near copies.
    seed: of the order in which groups are dealt.
    count: of folds.

  Returns:
    int [N], 0 to count - 1.

  Raises:
    UserError: fewer groups than folds.
  """
  _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
  if len(sizes) < count:
    raise UserError(
      f"{how_many(len(codes), 'evaluation example')}, {len(sizes):,} different; {count} folds need {count}"
    )
  order = np.random.default_rng((seed, 29)).permutation(len(sizes))
  order = order[np.argsort(-sizes[order], kind="stable")]  # the largest groups first, so that the folds end up alike
  held, fold = np.zeros(count, np.int64), np.empty(len(sizes), np.int64)
  for group in order:
    fold[group] = np.argmin(held)
    held[fold[group]] += sizes[group]
  return fold[codes]


def in_turn(budgets: Sequence[float], start: float) -> list[float]:
  """The order in which a rule's budgets are looked at: from `start` on the larger ones, then the smaller ones."""
  larger = sorted(budget for budget in budgets if budget >= start)
  return larger + sorted((budget for budget in budgets if budget < start), reverse=True)


@dataclass(frozen=True)
class Decision:
  """What to train on.

  Attributes:
    rule: of the candidate.
    budget: share of the pool; 1 for all of it.
    enough: whether it is at most `MARGIN` worse than full data, by its corrected interval.
    winners: budget -> rule that is best there: random where none beats random sets.
    beats: budget -> rules that beat random sets there, best first.
  """

  rule: str
  budget: float
  enough: bool
  winners: Mapping[float, str]
  beats: Mapping[float, Sequence[str]]


class _Pooled(Paired):
  """`Paired`, but each candidate's spread over trainings is drawn towards that of all candidates."""

  def _by_seeds(self, names: Sequence[Name], by: str) -> tuple[float, float]:
    spreads = self._spreads[by]
    freedom = sum(spread.freedom for spread in spreads.values())
    mean_of = lambda part: sum(getattr(own, part) * own.freedom for own in spreads.values()) / freedom  # noqa: E731
    pooled, total = np.array([mean_of("variance"), mean_of("both")]), 0.0
    for name in names:
      own = spreads.get(name)
      variance, both = pooled
      if own is not None:
        variance, both = (own.freedom * np.array([own.variance, own.both]) + _SHARED * pooled) / (own.freedom + _SHARED)
      total += max(0.0, variance - both) / len(self._losses[name])
    return float(total), float(freedom)


class Trial:
  """The losses of all candidates on the evaluation examples, each of models chosen without it."""

  def __init__(
    self,
    losses: Mapping[Name, np.ndarray],
    tokens: np.ndarray,
    groups: np.ndarray | None = None,
    tries: int = 1,
    first: str | None = None,
  ):
    """Keeps the losses.

    Args:
      losses: (rule, budget) -> f64 [S, N], mean nats of each evaluation example.
      tokens: [N], response tokens, 1 or more.
      groups: int [N], equal for examples that are drawn as a whole.
      tries: m, how many rules are held against random sets.
      first: the rule that was named the most promising before the trial; None: all m count alike.
    """
    self.names, self.tries, self.first = list(losses), tries, first
    self.level = corrected(tries if first is None else tries - 1)
    self._paired = _Pooled(losses, tokens, groups)

  def level_of(self, rule: str, other: str = RANDOM) -> float:
    """The level of a rule's intervals; against full data, where any budget may be called enough, for all of these."""
    level = LEVEL if rule == self.first else self.level
    budgets = sum(name == RANDOM for name, _ in self.names) if other == FULL and self.tries > 1 else 1
    return corrected(budgets, level)

  def estimate(self, name: Name, other: Name, by: str) -> Estimate:
    """Log of the ratio of the perplexities."""
    return self._paired.difference(name, other, by)

  def ratio(self, name: Name, other: Name, by: str) -> Interval:
    """The ratio of the perplexities with its corrected interval; exactly 1 of a candidate to itself."""
    level = self.level_of(name[0], other[0])
    if name == other:
      return Interval(1.0, 1.0, 1.0, self._paired.count, level)
    return self.estimate(name, other, by).ratio(level)

  def ratios(self, name: Name, other: Name) -> dict[str, Interval]:
    """By token and by example."""
    return {by: self.ratio(name, other, by) for by in BY}

  def beats(self, name: Name, other: Name) -> bool:
    """Whether the corrected intervals lie below 1 and `LEAST_GAIN` is gained, by token and by example."""
    ratios = self.ratios(name, other).values()
    return name != other and all(ratio.high < 1 and ratio.mean <= 1 - LEAST_GAIN for ratio in ratios)

  def reaches(self, name: Name, other: Name) -> bool:
    """Whether the corrected intervals end at most `MARGIN` above 1, by token and by example."""
    return all(ratio.high <= 1 + MARGIN for ratio in self.ratios(name, other).values())

  def place(self, name: Name, other: Name) -> float:
    """What candidates are ranked by: mean log ratio by token and by example; lower is better."""
    return float(np.mean([self.estimate(name, other, by).mean for by in BY])) if name != other else 0.0

  def ranked(self, rules: Sequence[str], budget: float) -> list[str]:
    """Rules that were tried at a budget, best first; equal ones in the given order."""
    there = [rule for rule in rules if (rule, budget) in self.names]
    return sorted(there, key=lambda rule: self.place((rule, budget), (RANDOM, budget)))

  def beaten(self, rule: str, budgets: Sequence[float], start: float) -> list[float]:
    """The budgets at which a rule beats random sets: in the order of `in_turn`, up to the first that fails."""
    beats = lambda budget: (rule, budget) in self.names and self.beats((rule, budget), (RANDOM, budget))  # noqa: E731
    return list(itertools.takewhile(beats, in_turn(budgets, start)))

  def decide(
    self, rules: Sequence[str], budgets: Sequence[float], most: float = 1.0, start: float | None = None
  ) -> Decision:
    """The smallest budget that is enough; without one all of the data, or the best of the largest budget.

    Args:
      rules: of the trial, random sets not among them.
      budgets: that were tried, in growing order.
      most: share of the pool that the answer may have at most.
      start: the budget at which all rules were tried; the smallest when None.
    """
    beaten = {rule: self.beaten(rule, budgets, budgets[0] if start is None else start) for rule in rules}
    beats = {budget: [rule for rule in self.ranked(rules, budget) if budget in beaten[rule]] for budget in budgets}
    winners = {budget: found[0] if found else RANDOM for budget, found in beats.items()}
    for budget, rule in winners.items():
      if self.reaches((rule, budget), (FULL, 1.0)):
        return Decision(rule, budget, True, winners, beats)
    if most < 1:
      return Decision(winners[budgets[-1]], budgets[-1], False, winners, beats)
    distinct = next((name for name in self.names if name[0] == DISTINCT), None)
    if distinct and self.reaches(distinct, (FULL, 1.0)):
      return Decision(*distinct, True, winners, beats)
    return Decision(FULL, 1.0, True, winners, beats)


def to_know_more(estimate: Estimate, level: float = LEVEL) -> tuple[float, int, float]:
  """What the trial can see, and what more evaluation examples would.

  Args:
    estimate: of a comparison.
    level: of its interval.

  Returns:
    (nats that are seen in four of five cases, evaluation examples that would see 1 %, or a third of that where it is
    more, nats that these would see with the same trainings).
  """
  seen = sees(estimate, 1.0, level)
  wanted = max(SEEN, seen / 3)
  gap = lambda log_factor: sees(estimate, math.exp(log_factor), level) - wanted  # noqa: E731
  most = math.log(_MOST_TIMES)
  if gap(0.0) <= 0:
    return seen, estimate.count, seen
  factor = _MOST_TIMES if gap(most) > 0 else math.exp(optimize.brentq(gap, 0.0, most))
  return seen, math.ceil(estimate.count * factor), sees(estimate, factor, level)


def sees(estimate: Estimate, factor: float, level: float = LEVEL, seeds: float = 1.0) -> float:
  """The smallest true difference, in nats, that is seen in four of five cases.

  Args:
    estimate: of a comparison.
    factor: how many times its examples.
    level: of its interval.
    seeds: how many times its trainings.
  """
  more = replace(
    estimate,
    examples=estimate.examples / factor,
    examples_freedom=estimate.examples_freedom * factor,
    seeds=estimate.seeds / seeds,
    seeds_freedom=estimate.seeds_freedom * seeds,
  )
  return more.half(level) + more.half(2 * POWER - 1)
