"""What `ablate_layers` says: which choice is enough, tables and a figure."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from experiments.ablate_layers.settings import AblateLayersSettings
from in2core_jax.evaluation import paired, statistics, verdict
from in2core_jax.pipeline.checks import budget_of
from in2core_jax.pipeline.session import Session
from in2core_jax.report import table_text
from in2core_jax.report.plots import BLUE, GREEN, ORANGE, PURPLE, VERMILION, write_figure
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

SLACK = 1.01  # times all layers' perplexity: a choice is enough where a higher ratio is excluded
AGREES = 0.9  # overlap of the selected sets from which on a choice agrees with all layers
_COLORS = {
  "all": "black",
  "last": BLUE,
  "first": ORANGE,
  "middle": GREEN,
  "spread": PURPLE,
}
_MARKERS = "osD^vPX"


@dataclasses.dataclass(frozen=True)
class Yardsticks:
  """What the choices are held against.

  Attributes:
    perplexity: of full data and of random sets, with intervals.
    notes: how many of all comparisons are expected to be chance, and how large a difference would have been seen.
  """

  perplexity: Mapping[str, statistics.Interval] = dataclasses.field(default_factory=dict)
  notes: Sequence[str] = ()


def name_of(row: Mapping) -> str:
  """What the trainings on a choice are called."""
  return f"{row['solver']}, {row['name']}"


def fill(
  found: Mapping[str, Sequence[dict]], trained: Mapping[str, Sequence[statistics.RetrainRow]]
) -> verdict.Comparison:
  """Puts perplexities, and their ratios to all layers' own choice and to random sets, into the rows."""
  compared = verdict.Comparison([row for rows in trained.values() for row in rows])
  for rows in found.values():
    whole = name_of(rows[0])
    for row in (row for row in rows if name_of(row) in trained):
      name = name_of(row)
      row["perplexity"] = compared.mean(name, "token").ratio()
      row["to random"] = compared.difference(name, statistics.RANDOM, "token").ratio()
      if name != whole:
        row["ratio"], row["ratio by example"] = (compared.difference(name, whole, by).ratio() for by in paired.BY)
  return compared


def notes(found: Mapping[str, Sequence[dict]], compared: verdict.Comparison) -> list[str]:
  """What all comparisons with all layers' own choice say together."""
  pairs = [
    (name_of(row), name_of(rows[0]), by)
    for rows in found.values()
    for row in rows[1:]
    if row["ratio"] is not None
    for by in paired.BY
  ]
  every = {f"{name} against {whole} by {by}": compared.difference(name, whole, by) for name, whole, by in pairs}
  seen = [compared.difference(name, whole, by) for name, whole, by in pairs if by == "token"]
  return [*verdict.chance_sentence(every), *verdict.seen_sentence(seen)]


def worse_than_random(rows: Sequence[dict]) -> list[str]:
  """A warning where all layers' own choice loses to random sets: agreement with it is then no merit."""
  whole, ratio = rows[0]["perplexity"], rows[0].get("to random")
  if whole is None or ratio is None or not ratio.low > 1:
    return []
  return [
    f"Mind that with {rows[0]['solver']} all layers' own highest scores retrain to {whole.mean:.4g}, worse than random "
    f"sets of the size ({verdict.shown(ratio)} times theirs): what agrees with them is as bad. Another policy or other "
    "parameters at which gradients are taken matter more here than layers."
  ]


def agreeing(rows: Sequence[dict]) -> list[dict]:
  """Choices other than all layers and modules that agree with these, the cheapest by FLOPs first."""
  others = [row for row in rows[1:] if row["overlap"] >= AGREES and row["flops"] < rows[0]["flops"]]
  return sorted(others, key=lambda row: row["flops"])


def enough(rows: Sequence[dict]) -> dict | None:
  """The cheapest choice that agrees with all layers and, if retrained, is not worse by its interval of the ratio.

  Where a cheaper one has failed at that, agreement says too little: then only a retrained choice is enough. Without an
  interval (one seed) nothing fails. Not to fail is not to be as good: `sentence` says "enough" only where the interval
  ends below SLACK.

  Args:
    rows: of one solver, all layers and modules first; ratio is the `statistics.Interval` of its perplexity to all
      layers' own, for new test examples and new trainings, or None.
  """
  failed = False
  for row in agreeing(rows):
    ratio = row["ratio"]
    if ratio is None and not failed:
      return row
    if ratio is not None and not ratio.low > 1:
      return row
    failed = True
  return None


def sentence(rows: Sequence[dict]) -> str:
  """How many layers are enough for one solver, with what they save; or that no choice is."""
  whole, row = rows[0], enough(rows)
  if row is None:
    others = agreeing(rows)
    if others:
      tried = ", ".join(one["name"] for one in others if one["perplexity"] is not None)
      rest = ", ".join(one["name"] for one in others if one["perplexity"] is None)
      return (
        f"With {whole['solver']}, no choice is enough: those that agree with all layers and were retrained ({tried}) "
        f"are above all layers' perplexity, {whole['perplexity'].mean:.4g}, by more than the interval of the ratio"
        f"{f'; not retrained: {rest}' if rest else ''}."
      )
    best = max(rows[1:], key=lambda one: one["overlap"])
    return (
      f"With {whole['solver']}, no choice is enough: none that is cheaper than all layers and modules shares "
      f"{AGREES:.0%} of the selected set with them; the nearest, {best['name']}, shares {best['overlap']:.0%}."
    )
  ratio = row["ratio"]
  sure = ratio is not None and ratio.high <= SLACK
  said = (
    f"With {row['solver']}, {row['name']} {'is' if sure else 'may be'} enough: it shares {row['overlap']:.0%} of "
    f"the selected set with all layers and takes {row['flops']:.0%} of the FLOPs and "
    f"{row['bytes'] / whole['bytes']:.0%} of the memory on paper"
  )
  said += "; it was not retrained" if ratio is None else f"; {_retrained(row, whole, ratio)}"
  if row["seconds"] is not None and whole["seconds"] is not None:
    said += (
      f"; its score pass was measured at {row['seconds']:.3g} s instead of {whole['seconds']:.3g} s and "
      f"{row['peak'] / 1e6:.0f} MB instead of {whole['peak'] / 1e6:.0f} MB"
    )
  return said + "."


def _retrained(row: dict, whole: dict, ratio: statistics.Interval) -> str:
  """What the retrained perplexity of a choice says."""
  said = f"retrained perplexity {row['perplexity'].mean:.4g}, all layers' {whole['perplexity'].mean:.4g}"
  if np.isnan(ratio.low):
    return f"{said}, and one training each cannot show a difference"
  said += f", {verdict.shown(ratio)} times"
  if ratio.high < 1:
    return f"{said}, which is lower (better)"
  return said if ratio.high <= SLACK else f"{said}: up to {100 * (ratio.high - 1):.2g} % worse is not excluded"


def table_rows(rows: Sequence[dict]) -> list[dict]:
  """Rows as a reader sees them."""
  return [
    {
      "solver": row["solver"],
      "choice": row["name"],
      "Spearman": row["spearman"],
      "overlap": row["overlap"],
      "FLOPs, share of all": row["flops"],
      "memory on paper, MB": round(row["bytes"] / 1e6),
      "test perplexity": None if row["perplexity"] is None else row["perplexity"].mean,
      "interval": None if row["perplexity"] is None else f"{row['perplexity'].low:.4g} to {row['perplexity'].high:.4g}",
      "to all layers": None if row["ratio"] is None else verdict.shown(row["ratio"]),
      "by example, to all layers": None if row["ratio"] is None else verdict.shown(row["ratio by example"]),
      "score pass, s": row["seconds"],
      "its peak memory, MB": None if row["peak"] is None else round(row["peak"] / 1e6),
    }
    for row in rows
  ]


def figure(found: Mapping[str, Sequence[dict]], yardsticks: Mapping[str, statistics.Interval]) -> Figure:
  """Cost against agreement (left) and against retrained perplexity (right); a row of plots for each solver."""
  made = Figure(figsize=(10, 0.9 + 3.6 * len(found)), layout="constrained")
  FigureCanvasAgg(made)
  axes, names = made.subplots(len(found), 2, squeeze=False), []
  for (left, right), (solver, rows) in zip(axes, found.items(), strict=True):
    left.set(title=f"{solver}: agreement", ylabel="overlap of the selected sets")
    right.set(title=f"{solver}: retrained", ylabel="test perplexity")
    names += _draw_points(left, right, rows)
    _draw_lines(left, rows)
    _draw_retrained(right, rows, yardsticks)
  for plot in axes.flat:
    plot.set(xlabel="FLOPs of a select run, share of all layers and modules", xlim=(0, 1.06))
    plot.grid(alpha=0.3)
  _legend(axes[0, 0], [row for rows in found.values() for row in rows])
  _part(made, names)
  return made


def _draw_points(left, right, rows: Sequence[dict]) -> list[Annotation]:
  """A point for each choice of layers and modules in both plots; returns the names in the right one."""
  modules, names = list(dict.fromkeys(row["modules"] for row in rows)), []
  for row in rows:
    style = {
      "color": _COLORS[row["position"]],
      "marker": _MARKERS[modules.index(row["modules"]) % len(_MARKERS)],
      "linestyle": "",
      "markersize": 6,
      "alpha": 0.8,
    }
    left.plot(row["flops"], row["overlap"], **style)
    if row["perplexity"] is not None:
      place = row["flops"], row["perplexity"].mean
      right.plot(*place, **style)
      names.append(right.annotate(row["name"], place, (4, 4), textcoords="offset points", fontsize=7))
  return names


def _draw_lines(left, rows: Sequence[dict]) -> None:
  """Joins the points of a position and modules, and marks from where on choices agree."""
  for position in _COLORS:
    for name in dict.fromkeys(row["modules"] for row in rows):
      line = [row for row in rows if row["position"] == position and row["modules"] == name]
      left.plot([row["flops"] for row in line], [row["overlap"] for row in line], _COLORS[position], linewidth=0.7)
  left.axhline(AGREES, color="grey", linestyle="--", linewidth=1)


def _draw_retrained(right, rows: Sequence[dict], yardsticks: Mapping[str, statistics.Interval]) -> None:
  """Intervals of ratios to all layers, and lines of full data and random sets."""
  whole = rows[0]["perplexity"]
  for row in (row for row in rows if whole is not None and row["ratio"] is not None):
    bounds = whole.mean * row["ratio"].low, whole.mean * row["ratio"].high
    right.vlines(row["flops"], *bounds, color=_COLORS[row["position"]], linewidth=1.2)  # NaN draws nothing
  for name, color in (("full", "black"), ("random", VERMILION)):
    if name in yardsticks:
      right.axhline(yardsticks[name].mean, color=color, linestyle=":", linewidth=1.2)
      place = (0.01, yardsticks[name].mean)
      style = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8, "color": color}
      right.annotate(name, place, (0, 3), **style)
  if whole is None:
    right.text(0.5, 0.5, "nothing was retrained", ha="center", transform=right.transAxes)


def _part(made: Figure, names: Sequence[Annotation]) -> None:
  """Moves names of neighbouring points up, the lowest first, until none covers another."""
  made.draw_without_rendering()
  placed = []
  for name in sorted(names, key=lambda one: one.xy[1]):
    while any(name.get_window_extent().overlaps(other) for other in placed):
      name.xyann = name.xyann[0], name.xyann[1] + 1
    placed.append(name.get_window_extent())


def _legend(plot, rows: Sequence[dict]) -> None:
  for position, color in _COLORS.items():
    plot.plot([], [], "s", color=color, label=position)
  for number, name in enumerate(dict.fromkeys(row["modules"] for row in rows)):
    plot.plot([], [], _MARKERS[number % len(_MARKERS)], color="grey", markerfacecolor="none", label=f"modules: {name}")
  plot.legend(frameon=False, fontsize=7, loc="lower right")


def write(
  run_dir: run_folder.RunDir,
  s: AblateLayersSettings,
  session: Session,
  found: Mapping[str, Sequence[dict]],
  yardsticks: Yardsticks,
) -> None:
  """Table as Markdown, CSV and LaTeX, figure as SVG and PNG; ablate_layers.json last."""
  rows = table_rows([row for each in found.values() for row in each])
  sentences = [sentence(each) for each in found.values()]
  warnings = [line for each in found.values() for line in worse_than_random(each)]
  write_figure(run_dir, "ablate_layers", figure(found, yardsticks.perplexity))
  run_dir.write_text("ablate_layers.csv", table_text.csv_table(rows))
  run_dir.write_text(
    "ablate_layers.tex", table_text.latex_table(rows, caption="Layers and modules against all of them.")
  )
  text = [
    f"# Layers\n\n{explanation(s, session)}\n\n![Cost](plots/ablate_layers.svg)\n\n{table_text.markdown_table(rows)}\n"
  ]
  text += [f"- {name}: test perplexity {interval}\n" for name, interval in yardsticks.perplexity.items()]
  text.append("\n" + "\n\n".join([*warnings, *sentences, *yardsticks.notes]) + "\n")
  run_dir.write_text("ablate_layers.md", "".join(text))
  run_dir.write_json(
    "ablate_layers.json",
    {
      "rows": rows,
      "yardsticks": {name: str(interval) for name, interval in yardsticks.perplexity.items()},
      "notes": list(yardsticks.notes),
      "warnings": warnings,
      "sentences": sentences,
      "training_examples": len(session.splits["train"]),
      "devices": run_folder.device_summary(),
    },
  )
  log.info("\n%s", "".join(text))


def explanation(s: AblateLayersSettings, session: Session) -> str:
  """What the columns are."""
  budget = budget_of(s)
  counts = {"examples": budget.num_examples, "tokens": budget.token_budget}
  kept = next((f"{n} {what}" for what, n in counts.items() if n), f"{budget.fraction or 0:.0%} of the examples")
  return (
    f"{len(session.splits['train'])} training and {len(session.splits['eval'])} evaluation examples, gradients at "
    f"{f'the fine-tuned model {s.checkpoint}' if s.checkpoint else 'the base model'}; the highest scores are selected "
    "(proponents). Spearman and overlap "
    f"(of the {kept} that are kept) are with all layers and modules of the same solver. FLOPs and memory on paper "
    "are those that --dry_run prints for a whole select run with the choice, boundary cache included. Seconds and peak "
    f"memory were measured for some only: a score pass (jvp, no boundary cache) over {s.ablate_examples} training "
    "examples in a process of its own. "
    f"Retrained: layers {s.trainable_layers}, seeds {s.seeds}, equal steps. {verdict.BRACKETS} Bars in the picture: "
    "the interval of the ratio to all layers' own choice, times its perplexity."
  )
