"""recommendation.html: one sentence, one picture, one table; a file without network and without a script."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from in2core_jax.report import charts
from in2core_jax.report.templating import carried, environment

_BY = ("token", "example")
_AGAINST = {"random": "random sets", "length_matched": "random sets of its lengths", "full": "all of the data"}
_SHOWN = 10  # candidates in the picture, the best ones


def page(found: Mapping[str, Any], about: Mapping[str, str]) -> str:
  """The page, as HTML.

  Args:
    found: what recommendation.json holds.
    about: rule -> what it takes, in words.
  """
  style, style_hash = carried("report.css")
  text = (
    environment()
    .get_template("recommendation.html.j2")
    .render(
      style=style,
      style_hash=style_hash,
      found=found,
      numbers=numbers(found),
      gain=charts.intervals(gains(found), "corrected interval"),
      rows=rows(found, about),
    )
  )
  return text.encode("utf-8", "replace").decode()  # a lone surrogate has no form in UTF-8


def gains(found: Mapping[str, Any]) -> list[tuple[str, list[tuple[float, float, float]]]]:
  """(name, ratios to random sets by token and by example) of the best candidates, best first."""
  named = [(_name(row), [_numbers(row["ratio_to_random"][by]) for by in _BY]) for row in found["candidates"]]
  others = [pair for row, pair in zip(found["candidates"], named, strict=True) if row["rule"] != "random"]
  return sorted(others, key=lambda pair: sum(ratio[0] for ratio in pair[1]))[:_SHOWN]


def numbers(found: Mapping[str, Any]) -> list[dict[str, str]]:
  """The few numbers under the sentence."""
  share = f"{100 * found['budget']:.3g} % of the pool"
  listed = [{"what": "examples", "value": f"{found['examples']:,}", "note": share}]
  for what, title in _AGAINST.items():
    ratio, test = (found[part][f"ratio_to_{what}"]["example"] for part in ("validation", "test"))
    listed.append(
      {
        "what": f"times the perplexity of {title}",
        "value": f"{ratio['estimate']:.3f}",
        "note": f"predicted; on the test set {shown(test)}",
      }
    )
  return listed


def rows(found: Mapping[str, Any], about: Mapping[str, str]) -> list[dict[str, Any]]:
  """The table of all candidates."""
  return [
    {
      "candidate": _name(row),
      "takes": about.get(row["rule"], ""),
      "examples": row["examples"],
      "steps": row["steps"],
      "seeds": len(row["seeds"]),
      "to random, by token": shown(row["ratio_to_random"]["token"]),
      "to random, by example": shown(row["ratio_to_random"]["example"]),
      "to full, by token": shown(row["ratio_to_full"]["token"]),
      "to full, by example": shown(row["ratio_to_full"]["example"]),
    }
    for row in found["candidates"]
  ]


def shown(ratio: Mapping[str, float | None]) -> str:
  """A ratio with its interval, for a cell."""
  if ratio["low"] is None or ratio["low"] == ratio["high"]:
    return f"{ratio['estimate']:.3f}"
  return f"{ratio['estimate']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def _numbers(ratio: Mapping[str, float | None]) -> tuple[float, float, float]:
  low, high = (math.nan if ratio[end] is None else ratio[end] for end in ("low", "high"))
  return ratio["estimate"], low, high


def _name(row: Mapping[str, Any]) -> str:
  whole = row["rule"].startswith("full")
  return row["rule"] if whole else f"{row['rule']}, {100 * row['budget']:.3g} %"
