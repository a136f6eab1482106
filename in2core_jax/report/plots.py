"""Figures of reports, as matplotlib figures and their bytes."""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from in2core_jax.errors import UserError, how_many
from in2core_jax.report.table_text import plain_line
from in2core_jax.runs import run_folder

# Okabe and Ito's colours, told apart with every common colour blindness and in print by their lightness.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY = _CYCLE = (
  "#0072B2",
  "#E69F00",
  "#009E73",
  "#D55E00",
  "#56B4E9",
  "#CC79A7",
  "#8A8A8A",
)


_MARKERS = "osD^vPX"


_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "in2core"}


def _figure(width: float = 6.4, height: float = 3.6) -> tuple[Figure, "matplotlib.axes.Axes"]:
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
  axes.set_axisbelow(True)
  return figure, axes


def figure_bytes(figure: Figure, kind: str = "png") -> bytes:
  """The file of a figure; the same figure gives the same bytes (no date inside).

  Raises:
    UserError: a kind other than png or svg.
  """
  if kind not in ("png", "svg"):
    raise UserError(f"figure kind {kind} is unknown; use png or svg")
  out = io.BytesIO()
  with matplotlib.rc_context(_STYLE):
    figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
  return out.getvalue()


def score_histogram_plot(scores: np.ndarray, selected: np.ndarray, unit: str = "influence") -> Figure:
  """Stacked histogram of the scores [N], the selected (bool [N]) apart; the few values beyond 99 % are at the edges."""
  scores, selected = np.asarray(scores, np.float64), np.asarray(selected, bool)
  edges = score_edges(scores, 50)
  inside = np.clip(scores, edges[0], edges[-1])
  figure, axes = _figure()
  labels = [f"selected ({int(selected.sum()):,})", f"left out ({int((~selected).sum()):,})"]
  axes.hist([inside[selected], inside[~selected]], edges, stacked=True, color=[BLUE, ORANGE], label=labels)
  axes.axvline(0, color="black", linewidth=1, linestyle="--")
  axes.set(xlabel=f"{unit} (positive: proponent)", ylabel="examples")
  axes.grid(axis="y", alpha=0.3)
  axes.legend(frameon=False)
  return figure


def curve_plot(
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str, log: str = ""
) -> Figure:
  """Lines with markers, one for each name -> (x, y) or (x, y, low, high) with a band.

  Args:
    series: arrays of equal length; at most seven names stay apart by colour and marker.
    xlabel, ylabel: of the axes. log: "", "x", "y" or "xy".
  """
  figure, axes = _figure()
  for i, (name, (x, y, *band)) in enumerate(series.items()):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    color, every = _CYCLE[i % len(_CYCLE)], max(1, len(x) // 12)
    axes.plot(x, y, color=color, marker=_MARKERS[i % len(_MARKERS)], markevery=every, markersize=5, label=str(name))
    if band:
      axes.fill_between(x, np.asarray(band[0], np.float64), np.asarray(band[1], np.float64), color=color, alpha=0.2)
  axes.set(xlabel=xlabel, ylabel=ylabel)
  if "x" in log:
    axes.set_xscale("log")
    ticks = sorted({float(v) for x, *_ in series.values() for v in x})
    if len(ticks) <= 10:  # a sweep: its own values say more than powers of ten
      axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
      axes.minorticks_off()
  if "y" in log:
    axes.set_yscale("log")
  axes.grid(alpha=0.3)
  if len(series) > 1:
    axes.legend(frameon=False)
  return figure


def bar_plot(labels: Sequence[str], series: Mapping[str, Sequence[float]], xlabel: str) -> Figure:
  """Lying bars, the first label on top, the series of each stacked; labels are shown as they are, shortened.

  Args:
    labels: n names. series: name -> n values, none negative. xlabel: of the axis of values.
  """
  figure, axes = _figure(height=1.4 + 0.26 * len(labels))
  places, left = np.arange(len(labels)), np.zeros(len(labels))
  for color, (name, values) in zip(_CYCLE, series.items(), strict=False):
    axes.barh(places, values, left=left, color=color, label=name)
    left += np.asarray(values, np.float64)
  axes.set_yticks(places, [plain_line(label, 40) for label in labels], parse_math=False)
  axes.invert_yaxis()
  axes.set_xlabel(xlabel)
  axes.grid(axis="x", alpha=0.3)
  if len(series) > 1:
    axes.legend(frameon=False, loc="lower right")
  return figure


def residual_plot(curve: Sequence[float], solver: str = "LiSSA", steps: Sequence[float] | None = None) -> Figure:
  """The solver's residual |(H + damping I) x - v| / |v| over its steps, logarithmic; curve [steps] or [steps, Q]."""
  curve = np.asarray(curve, np.float64)
  curve = curve.reshape(len(curve), -1)
  steps = np.arange(1, len(curve) + 1) if steps is None else steps
  many = [] if curve.shape[1] == 1 else [curve.min(axis=1), curve.max(axis=1)]
  return curve_plot({solver: (steps, np.median(curve, axis=1), *many)}, f"{solver} step", "residual", log="y")


def perplexity_plot(table: Sequence[Mapping], level: float = 0.95) -> Figure:
  """Perplexity of each policy as a point, best on top; the range of random as a band.

  A bar is the interval of the ratio to random sets, times their perplexity: where it holds the dotted line, the two
  cannot be told apart. Perplexities' own intervals overlap for all, since the test examples' difficulty is in them.

  Args:
    table: the output of `verdict.summarise`: dicts with policy, seeds, perplexity, perplexity_min, perplexity_max, and
      to_random_low, to_random_high where there are random sets; NaN bounds draw no interval.
    level: of the intervals, for the caption.
  """
  if not table:
    raise UserError("no retrained models to plot; run the evaluate stage with at least one policy")
  table = sorted(table, key=lambda row: -row["perplexity"])
  names = max(len(row["policy"]) for row in table)
  random = [row["perplexity"] for row in table if row["policy"] == "random"]
  figure, axes = _figure(max(6.4, 5.4 + 0.09 * names), 1.4 + 0.36 * len(table))
  for place, row in enumerate(table):
    color = {"random": VERMILION, "full": "black"}.get(row["policy"], BLUE)
    low, high = row.get("to_random_low", math.nan), row.get("to_random_high", math.nan)
    if not math.isnan(low):
      axes.hlines(place, low * random[0], high * random[0], color=color, linewidth=2)
    axes.plot(row["perplexity"], place, "o", color=color, markersize=7)
    axes.annotate(
      f"{row['perplexity']:.2f}", (row["perplexity"], place), (0, 6), textcoords="offset points", ha="center"
    )
    if row["policy"] == "random":
      label = f"range of {how_many(row['seeds'], 'random set')}"
      axes.axvspan(row["perplexity_min"], row["perplexity_max"], color=VERMILION, alpha=0.15, linewidth=0, label=label)
      axes.axvline(row["perplexity"], color=VERMILION, linestyle=":", linewidth=1)
      axes.legend(frameon=False, loc="upper right")
  axes.set_yticks(range(len(table)), [row["policy"] for row in table])
  axes.set_ylim(-0.6, len(table) - 0.3)
  bars = f"\nbars: {level:.0%} intervals of the difference to random sets, for new test examples and trainings"
  axes.set_xlabel("test perplexity (lower is better)" + (bars if random else ""))
  axes.grid(axis="x", alpha=0.3)
  return figure


def sweep_plot(table: Sequence[Mapping]) -> Figure:
  """Perplexity of each policy against the share of the examples that it kept; bands as the bars of `perplexity_plot`.

  Args:
    table: dicts as for `perplexity_plot`, with `fraction` besides; full data is drawn as a level.
  """
  figure, axes = _figure(7.2, 4.6)
  names = [name for name in dict.fromkeys(row["policy"] for row in table) if name != "full"]
  random = {row["fraction"]: row["perplexity"] for row in table if row["policy"] == "random"}
  for number, name in enumerate(names):
    rows = sorted((row for row in table if row["policy"] == name), key=lambda row: row["fraction"])
    x, y = [row["fraction"] for row in rows], [row["perplexity"] for row in rows]
    color = "black" if name == "random" else _CYCLE[number % len(_CYCLE)]
    style = "-" if number < len(_CYCLE) else "--"
    axes.plot(x, y, style, color=color, marker=_MARKERS[number % len(_MARKERS)], markersize=5, label=name)
    level = [random.get(row["fraction"], math.nan) for row in rows]
    bounds = ([row.get(f"to_random_{side}", math.nan) for row in rows] for side in ("low", "high"))
    low, high = (np.array(level) * np.array(bound) for bound in bounds)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)  # NaN draws nothing
  full = [row["perplexity"] for row in table if row["policy"] == "full"]
  if full:
    axes.axhline(full[0], color="black", linestyle=":", label="full")
  means = [row["perplexity"] for row in table]
  room = 0.15 * (max(means) - min(means)) or 1.0
  axes.set_ylim(min(means) - room, max(means) + room)  # the band of a few seeds may be far wider
  ticks = sorted({row["fraction"] for row in table})
  axes.set_xscale("log")
  axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
  axes.minorticks_off()
  bands = "\nbands: 95 % intervals of the difference to random sets, for new test examples and trainings"
  axes.set(xlabel="training examples kept" + (bands if random else ""), ylabel="test perplexity (lower is better)")
  axes.grid(alpha=0.3)
  axes.legend(frameon=False, fontsize="small", ncols=2)
  return figure


def score_edges(scores: np.ndarray, bins: int) -> np.ndarray:
  """Edges between the 0.5th and 99.5th percentile, so that a few extreme scores do not flatten the picture."""
  low, high = np.quantile(scores, [0.005, 0.995])
  if not high > low:
    low, high = low - max(abs(low), 1.0) * 1e-3, high + max(abs(high), 1.0) * 1e-3
  return np.linspace(low, high, bins + 1)


def write_figure(run_dir: run_folder.RunDir, name: str, figure: Figure) -> None:
  """Writes plots/NAME.svg, for papers, and plots/NAME.png."""
  for kind in ("svg", "png"):
    run_dir.write_bytes(f"plots/{name}.{kind}", figure_bytes(figure, kind))
