"""Retrained models -> a table, plain sentences, and what they cannot say: how large a difference would have been seen.

Every interval is that of `paired`: it holds for new test examples and for new trainings, by token and by example, and a
difference is called one only where its interval excludes it.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from in2core_jax.errors import how_many
from in2core_jax.evaluation.paired import BY, SEEN, Estimate, Paired, by_chance
from in2core_jax.evaluation.statistics import FULL, RANDOM, Interval, RetrainRow, by_policy

LABELS = {RANDOM: "random", FULL: "full data"}
FIELDS = {"token": "perplexity", "example": "example_perplexity"}  # of a row
_RATIOS = {"token": "to_", "example": "example_to_"}  # keys of the ratios to a yardstick
_NAMED = 12  # comparisons that a sentence lists
BRACKETS = (
  "In brackets: 95 % intervals that hold for new test examples and for new trainings. That of a perplexity itself is "
  "wide, because test examples differ in difficulty; policies are compared by their ratio on the same examples."
)


class Comparison:
  """Retrained models that have something in common, and the intervals of what sets them apart."""

  def __init__(self, rows: Sequence[RetrainRow]):
    """Groups the rows.

    Args:
      rows: of all policies; without losses by test example there are no intervals.

    Raises:
      UserError: no rows, two of one policy and seed, or models that were judged on different examples.
    """
    self.groups = by_policy(rows)
    self._paired = None
    if all(np.size(row.loss_per_test_example) and np.size(row.test_tokens) for row in rows):
      losses = {name: np.stack([row.loss_per_test_example for row in own]) for name, own in self.groups.items()}
      groups = rows[0].test_groups if np.size(rows[0].test_groups) else None
      self._paired = Paired(losses, rows[0].test_tokens, groups)

  def _values(self, name: str, by: str) -> np.ndarray:
    return np.array([getattr(row, FIELDS[by]) for row in self.groups[name]], np.float64)

  def mean(self, name: str, by: str) -> Estimate:
    """Log of a policy's perplexity."""
    return self._paired.mean(name, by) if self._paired else _bare(np.log(self._values(name, by)).mean())

  def difference(self, name: str, other: str, by: str) -> Estimate:
    """Log of the ratio of a policy's perplexity to another's."""
    if self._paired:
      return self._paired.difference(name, other, by)
    return _bare(np.log(self._values(name, by)).mean() - np.log(self._values(other, by)).mean())

  @functools.cached_property
  def pairs(self) -> list[tuple[str, str]]:
    """(policy, yardstick) of everything that is judged: full data against random sets, the others against both."""
    there = [name for name in (RANDOM, FULL) if name in self.groups]
    return [(name, other) for name in self.groups for other in there if name != RANDOM and name != other]

  def estimates(self, title: str = "") -> dict[str, Estimate]:
    """Every comparison by its name in words."""
    before = f"{title}: " if title else ""
    return {
      f"{before}{name} against {LABELS[other]} by {by}": self.difference(name, other, by)
      for name, other in self.pairs
      for by in BY
    }


def _bare(mean: float) -> Estimate:
  return Estimate(float(mean), *[math.nan] * 4, 0, 0, "no losses by test example are kept")


# ---- the table -----------------------------------------------------------------------


def summarise(rows: Sequence[RetrainRow], level: float = 0.95) -> list[dict]:
  """One plain dict per policy, in order of first appearance: means over seeds, and intervals of the perplexities.

  Keys: policy, seeds, examples, tokens, response_tokens, steps, trained_tokens; for perplexity and example_perplexity
  the mean, `_low` and `_high` (for new test examples and new trainings), `_min` and `_max` over the seeds; ratios to
  random sets and to full data where these are there: to_random, to_full by token, example_to_random, example_to_full by
  example, each with `_low` and `_high`. NaN where there is no interval, or nothing to compare.
  """
  compared, table = Comparison(rows), []
  for policy, group in compared.groups.items():
    summary = {"policy": policy, "seeds": len(group)}
    for name in ("examples", "tokens", "response_tokens", "steps", "trained_tokens"):
      summary[name] = round(float(np.mean([getattr(row, name) for row in group])))
    for by, name in FIELDS.items():
      values, interval = [getattr(row, name) for row in group], compared.mean(policy, by).ratio(level)
      summary |= {name: float(np.mean(values)), f"{name}_low": interval.low, f"{name}_high": interval.high}
      summary |= {f"{name}_min": float(min(values)), f"{name}_max": float(max(values))}
    for other in (name for name in (RANDOM, FULL) if name in compared.groups):
      for by, prefix in _RATIOS.items():
        nothing = Interval(math.nan, math.nan, math.nan, 0, level)
        ratio = nothing if policy == other else compared.difference(policy, other, by).ratio(level)
        name = prefix + other
        summary |= {name: ratio.mean, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
    table.append(summary)
  return table


def shown(ratio: Interval) -> str:
  """A ratio with its interval, for a cell."""
  return f"{ratio.mean:.3f}" if math.isnan(ratio.low) else f"{ratio.mean:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


# ---- sentences -----------------------------------------------------------------------


def verdict(rows: Sequence[RetrainRow], level: float = 0.95) -> str:
  """Plain sentences: does each policy beat random sets, and how does it compare with full data?

  A perplexity is called lower or higher, by token or by example, only when the interval of its ratio excludes 1.
  Beside it belong `many_comparisons`, which counts the intervals of all verdicts that are read together, and
  `sensitivity`, which says how large a difference would have been seen.
  """
  compared = Comparison(rows)
  groups = compared.groups
  others = [name for name in groups if name not in (RANDOM, FULL)]
  lines = [_yardsticks(compared, level)]
  if not others:
    lines.append("No other policy was retrained, so there is no selection to judge.")
  for name in others:
    parts = [clause(compared, name, other, LABELS[other], level) for other in (RANDOM, FULL) if other in groups]
    perplexities = _spread([row.perplexity for row in groups[name]], "seed")
    lines.append(f"{name}: perplexity {perplexities}" + ("; " + "; ".join(parts) if parts else "") + ".")
    if RANDOM in groups:
      lines += _token_caveat(name, groups[name], groups[RANDOM])
  return "\n".join(lines)


def _spread(values: Sequence[float], unit: str) -> str:
  if len(values) == 1:
    return f"{values[0]:.3f} (one {unit})"
  return f"{np.mean(values):.3f} (mean of {len(values)} {unit}s, {min(values):.3f} to {max(values):.3f})"


def _yardsticks(compared: Comparison, level: float) -> str:
  parts = []
  for name, label in ((FULL, "Full data"), (RANDOM, "Random sets")):
    values = [row.perplexity for row in compared.groups.get(name, ())]
    said = f"perplexity {_spread(values, 'seed')}" if values else "not retrained"
    if values and name == FULL and RANDOM in compared.groups:
      said += f"; {clause(compared, FULL, RANDOM, LABELS[RANDOM], level)}"
    parts.append(f"{label}: {said}.")
  return " ".join(parts)


def clause(compared: Comparison, name: str, other: str, label: str, level: float = 0.95) -> str:
  """One clause, by token and by example: `name` against `other`, which is called `label`."""
  token, example = (compared.difference(name, other, by) for by in BY)
  if token.note:
    ratios = f"{math.exp(token.mean):.3f} times {label}'s by token and {math.exp(example.mean):.3f} times by example"
    return f"{ratios}, without an interval: {token.note}"
  first, second = word(token, level), word(example, level)
  ratio = token.ratio(level)
  by_token = f"{ratio.mean:.3f} times {label}'s, {level:.0%} interval {ratio.low:.3f} to {ratio.high:.3f}"
  ratio = example.ratio(level)
  by_example = f"{ratio.mean:.3f} times, {ratio.low:.3f} to {ratio.high:.3f}"
  if first == second:
    return f"{first} {label}, by token ({by_token}) and by example ({by_example})"
  return f"by token {first} {label} ({by_token}), but by example {second} {label} ({by_example})"


def word(estimate: Estimate, level: float = 0.95) -> str:
  """What the interval of a ratio allows to say."""
  ratio = estimate.interval(level)
  if ratio.high < 0:
    return "lower (better) than"
  return "higher (worse) than" if ratio.low > 0 else "cannot be distinguished from"


def _token_caveat(name: str, group: Sequence[RetrainRow], random: Sequence[RetrainRow]) -> list[str]:
  ours, theirs = (float(np.mean([row.trained_tokens for row in rows])) for rows in (group, random))
  if theirs <= 0 or 0.9 <= ours / theirs <= 1.1:
    return []
  return [f"  Mind that {name} trained on {ours / theirs:.0%} of the response tokens that random did."]


def many_comparisons(tables: Mapping[str, Sequence[RetrainRow]], level: float = 0.95) -> list[str]:
  """One sentence, for all verdicts that are read together: how many of their calls are expected to be chance.

  Args:
    tables: title, empty for a single one -> the rows behind its verdict.
    level: of its intervals.

  Returns:
    The sentence, or nothing where at most one comparison has an interval.
  """
  every: dict[str, Estimate] = {}
  for title, rows in tables.items():
    every |= Comparison(rows).estimates(title) if rows else {}
  return chance_sentence(every, level)


def chance_sentence(every: Mapping[str, Estimate], level: float = 0.95) -> list[str]:
  """`many_comparisons` of comparisons by name."""
  count = sum(not one.note for one in every.values())
  if count < 2:
    return []
  alone, together = by_chance(every, level)
  said = (
    f"{count} comparisons by token or by example, each at {level:.0%}: where nothing differs, {_some(count, level)} of "
    f"{count} intervals exclude 1 by chance; {len(alone)} do"
  )
  if not alone:
    return [f"{said}."]
  named = "; ".join(together[:_NAMED]) + (f"; and {len(together) - _NAMED} more" if len(together) > _NAMED else "")
  return [f"{said}. With Holm's correction for all {count}, {len(together)} do{f': {named}' if named else ''}."]


def _some(count: int, level: float) -> str:
  return f"about {count * (1 - level):.2g}"


def sensitivity(tables: Sequence[Sequence[RetrainRow]]) -> list[str]:
  """One sentence: the smallest difference that these test examples and trainings could have shown, and what 1 % takes.

  Args:
    tables: the rows behind each verdict.

  Returns:
    The sentence, or nothing where no comparison has an interval.
  """
  every = [Comparison(rows) for rows in tables if rows]
  return seen_sentence([one.difference(*pair, "token") for one in every for pair in one.pairs])


def seen_sentence(estimates: Sequence[Estimate]) -> list[str]:
  """`sensitivity` of comparisons by token: the median over them."""
  known = [one for one in estimates if not one.note]
  if not known:
    return []
  middle = lambda values: float(np.median(list(values)))  # noqa: E731
  seen, alone = middle(one.seen for one in known), middle(one.seen_by_seeds for one in known)
  size, count = middle(one.examples_for() for one in known), known[0].count
  said = (
    f"Measured on these {count:,} test examples: a difference of {percent(seen)} by token is seen in four of five "
    f"cases, a smaller one less often (median of {how_many(len(known), 'comparison')})"
  )
  if seen <= SEEN:
    return [f"{said}."]
  needs = f"about {rounded(size):,} test examples" if size > count else ""
  if alone > SEEN:
    seeds = f"more --seeds (the trainings alone spread so far that {percent(alone)} is the least)"
    needs = f"{needs} and {seeds}" if needs else seeds
  return [f"{said}. To see 1 % takes {needs or 'a little more of both, test examples and --seeds'}."]


def percent(difference: float) -> str:
  """A difference of log losses as a change of the perplexity."""
  if difference < math.log(2):
    return f"{100 * math.expm1(difference):.2g} %"
  return f"a factor of {math.exp(min(difference, 700.0)):.3g}"


def rounded(size: float) -> int:
  """A number of examples to two digits, rounded up."""
  step = 10 ** max(0, math.floor(math.log10(max(size, 1))) - 1)
  return int(math.ceil(size / step) * step)
