"""What a `fidelity` run says: tables, figures, and sentences that claim no more than the intervals allow."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.fidelity.settings import FidelitySettings
from in2core_jax.evaluation import datamodeling, paired
from in2core_jax.evaluation.statistics import Interval
from in2core_jax.report import table_text
from in2core_jax.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, curve_plot, write_figure
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

BASELINES = ("identity", "datainf")
METAGRADIENT = "metagradient"  # exact, through the training: what solvers are held against, not one of them
JUDGED = ("eval", "test")  # parts whose losses the leave-out curves show
_COLORS = (
  BLUE,
  ORANGE,
  GREEN,
  VERMILION,
  SKY,
  PURPLE,
  GREY,
)
_FACTORS = {"solver": "Solver", "layers": "Layers", "ratio": "Damping ratio", "at": "Where gradients are taken"}


@dataclasses.dataclass(frozen=True)
class Found:
  """What was measured.

  Attributes:
    settings: of the run.
    measured: variant -> its LDS; the default comes first.
    cells: variant -> seconds and parameters.
    repeated: agreement of two trainings of the same halves, or None.
    curves: a dict for each training of the leave-out curves.
    recipe: names and values.
  """

  settings: FidelitySettings
  measured: dict
  cells: dict
  repeated: datamodeling.Measured | None
  curves: list[dict]
  recipe: dict


# ---- rows ----------------------------------------------------------------------------


def shown(interval: Interval) -> str:
  """An estimate and its bounds with three decimals."""
  return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def lds_rows(found: Found) -> list[dict]:
  """One row a variant, numbers in full."""
  rows = []
  for variant, lds in found.measured.items():
    row = {
      "solver": variant.solver,
      "layers": variant.layers,
      "damping ratio": variant.ratio,
      "gradients at": variant.at,
    }
    row |= {"LDS": lds.mean}
    for name in ("both", "subsets", "queries"):
      interval = getattr(lds, name)
      row |= {f"{name} low": interval.low, f"{name} high": interval.high}
    rows.append(row | {"seconds": found.cells[variant]["seconds"]})
  return rows


def printed(rows: list[dict]) -> list[dict]:
  """`lds_rows` with an interval in one cell."""
  lines = []
  for row in rows:
    line = {name: row[name] for name in ("solver", "layers", "damping ratio", "gradients at")}
    line["LDS (models and queries)"] = shown(Interval(row["LDS"], row["both low"], row["both high"], 0))
    line |= {
      f"{name} only": f"{row[f'{name} low']:.3f} to {row[f'{name} high']:.3f}" for name in ("subsets", "queries")
    }
    lines.append(line | {"seconds": row["seconds"]})
  return lines


def difference_rows(measured: dict) -> list[dict]:
  """The default solver minus each baseline wherever both were measured with all else equal."""
  solver = next(iter(measured)).solver
  rows = []
  for variant, lds in measured.items():
    if variant.solver != solver:
      continue
    for other, theirs in measured.items():
      if other.solver in BASELINES and variant.differs(other) == ["solver"]:
        change = lds.minus(theirs)
        row = {
          "LDS of": variant.name,
          "minus that of": other.name,
          "difference (models and queries)": shown(change.both),
        }
        rows.append(row | {"subsets only": shown(change.subsets), "queries only": shown(change.queries)})
  return rows


def curve_rows(curves: list[dict]) -> list[dict]:
  """One row for each set left out: mean loss over seeds, its interval, the difference to random sets of that size.

  Both intervals hold for new examples of the part that is judged and for new trainings (`paired`).
  """
  groups: dict = {}
  for row in curves:
    groups.setdefault((row["what"], row["share"]), []).append(row)
  compared = {part: _paired(groups, part) for part in JUDGED} if groups else {}
  rows = []
  for (what, share), group in groups.items():
    row = {"left out": what, "share": share, "examples": group[0]["examples"], "seeds": len(group)}
    row["response tokens"] = round(float(np.mean([one["response_tokens"] for one in group])))
    for part in JUDGED:
      by = group[0]["points"][part]["by"]
      interval = compared[part].mean((what, share), by).interval()
      row |= {f"{part} loss": interval.mean, f"{part} low": interval.low, f"{part} high": interval.high}
      if what not in ("random", "nothing") and ("random", share) in groups:
        change = compared[part].difference((what, share), ("random", share), by).interval()
        row |= {
          f"{part} minus random": change.mean,
          f"{part} change low": change.low,
          f"{part} change high": change.high,
        }
    rows.append(row)
  return rows


def _paired(groups: Mapping[tuple, Sequence[dict]], part: str) -> paired.Paired:
  """The losses of a part after every training, by what was left out."""
  losses = {name: np.stack([one["points"][part]["losses"] for one in group]) for name, group in groups.items()}
  points = next(iter(groups.values()))[0]["points"][part]
  return paired.Paired(losses, points["tokens"], points["groups"])


def printed_curves(rows: list[dict]) -> list[dict]:
  """`curve_rows` with an interval in one cell."""
  lines = []
  for row in rows:
    line = {name: row[name] for name in ("left out", "share", "examples", "response tokens", "seeds")}
    for part in JUDGED:
      line[f"{part} loss"] = f"{row[f'{part} loss']:.3f}"
      if f"{part} minus random" in row:
        change, low, high = (row[f"{part} {name}"] for name in ("minus random", "change low", "change high"))
        bounds = "one seed each" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"
        line[f"{part} minus random"] = f"{change:+.3f} ({bounds})"
    lines.append(line)
  return lines


# ---- sentences -----------------------------------------------------------------------


def conclusions(measured: dict) -> list[str]:
  """What follows for solver, layers, damping and place, each changed alone, from the paired intervals over both."""
  default, lines = next(iter(measured)), []
  # Of a default without damping, identity, that of the others, which comes first for each of them.
  ratio = next((variant.ratio for variant in (default, *measured) if not math.isnan(variant.ratio)), math.nan)
  for factor, title in _FACTORS.items():
    group = {variant: lds for variant, lds in measured.items() if variant.differs(default) in ([], [factor])}
    if factor != "solver":
      group = {variant: lds for variant, lds in group.items() if variant.solver == default.solver}
    else:  # one of each solver: identity has one damping, the others also that of the default
      group = {v: lds for v, lds in group.items() if math.isnan(v.ratio) or v.ratio == ratio}
    if len(group) > 1:
      lines.append(f"{title}: {_sentence(group, default, factor)}")
  exact = next((variant for variant in measured if variant.solver == METAGRADIENT), None)
  if exact is not None:
    gap = shown(measured[exact].minus(measured[default]).both)
    lines.append(
      f"Metagradient: exact through the training on all data, it has an LDS of {shown(measured[exact].both)}; minus "
      f"that of {default.name}: {gap}."
    )
  return lines


def _sentence(group: dict, default, factor: str) -> str:
  called = lambda variant: format(getattr(variant, factor), "g" if factor == "ratio" else "")  # noqa: E731
  best = max(group, key=lambda variant: group[variant].mean)
  others = [variant for variant in group if variant != best]
  below = [other for other in others if group[best].minus(group[other]).both.low > 0]
  tied = [other for other in others if other not in below]
  text = f"{called(best)} has the highest LDS, {shown(group[best].both)}"
  text += f"; above {', '.join(map(called, below))} by more than the interval" if below else ""
  text += f"; cannot be distinguished from {', '.join(map(called, tied))}" if tied else ""
  if best == default:
    return f"{text}."
  if default in tied:
    return f"{text}. LDS does not speak against {called(default)}; the seconds are in the table."
  return f"{text}. It follows: {called(best)} rather than {called(default)}."


def ceiling_sentence(repeated: datamodeling.Measured, halves: int) -> str:
  """What two trainings of the same halves have in common, and what a perfect score would reach."""
  low, high = np.sqrt(np.maximum((repeated.both.low, repeated.both.high), 0))
  ceiling = datamodeling.ceiling(repeated)
  agree = (
    f"Two trainings of the same {halves} halves, with other orders of the data, agree at Spearman "
    f"{shown(repeated.both)}, mean over queries"
  )
  if math.isnan(ceiling):
    return f"{agree}: no better than chance, so nothing can be said about the LDS that a perfect score would reach."
  return (
    f"{agree}: a score that knew the expected losses would reach an LDS of about {ceiling:.2f}, the square root "
    f"({low:.2f} to {high:.2f})."
  )


def curve_sentences(rows: list[dict]) -> list[str]:
  """For each kind of set: at which shares the evaluation loss differs from random sets' by more than the interval."""
  kinds = [what for what in dict.fromkeys(row["left out"] for row in rows) if what not in ("random", "nothing")]
  lines = []
  for what in kinds:
    group = [row for row in rows if row["left out"] == what and "eval minus random" in row]
    for part in JUDGED:
      higher = [f"{row['share']:.0%}" for row in group if row[f"{part} change low"] > 0]
      lower = [f"{row['share']:.0%}" for row in group if row[f"{part} change high"] < 0]
      text = [f"above random's at {', '.join(higher)}"] if higher else []
      text += [f"below random's at {', '.join(lower)}"] if lower else []
      untold = group and all(math.isnan(row[f"{part} change low"]) for row in group)
      text = text or [f"cannot be distinguished from random's {'by one seed each' if untold else 'at any share'}"]
      lines.append(f"Without {what}: {part} loss {'; '.join(text)}.")
  return lines


# ---- figures -------------------------------------------------------------------------


def lds_figure(found: Found) -> Figure:
  """LDS of every variant as a point with its interval over models and queries; the noise ceiling as a line."""
  names = list(found.measured)
  figure = Figure(figsize=(6.8, 1.3 + 0.27 * len(names)), layout="constrained")
  axes = figure.add_subplot()
  solvers = list(dict.fromkeys(variant.solver for variant in names))
  for place, variant in enumerate(names):
    both, inner = found.measured[variant].both, found.measured[variant].queries
    color = _COLORS[solvers.index(variant.solver) % len(_COLORS)]
    axes.hlines(place, both.low, both.high, color=color, linewidth=1.2)
    axes.hlines(place, inner.low, inner.high, color=color, linewidth=3.5)
    axes.plot(both.mean, place, "o", color=color, markersize=6)
  if found.repeated is not None and not math.isnan(datamodeling.ceiling(found.repeated)):
    label = "about the most that the noise of training allows"
    axes.axvline(datamodeling.ceiling(found.repeated), color="black", linestyle="--", linewidth=1, label=label)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
  axes.axvline(0, color=GREY, linewidth=1)
  axes.set_yticks(range(len(names)), [variant.name for variant in names])
  axes.invert_yaxis()
  axes.set_xlabel("LDS, 95 % intervals\nthick: queries alone, thin: models and queries")
  axes.grid(axis="x", alpha=0.3)
  return figure


def curve_figure(rows: list[dict], part: str, title: str) -> Figure:
  """Loss of a part against the share left out, one line for each kind of set; bands over seeds for random sets."""
  nothing = next(row for row in rows if row["left out"] == "nothing")
  series = {}
  for what in dict.fromkeys(row["left out"] for row in rows if row["left out"] != "nothing"):
    group = [nothing, *(row for row in rows if row["left out"] == what)]
    lines = [[row[name] for row in group] for name in ("share", f"{part} loss", f"{part} low", f"{part} high")]
    share, loss, low, high = (np.array(values, np.float64) for values in lines)
    # Where one seed has no interval, the band has no width.
    band = [np.where(np.isnan(edge), loss, edge) for edge in (low, high)] if what == "random" else []
    series[what] = (100 * share, loss, *band)
  return curve_plot(series, "left out, % of the training examples", title)


# ---- files ---------------------------------------------------------------------------


def write(run_dir: run_folder.RunDir, found: Found) -> None:
  """fidelity.md, .csv, .tex, .json, curves.csv, .tex, figures; fidelity.json last."""
  rows, differences, curves = lds_rows(found), difference_rows(found.measured), curve_rows(found.curves)
  figures = {"lds": lds_figure(found)}
  if curves:
    figures["curve-eval"] = curve_figure(curves, "eval", "evaluation loss, nats per token")
    figures["curve-test"] = curve_figure(curves, "test", "test loss, nats per token")
  for name, figure in figures.items():
    write_figure(run_dir, name, figure)
  sentences = conclusions(found.measured)
  noise = [ceiling_sentence(found.repeated, found.settings.halves_again)] if found.repeated is not None else []
  caption = "Linear datamodeling score, 95 % intervals over retrained models and queries"
  run_dir.write_text("fidelity.csv", table_text.csv_table(rows))
  run_dir.write_text("fidelity.tex", table_text.latex_table(printed(rows), caption=caption))
  if curves:
    columns = list(dict.fromkeys(name for row in curves for name in row))
    run_dir.write_text("curves.csv", table_text.csv_table(curves, columns))
    run_dir.write_text("curves.tex", table_text.latex_table(printed_curves(curves), caption="Leaving examples out"))
  text = markdown(found, rows, differences, curves, [*noise, *sentences])
  run_dir.write_text("fidelity.md", text)
  ceiling = None
  if found.repeated is not None:
    ceiling = dataclasses.asdict(found.repeated.both) | {"ceiling": datamodeling.ceiling(found.repeated)}
  facts = {"lds": rows, "differences": differences, "ceiling": ceiling, "conclusions": sentences}
  facts |= {"curves": curves, "recipe": found.recipe, "devices": run_folder.device_summary()}
  run_dir.write_json("fidelity.json", facts)
  log.info("\n%s", text)


def markdown(found: Found, rows: list[dict], differences: list[dict], curves: list[dict], lines: list[str]) -> str:
  """The page."""
  items = lambda lines: "\n".join(f"- {table_text.escape_markdown(line, 1000)}" for line in lines)  # noqa: E731
  parts = ["# Do the scores predict what retraining gives?", items(lines)]
  parts += ["## Linear datamodeling score", "![LDS](plots/lds.svg)", table_text.markdown_table(printed(rows)).rstrip()]
  parts += [
    "Spearman, for each distinct evaluation example, between the summed scores of random halves and minus its loss "
    "after retraining on them; mean over these examples. In brackets: 95 % bootstrap that redraws the retrained "
    "models and the evaluation examples together. It decides above; the columns beside it redraw one of the two and "
    "are too narrow. Each interval stands for itself: with many rows some differ by chance. DataInf's damping ratio is "
    "relative to something else, so equal ratios are not equal dampings."
  ]
  if differences:
    parts += ["## The default against the baselines", table_text.markdown_table(differences).rstrip()]
    parts += ["Paired: the same models and evaluation examples on both sides."]
  if curves:
    parts += ["## Leaving examples out", items(curve_sentences(curves))]
    parts += ["![Evaluation loss](plots/curve-eval.svg)", "![Test loss](plots/curve-test.svg)"]
    parts += [table_text.markdown_table(printed_curves(curves)).rstrip()]
    parts += [
      "In brackets: 95 % interval of the difference to random sets of the same number of examples, which holds for new "
      "evaluation or test examples and for new trainings; a set that was left out in one training has the spread of "
      "those with several."
    ]
  recipe = [{"name": name, "value": table_text.format_value(value)} for name, value in found.recipe.items()]
  return "\n\n".join([*parts, "## Recipe", table_text.markdown_table(recipe, ["name", "value"])])
