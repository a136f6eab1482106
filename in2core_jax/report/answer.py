"""The first screen of a select run's report: use this set, take random examples, or cannot tell, and why.

Where models were retrained on the set, the answer is what their intervals allow. Where none was, it is what the
measured distance between evaluation and training set says of such sets elsewhere, and that nothing was checked is said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from in2core_jax.errors import how_many
from in2core_jax.evaluation.tries import LEAST_GAIN
from in2core_jax.report import table_text
from in2core_jax.report.facts import SelectRun

USE, RANDOM, UNCLEAR = "Use this set", "Take random examples", "Cannot tell"
_DRAWN = ("random", "random without copies", "length_matched_random")  # rules that look at no evaluation example
# Evaluation examples from which on "of the same kind" is more than "too few to see": of a source that is 43 % of a
# pool, 40 differed from it in 15 of 20 draws, 20 in none.
ENOUGH_QUERIES = 40
# Squared distance beyond which no evaluation set was whose kind is in the pool: eight of them had 0.36 at most.
FAR = 0.4
_MEASURED_SHARE = 0.1  # of a pool: the largest choice whose worth was measured for such sets (docs/selection.md)
_NAMED = 6  # comparisons that a sentence lists
_MOST_ROWS = 8  # comparisons in the picture


@dataclasses.dataclass(frozen=True)
class Answer:
  """What to do with the selection.

  Attributes:
    word: `USE`, `RANDOM` or `UNCLEAR`.
    why: the reason, as the rest of the sentence.
    more: further sentences.
  """

  word: str
  why: str
  more: tuple[str, ...] = ()

  def __str__(self) -> str:
    return f"{self.word}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Gain:
  """How a retrained set did against random sets, as ratios of test perplexities; NaN bounds where there is no interval.

  Attributes:
    name: what was trained on.
    by_token, by_example: (ratio, low, high).
  """

  name: str
  by_token: tuple[float, float, float]
  by_example: tuple[float, float, float]


def answer(run: SelectRun) -> Answer:
  """The answer of a run."""
  if run.retrain is not None:
    return _from_retraining(run)
  return _from_distance(run)


# ------------------------------------------------------------------------------------------------ with a retraining


def _ratio(row: Mapping, to: str) -> tuple[float, float, float]:
  """(ratio, low, high) of a row of `verdict.summarise`, perhaps read from JSON, where NaN is null."""
  return tuple(math.nan if row.get(key) is None else float(row[key]) for key in (to, f"{to}_low", f"{to}_high"))


def _title(row: Mapping, rows: Sequence[Mapping]) -> str:
  """What tells a row's comparison from the others."""
  several = [name for name in ("equal", "fraction") if len({other.get(name) for other in rows}) > 1]
  words = {"equal": lambda value: f"equal {value}", "fraction": lambda value: f"{100 * value:.3g} %"}
  return ", ".join(words[name](row[name]) for name in several if row.get(name) is not None)


def _own(run: SelectRun) -> list[Mapping]:
  """The rows of the retraining's table that are of this selection."""
  name = run.retrain.get("candidate", run.summary["policy"])
  return [row for row in run.retrain["table"] if row["policy"] == name]


def gains(run: SelectRun) -> list[Gain]:
  """This set and full data against random sets, for each comparison; empty without any.

  Of more than `_MOST_ROWS` comparisons those of the first thing that is held equal.
  """
  if run.retrain is None:
    return []
  table, ours, found = run.retrain["table"], _own(run), []
  shown = ours if len(ours) <= _MOST_ROWS else [row for row in ours if row.get("equal") == ours[0].get("equal")]
  for row in shown:
    title = _title(row, ours)
    found.append(_gain(f"This set{f', {title}' if title else ''}", row))
    if len(ours) == 1:
      same = [other for other in table if other["policy"] == "full" and _group(other) == _group(row)]
      found += [_gain("All data", other) for other in same]
  return [gain for gain in found if not (math.isnan(gain.by_token[0]) and math.isnan(gain.by_example[0]))]


def _gain(name: str, row: Mapping) -> Gain:
  return Gain(name, _ratio(row, "to_random"), _ratio(row, "example_to_random"))


def _group(row: Mapping) -> tuple:
  return row.get("equal"), row.get("fraction")


def change(ratio: float) -> str:
  """A ratio of perplexities in words: "3.2 % lower"."""
  if ratio >= 2:
    return f"{ratio:.3g} times as high"
  return f"{abs(100 * (ratio - 1)):.2g} % {'higher' if ratio >= 1 else 'lower'}"


def _shown(ratio: tuple[float, float, float]) -> str:
  return f"{change(ratio[0])} (95 % interval {change(ratio[1])} to {change(ratio[2])})"


def _sign(ratio: tuple[float, float, float]) -> int:
  """-1 where the interval is below 1 (better) and `LEAST_GAIN` is gained, 1 where it is above, else 0."""
  if ratio[1] > 1:
    return 1
  return -1 if ratio[2] < 1 and ratio[0] <= 1 - LEAST_GAIN else 0


def _from_retraining(run: SelectRun) -> Answer:
  rows = _own(run)
  if not rows:
    return Answer(UNCLEAR, "no model was retrained on this set in this evaluation.")
  if all(math.isnan(_ratio(row, "to_random")[0]) for row in rows):
    return Answer(UNCLEAR, "no random set was retrained to compare with. Add random to --policies of evaluate.")
  known = [row for row in rows if not math.isnan(_ratio(row, "to_random")[1])]
  if not known:
    return _without_interval(rows, run.retrain["table"])
  if len(rows) > 1:
    return _many(known, rows)
  return _one(rows[0], run.retrain["table"])


def _without_interval(rows: Sequence[Mapping], table: Sequence[Mapping]) -> Answer:
  seen = (
    f"retrained on this set, the test perplexity is {change(_ratio(rows[0], 'to_random')[0])} than with random sets"
  )
  if len(rows) > 1:
    seen = f"{len(rows)} comparisons with random sets were made"
  why = f"{seen}, but without an interval this may be chance. Use several --seeds, such as 0,1,2."
  return Answer(UNCLEAR, why, tuple(_fewer_tokens(rows[0], table)) if len(rows) == 1 else ())


def _one(row: Mapping, table: Sequence[Mapping]) -> Answer:
  """One comparison with random sets: its signs by token and by example decide."""
  token, example = _ratio(row, "to_random"), _ratio(row, "example_to_random")
  signs = {_sign(token), _sign(example)}
  word = UNCLEAR if signs in ({0}, {-1, 1}) else USE if -1 in signs else RANDOM
  on = "retrained on it" if word == USE else "retrained on this set"
  lead = f"{on}, the test perplexity by token is {_shown(token)} than with random sets"
  more = [f"By example it is {_shown(example)}.", *_against_full(row), *_fewer_tokens(row, table)]
  if signs == {0}:
    little = token[2] < 1 or example[2] < 1
    no_reason = f"Less than {100 * LEAST_GAIN:g} % is no reason to prefer it"
    why = no_reason if little else "The interval includes 0: it may be chance"
    return Answer(word, f"{lead}. {why}.", tuple(more))
  if signs == {-1, 1}:
    return Answer(word, f"{lead}, but by example it is the other way round.", tuple(more))
  if _sign(token) == 0:  # the one by example has decided: it comes first
    lead = f"{on}, the test perplexity by example is {_shown(example)} than with random sets"
    more[0] = f"By token it is {_shown(token)}."
  return Answer(word, f"{lead}.", tuple(more))


def _against_full(row: Mapping) -> list[str]:
  ratio = _ratio(row, "to_full")
  if math.isnan(ratio[0]):
    return []
  if math.isnan(ratio[1]):
    return [f"Against all data it is {change(ratio[0])} by token, without an interval."]
  return [f"Against all data it is {_shown(ratio)} by token."]


def _fewer_tokens(row: Mapping, table: Sequence[Mapping]) -> list[str]:
  random = [other for other in table if other["policy"] == "random" and _group(other) == _group(row)]
  theirs = random[0].get("trained_tokens", 0) if random else 0
  if not theirs or 0.9 <= row["trained_tokens"] / theirs <= 1.1:
    return []
  return [f"It was trained on {row['trained_tokens'] / theirs:.0%} of the response tokens of the random sets."]


def _many(known: Sequence[Mapping], rows: Sequence[Mapping]) -> Answer:
  """Several comparisons: a plain answer only where all intervals agree."""
  calls = {
    _title(row, rows): (_sign(_ratio(row, "to_random")), _sign(_ratio(row, "example_to_random"))) for row in known
  }
  better = [title for title, signs in calls.items() if -1 in signs and 1 not in signs]
  worse = [title for title, signs in calls.items() if 1 in signs and -1 not in signs]
  count = f"{how_many(len(calls), 'comparison')} with random sets"
  if len(better) == len(calls):
    return Answer(USE, f"retrained on it, models are better in all {count}.")
  if worse and not better:
    return Answer(RANDOM, f"retrained on this set, models are worse in {len(worse)} of {count} and better in none.")
  if not better and not worse:
    return Answer(
      UNCLEAR, f"none of {count} shows a difference beyond its interval, or a gain of {100 * LEAST_GAIN:g} %."
    )
  more = [f"{word}: {_listed(titles)}." for word, titles in (("Better", better), ("Worse", worse)) if titles]
  why = f"it depends. Models are better in {len(better)} of {count} and worse in {len(worse)}."
  return Answer(UNCLEAR, why, tuple(more))


def _listed(titles: Sequence[str]) -> str:
  more = f"; and {len(titles) - _NAMED} more" if len(titles) > _NAMED else ""
  return "; ".join(titles[:_NAMED]) + more


# --------------------------------------------------------------------------------------------- without a retraining


def _from_distance(run: SelectRun) -> Answer:
  summary, drawn = run.summary, run.rule in _DRAWN
  apart, other_kind = summary.get("apart"), summary.get("another_kind")
  check = "Nothing was retrained. To check, run evaluate with this run in --select_runs and --policies=full,random."
  own = ("This set is a random draw, so it can be used as one.",) if drawn else ()
  if apart is None or other_kind is None:
    if drawn:
      return Answer(RANDOM, "that is what this set is. No rule has selected it.", (check,))
    why = f"nothing in this run measures what the rule {run.rule} is worth here."
    return Answer(UNCLEAR, why, (check,))
  seen = (
    f"squared distance {table_text.format_value(apart['distance'], 2)}, p = {table_text.format_value(apart['p'], 2)}"
  )
  if other_kind:
    return _nothing_like_it(seen, check) if apart["distance"] > FAR else _other_kind(run, seen, check)
  few = summary.get("queries")
  if few is not None and few < ENOUGH_QUERIES:
    why = how_many(few, "evaluation example[s] [is|are] too few to show whether [it differs|they differ] in kind")
    why += f" from the training set ({seen})."
    return Answer(UNCLEAR, why, (*own, check))
  why = (
    f"the evaluation set is of the same kind as the training set, as far as gradients and hidden states show ({seen}). "
    "For such sets no rule was reliably better than random examples."
  )
  return Answer(RANDOM, why, (*own, check))


def _nothing_like_it(seen: str, check: str) -> Answer:
  why = (
    f"nothing in the training set seems to be like the evaluation set ({seen}). Where there was, the squared distance "
    f"was below {FAR:g}. The set has what is nearest to it, which may be of no use."
  )
  return Answer(UNCLEAR, why, ("Add training data of the evaluation set's kind, or look at the examples below.", check))


def _other_kind(run: SelectRun, seen: str, check: str) -> Answer:
  share = float(run.selected.mean())
  measured = (
    "In the measurements of docs/selection.md, choices of 2.5 and 10 % by hybrid did better than random ones on three "
    "of four such sets, by example."
  )
  if run.rule != "hybrid":
    why = (
      f"the evaluation set is of another kind than the training set ({seen}), but the rule {run.rule} is not the one"
    )
    return Answer(UNCLEAR, f"{why} that was measured for such sets.", (measured, check))
  more = [measured, check]
  if share > _MEASURED_SHARE:
    more.insert(1, f"This choice is {share:.0%} of the training set; choices of that size were not measured.")
  why = f"the evaluation set is of another kind than the training set ({seen}), and this set was chosen to be like it."
  return Answer(USE, why, tuple(more))


# ---------------------------------------------------------------------------------------------------- three numbers


def numbers(run: SelectRun) -> list[dict]:
  """Kept, tokens and duplicates: dicts of value, what, note."""
  size, kept = len(run.records), int(run.selected.sum())
  tokens, all_tokens = int(run.response_tokens[run.selected].sum()), int(run.response_tokens.sum())
  same = run.copies[run.selected]
  return [
    {"value": f"{kept:,}", "what": "examples kept", "note": f"{kept / size:.1%} of {how_many(size, 'example')}"},
    {
      "value": f"{tokens:,}",
      "what": "tokens kept",
      "note": f"{tokens / max(all_tokens, 1):.1%} of {how_many(all_tokens, 'response token')}",
    },
    {
      "value": f"{len(same) - len(np.unique(same)):,}",
      "what": "duplicates",
      "note": f"kept; {size - len(np.unique(run.copies)):,} in the training set",
    },
  ]
