"""Geometry of the page's inline pictures: bars and lines that a template draws as SVG.

Across is in per cent of the width and down in pixels, so a picture fills a phone or a screen and its letters keep
their size. Colours are the style sheet's, which knows light from dark.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from in2core_jax.report import table_text
from in2core_jax.report.plots import score_edges

TOP, BOTTOM = 14.0, 184.0  # pixels: the highest value, and zero (or the lowest on a logarithmic axis)
LEFT, RIGHT = 1.0, 99.0  # per cent
_BINS = 50


@dataclasses.dataclass(frozen=True)
class Chart:
  """Shapes of one picture.

  Attributes:
    bars: dicts with x, y, width, height, series (number, for its colour), text (what a pointer over it shows).
    lines: dicts with x1, y1, x2, y2. points: dicts with x, y, text.
    x_ticks: dicts with x, text, anchor, perhaps minor (not shown on a phone). y_ticks: dicts with y, text.
    series: names, in the order of their numbers.
    zero: where influence 0 is across, or None.
  """

  bars: tuple[dict, ...] = ()
  lines: tuple[dict, ...] = ()
  points: tuple[dict, ...] = ()
  x_ticks: tuple[dict, ...] = ()
  y_ticks: tuple[dict, ...] = ()
  series: tuple[str, ...] = ()
  zero: float | None = None


def histogram(scores: np.ndarray, selected: np.ndarray) -> Chart:
  """Stacked histogram of the scores [N], the selected (bool [N]) apart; what lies beyond 99 % is in the outer bars."""
  edges = score_edges(scores, _BINS)
  inside = np.clip(scores, edges[0], edges[-1])
  counts = [np.histogram(inside[part], edges)[0] for part in (selected, ~selected)]
  labels = [f"{_plain(edges[i], 3)} to {_plain(edges[i + 1], 3)}" for i in range(_BINS)]
  chart = bars(labels, {"selected": counts[0].tolist(), "left out": counts[1].tolist()}, gap=0.1)
  shown = np.linspace(edges[0], edges[-1], 5)
  ticks = tuple(_x_tick(LEFT + (RIGHT - LEFT) * i / 4, _plain(value, 2)) for i, value in enumerate(shown))
  zero = float(LEFT - (RIGHT - LEFT) * edges[0] / (edges[-1] - edges[0])) if edges[0] < 0 < edges[-1] else None
  return dataclasses.replace(chart, x_ticks=ticks, zero=zero and _short(zero))


def bars(labels: Sequence[str], series: Mapping[str, Sequence[float]], gap: float = 0.25) -> Chart:
  """Standing bars, one for each label, the series stacked; values are not negative."""
  highest = max(max(sum(column) for column in zip(*series.values(), strict=True)), 1e-300)
  ticks = _round_ticks(highest)
  width, shapes = (RIGHT - LEFT) / len(labels), []
  for place, label in enumerate(labels):
    floor = BOTTOM
    what = ", ".join(f"{table_text.format_value(values[place])} {name}" for name, values in series.items())
    for number, values in enumerate(series.values()):
      height = (BOTTOM - TOP) * values[place] / ticks[-1]
      floor -= height
      if height:
        x = LEFT + width * (place + gap / 2)
        shape = {"x": x, "y": floor, "width": width * (1 - gap), "height": height}
        shapes.append(_rounded(shape) | {"series": number, "text": f"{label}: {what}"})
  every = math.ceil(len(labels) / 10)
  # A phone has no room for every label: the second ones are left out there.
  x_ticks = tuple(
    _x_tick(LEFT + width * (i + 0.5), labels[i]) | {"minor": bool(place % 2)}
    for place, i in enumerate(range(0, len(labels), every))
  )
  y_ticks = tuple({"y": _short(BOTTOM - (BOTTOM - TOP) * v / ticks[-1]), "text": f"{v:,g}"} for v in ticks[1:])
  return Chart(tuple(shapes), x_ticks=x_ticks, y_ticks=y_ticks, series=tuple(series))


def curve(steps: Sequence[int], residuals: np.ndarray) -> Chart:
  """Residuals [steps, Q] over the steps, logarithmic: the median of the queries."""
  values = np.median(residuals, axis=1)
  logs = np.log10(np.maximum(values, 1e-300))
  low, high = math.floor(logs.min()), math.ceil(logs.max())
  high = max(high, low + 1)
  first, last = steps[0], steps[-1]
  x = [LEFT + (RIGHT - LEFT) * (step - first) / (last - first) for step in steps]
  y = [BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low) for value in logs]
  points = [
    _rounded({"x": x[i], "y": y[i]})
    | {"text": f"step {steps[i]}: residual {table_text.format_value(float(values[i]))}"}
    for i in range(len(x))
  ]
  lines = [_rounded({"x1": x[i], "y1": y[i], "x2": x[i + 1], "y2": y[i + 1]}) for i in range(len(x) - 1)]
  x_ticks = [_x_tick(x[i], str(steps[i])) for i in sorted({round(k * (len(x) - 1) / 4) for k in range(5)})]
  every = math.ceil((high - low) / 5)
  y_ticks = [
    {"y": _short(BOTTOM - (BOTTOM - TOP) * (power - low) / (high - low)), "text": f"{10.0**power:g}"}
    for power in range(low, high + 1, every)
  ]
  return Chart((), tuple(lines), tuple(points), tuple(x_ticks), tuple(y_ticks), ("residual",))


_GROUP, _FIRST = 46.0, 16.0  # pixels: of one comparison, and down to its name
_STEPS = (0.25, 0.5, 1, 2, 5, 10, 25)  # per cent between ticks
_FAR = (-75, -50, -25, 0, 25, 50, 100, 200, 300)  # per cent, where no step gives six ticks or fewer
_WIDEST = math.log(4)  # of the axis, each way: what lies beyond is cut off in the picture, not in its text


@dataclasses.dataclass(frozen=True)
class Intervals:
  """Lying intervals around a line that says "as random sets".

  Attributes:
    names: dicts with y and text, one for each comparison. marks: dicts with x, y, low, high (per cent of the width; low
      is None where there is no interval), series, text.
    ticks: dicts with x, text, anchor. zero: where the line is. height: of the picture in pixels. series: names.
  """

  names: tuple[dict, ...]
  marks: tuple[dict, ...]
  ticks: tuple[dict, ...]
  zero: float
  height: float
  series: tuple[str, ...] = ("by token", "by example")


def intervals(
  rows: Sequence[tuple[str, Sequence[tuple[float, float, float]]]], kind: str = "95 % interval"
) -> Intervals:
  """Ratios with their intervals, on a logarithmic axis, with 1 marked.

  Args:
    rows: (name, one (ratio, low, high) for each series); NaN where there is no interval.
    kind: what the intervals are called.
  """
  logs = [math.log(value) for _, ratios in rows for ratio in ratios for value in ratio if value > 0]  # not NaN
  low, high = max(min([*logs, -0.01]), -_WIDEST), min(max([*logs, 0.01]), _WIDEST)
  room = 0.06 * (high - low)
  place = lambda ratio: (  # noqa: E731
    LEFT + (RIGHT - LEFT) * (min(max(math.log(ratio), low), high) - low + room) / (high - low + 2 * room)
  )
  names, marks = [], []
  for number, (name, ratios) in enumerate(rows):
    top = _FIRST + _GROUP * number
    names.append({"y": top, "text": name})
    for series, (ratio, *bounds) in enumerate(ratios):
      if math.isnan(ratio):
        continue
      known = not math.isnan(bounds[0])
      x = _rounded({"x": place(ratio), "y": top + 10 + 12 * series})
      ends = _rounded({"low": place(bounds[0]), "high": place(bounds[1])}) if known else {"low": None, "high": None}
      text = f"{name}, {Intervals.series[series]}: {_plain(ratio, 3)} times random's"
      text += f", {kind} {_plain(bounds[0], 3)} to {_plain(bounds[1], 3)}" if known else ", without an interval"
      marks.append(x | ends | {"series": series, "text": text})
  ticks = _change_ticks(place, low, high)
  return Intervals(tuple(names), tuple(marks), ticks, _short(place(1)), _FIRST + _GROUP * len(rows) + 20)


def _change_ticks(place: Callable[[float], float], low: float, high: float) -> tuple[dict, ...]:
  """Round changes in per cent inside the axis, from 0 outwards, with room between their letters."""
  least, most = (100 * math.expm1(end) for end in (low, high))
  step = next((step for step in _STEPS if most - least <= 6 * step), None)
  changes = _FAR if step is None else [step * i for i in range(math.ceil(least / step), math.floor(most / step) + 1)]
  kept: list[tuple[float, float]] = []
  for change in sorted(changes, key=abs):
    x = place(1 + change / 100)
    if least <= change <= most and all(abs(x - other) > 12 for other, _ in kept):
      kept.append((x, change))
  return tuple(_x_tick(x, f"{change:+g} %" if change else "0") for x, change in sorted(kept))


def _round_ticks(highest: float) -> list[float]:
  """0 and two to five round values up to the first that is not below `highest`."""
  power = 10.0 ** math.floor(math.log10(highest))
  step = next(power * factor for factor in (0.25, 0.5, 1, 2, 2.5) if highest <= 4 * power * factor)
  return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _x_tick(x: float, text: str) -> dict:
  anchor = "start" if x < LEFT + 4 else "end" if x > RIGHT - 4 else "middle"
  return {"x": _short(x), "text": text, "anchor": anchor}


def _plain(value: float, digits: int) -> str:
  """A value rounded to significant digits, without an exponent up to a million."""
  return f"{float(f'{value:.{digits}g}'):g}"


def _rounded(shape: Mapping[str, float]) -> dict[str, float]:
  return {name: _short(value) for name, value in shape.items()}


def _short(value: float) -> float:
  return round(float(value), 2)
