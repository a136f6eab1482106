"""Intervals that hold for new test examples and for new trainings: what every verdict on retrained models rests on.

Each policy p was trained S_p times (its seeds) and every model was judged on the same N test examples: losses L_psi,
weights w_i (response tokens, or 1). The quantity is the log of a ratio of perplexities, with shares f_i = w_i / sum w:

  theta = sum_i f_i d_i,   d_i = mean_s L_Asi - mean_s L_Bsi

that is sum(nll difference) / sum(tokens) by token and the plain mean by example. Test examples and trainings are
crossed random effects: theta has a part of the trainings, one of the test examples, and one of both together (a
training is lucky on some examples). They are measured apart:

  seeds       V_S = sum over policies of var_s(sum_i f_i L_si) / S_p        (few degrees of freedom, Satterthwaite)
  examples    V_E = (C - 1) / C sum_c (theta_without_c - theta)^2           (jackknife over the C groups of examples)
  both        V_I = what V_S and V_E both hold: residuals of L_si against its means over s and over i

  half width^2 = t_S^2 max(V_S - V_I, 0) + t_E^2 V_E

Squared half widths add up (as in the "method of variance estimates recovery"): with a few trainings Satterthwaite's
single t is too short where a small V_S came out by chance. V_I counts once, where its degrees of freedom are many.
Simulations with a known truth, 26 to 400 test examples and 2 to 5 trainings, cover the truth in 93 to 99 of 100 cases
(test_paired.py); an interval over seeds alone covers it in 44 to 98, one over examples alone in 9 to 98.

A group of test examples is drawn as a whole: copies, near copies, perhaps a topic. The degrees of freedom of V_E are
those of unequal shares f_c, (sum f_c^2)^2 / sum f_c^4 - 1: where a few long responses hold most of the tokens, they
decide. A policy with one training borrows the spread of the policies with several; where no policy has several there
is no interval.

Letters: N test examples, C groups of them, S trainings of a policy. Losses are in nats. NumPy and SciPy only.
"""

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation.statistics import Interval, check_level

BY = ("token", "example")
POWER = 0.8  # how often a difference is to be seen that a test set is called large enough for
SEEN = math.log(1.01)  # nats: a perplexity that is 1 % higher
# Nats: standard deviation, over test examples, of the difference of a selected set's losses and a random one's.
# Measured by `evaluate` on SmolLM2-135M, last two layers, one epoch of 300 examples, halves by bm25 and by length: 0.07
# to 0.16 on Alpaca (this is its middle), 0.15 to 0.9 on ChatterBot.
DIFFERENCE = 0.1


@dataclass(frozen=True)
class Estimate:
  """A mean of log losses, or a difference of such means, with what it varies by.

  Attributes:
    mean: nats.
    seeds: variance that comes from the trainings beyond what `examples` holds. seeds_freedom: its degrees of freedom.
    examples: variance that comes from the test examples. examples_freedom: its degrees of freedom.
    count: test examples. groups: of them, each drawn as a whole.
    note: why there is no interval; empty where there is one.
  """

  mean: float
  seeds: float
  seeds_freedom: float
  examples: float
  examples_freedom: float
  count: int
  groups: int
  note: str = ""

  def half(self, level: float = 0.95) -> float:
    """Half the width of the interval; NaN where there is none."""
    check_level(level)
    if self.note:
      return math.nan
    quantile = 0.5 + level / 2
    by_seeds = stats.t.ppf(quantile, self.seeds_freedom) ** 2 * self.seeds
    by_examples = stats.t.ppf(quantile, self.examples_freedom) ** 2 * self.examples
    return math.sqrt(by_seeds + by_examples)

  def interval(self, level: float = 0.95) -> Interval:
    """The two-sided interval, in nats."""
    half = self.half(level)
    return Interval(self.mean, self.mean - half, self.mean + half, self.count, level, self.note)

  def ratio(self, level: float = 0.95) -> Interval:
    """The interval of exp: of a ratio of perplexities, or of a perplexity."""
    return self.interval(level).map(_exp)

  @functools.cached_property
  def p(self) -> float:
    """The level at which the interval just reaches 0, taken from 1: a two-sided p value; NaN without an interval."""
    if self.note or math.isnan(self.mean):
      return math.nan
    reaches = lambda p: self.half(1 - p) - abs(self.mean)  # noqa: E731
    least, most = 1e-12, 1 - 1e-9
    if reaches(most) >= 0:
      return 1.0
    return least if reaches(least) <= 0 else float(optimize.brentq(reaches, least, most, xtol=1e-13))

  @property
  def seen(self) -> float:
    """The smallest true difference, in nats, that its interval at 95 % excludes 0 for in four of five cases."""
    return self.half(0.95) + self.half(2 * POWER - 1)

  def examples_for(self, difference: float = SEEN) -> float:
    """Test examples with which `seen` would be `difference`, were there no spread of the trainings."""
    quantiles = stats.norm.ppf([0.975, POWER]).sum()  # so many that t is normal
    return float(self.count * self.examples * (quantiles / difference) ** 2)

  @property
  def seen_by_seeds(self) -> float:
    """What `seen` would be with endless test examples."""
    quantiles = stats.t.ppf([0.975, POWER], self.seeds_freedom)
    return float(quantiles.sum() * math.sqrt(self.seeds))


def _exp(value: float) -> float:
  with np.errstate(over="ignore"):
    return float(np.exp(value))


@dataclass(frozen=True)
class _Spread:
  """Of the trainings of a policy: variance of one training's mean, the part of it that belongs to the examples."""

  variance: float
  both: float
  freedom: int


class Paired:
  """The losses of several policies on the same test examples, and intervals of their means and differences."""

  def __init__(self, losses: Mapping[Hashable, np.ndarray], tokens: np.ndarray, groups: np.ndarray | None = None):
    """Checks that all models were judged on the same examples.

    Args:
      losses: policy -> f64 [S, N], mean nats of each test example, a row for each training.
      tokens: [N], response tokens of the test examples, 1 or more.
      groups: int [N], equal for examples that are drawn as a whole; each alone when None.

    Raises:
      UserError: another number of examples somewhere, losses that are not finite, an example without tokens.
    """
    self._losses = {name: np.atleast_2d(np.asarray(own, np.float64)) for name, own in losses.items()}
    tokens = np.asarray(tokens, np.float64)
    size = tokens.size
    groups = np.arange(size) if groups is None else np.asarray(groups)
    if size == 0 or tokens.min() < 1 or groups.shape != (size,):
      raise UserError(
        f"{how_many(size, 'test example')} in {how_many(groups.size, 'group')}: each needs response tokens and a group"
      )
    for name, own in self._losses.items():
      if own.shape[1] != size:
        raise UserError(
          f"{name} was judged on {how_many(own.shape[1], 'test example')} and not on {size}: evaluate all of them again"
        )
      if not np.isfinite(own).all():
        raise UserError(f"{name}: losses of test examples are NaN or infinite; training may have diverged")
    self._groups = np.unique(groups, return_inverse=True)[1]
    self._shares = {"token": tokens / tokens.sum(), "example": np.full(size, 1 / size)}
    self.count, self.groups = size, int(self._groups.max()) + 1
    self._spreads: dict[str, dict[Hashable, _Spread]] = {
      by: {name: self._spread(own, by) for name, own in self._losses.items() if len(own) > 1} for by in BY
    }

  def mean(self, name: Hashable, by: str) -> Estimate:
    """Log of a policy's perplexity (the geometric mean over its trainings)."""
    return self._estimate([name], self._losses[name].mean(axis=0), by)

  def difference(self, name: Hashable, other: Hashable, by: str) -> Estimate:
    """Log of the ratio of a policy's perplexity to another's; negative: it is lower (better)."""
    ours, theirs = (self._losses[one].mean(axis=0) for one in (name, other))
    return self._estimate([name, other], ours - theirs, by)

  def _estimate(self, names: Sequence[Hashable], values: np.ndarray, by: str) -> Estimate:
    shares = self._shares[by]
    mean = float(shares @ values)
    note = self._without(by)
    if note:
      return Estimate(mean, math.nan, math.nan, math.nan, math.nan, self.count, self.groups, note)
    seeds, freedom = self._by_seeds(names, by)
    examples, among = jackknife(values, shares, self._groups)
    return Estimate(mean, seeds, freedom, examples, among, self.count, self.groups)

  def _without(self, by: str) -> str:
    """Why there is no interval."""
    if not self._spreads[by]:
      return "one training each, so their spread is unknown"
    return "one test example" if self.count == 1 else "all test examples are one group" if self.groups == 1 else ""

  def _by_seeds(self, names: Sequence[Hashable], by: str) -> tuple[float, float]:
    """(variance of the trainings beyond V_I, degrees of freedom), as a sum over the policies with several trainings."""
    spreads = self._spreads[by]
    every = sum(spread.freedom for spread in spreads.values())
    parts = dict.fromkeys(spreads, 0.0)  # how often each policy's variance counts
    for name in names:
      if name in spreads:
        parts[name] += 1 / len(self._losses[name])
      else:  # one training: the spread of all the others, by their degrees of freedom
        parts = {other: part + spreads[other].freedom / every for other, part in parts.items()}
    own = np.array([part * spreads[name].variance for name, part in parts.items()])
    freedom = np.array([spreads[name].freedom for name in parts])
    both = sum(part * spreads[name].both for name, part in parts.items())
    total = own.sum()
    return max(0.0, total - both), float(total**2 / (own**2 / freedom).sum()) if total > 0 else 1.0

  def _spread(self, own: np.ndarray, by: str) -> _Spread:
    shares = self._shares[by]
    means = own @ shares
    left = (own - own.mean(axis=0) - (means - means.mean())[:, None]) * shares
    sums = np.stack([np.bincount(self._groups, row, self.groups) for row in left])
    freedom, correction = len(own) - 1, self.groups / max(1, self.groups - 1)
    return _Spread(float(means.var(ddof=1)), float((sums**2).sum() / freedom * correction), freedom)


def jackknife(values: np.ndarray, shares: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
  """(variance, degrees of freedom) of sum_i shares_i values_i over redrawn groups of examples.

  Each group is left out once, and the shares of the others grow to 1: a long response that decides shows.

  Args:
    values: [N]. shares: [N], adding up to 1. groups: int [N], 0 to C - 1 with C at least 2.
  """
  mean = shares @ values
  held, sums = np.bincount(groups, shares), np.bincount(groups, shares * (values - mean))
  without = -sums / (1 - held)  # mean without the group, minus the mean
  size = len(held)
  return float((size - 1) / size * (without**2).sum()), max(1.0, effective(held) - 1)


def effective(shares: np.ndarray) -> float:
  """How many groups of equal shares would know a variance as well: (sum f^2)^2 / sum f^4."""
  squares = np.asarray(shares, np.float64) ** 2
  return float(squares.sum() ** 2 / (squares**2).sum())


def by_chance(estimates: Mapping[str, Estimate], level: float = 0.95) -> tuple[list[str], list[str]]:
  """(names of the intervals that exclude 0, those that still do with Holm's correction for all of them).

  Holm 1979: the k-th smallest of m p values is held against (1 - level) / (m - k + 1), until one fails.

  Args:
    estimates: name -> estimate; those without an interval count for nothing.
    level: of each interval, and of all together.
  """
  known = sorted((one.p, name) for name, one in estimates.items() if not math.isnan(one.p))
  alone = {name for p, name in known if p < 1 - level}
  together = set()
  for place, (p, name) in enumerate(known):
    if p >= (1 - level) / (len(known) - place):
      break
    together.add(name)
  return [name for name in estimates if name in alone], [name for name in estimates if name in together]


def before(tokens: np.ndarray, groups: np.ndarray | None = None, spread: float = DIFFERENCE) -> Estimate:
  """What a test set can see, known before any training: an `Estimate` of difference 0 and without trainings.

  The spread of d_i is not known then, and DIFFERENCE stands for it: others may need more. By token, where few long
  responses may hold most of the tokens.

  Args:
    tokens: [N], response tokens of the test examples, 1 or more.
    groups: int [N], equal for examples that are drawn as a whole.
    spread: nats.
  """
  tokens = np.asarray(tokens, np.float64)
  groups = np.arange(tokens.size) if groups is None else np.unique(groups, return_inverse=True)[1]
  held = np.bincount(groups, tokens) / tokens.sum()
  variance = spread**2 * float((held**2).sum())
  return Estimate(0.0, 0.0, 1.0, variance, max(1.0, effective(held) - 1), tokens.size, len(held))
