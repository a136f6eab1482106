"""Tables (Markdown, LaTeX, CSV), plots and the Markdown reports, from plain dicts and arrays.

Text from data sets is hostile until escaped: it may hold markup, links, control characters or 100 kB on one line.
Whatever goes into a report as text goes through `escape_markdown`; tables escape their cells themselves.
Plots are `matplotlib.figure.Figure` objects drawn without pyplot, so that no global state and no display is needed.
"""

import csv
import io
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from in2core_jax.errors import UserError

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
_TOPICS = 50  # rows of the topic table in a report
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "in2core"}

# ------------------------------------------------------------------------------------------------- escaping


def plain_line(text: str, width: int = 300) -> str:
  """One line of printable text, cut at `width`: breaks as a sign, blanks as one, hidden characters as U+FFFD."""
  text = str(text)[: 8 * width]  # enough to cut from, and never 100 kB of work
  text = re.sub(r"\s*(\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029])\s*", " ⏎ ", text.strip())
  text = re.sub(r"\s+", " ", text)
  # Cc control, Cf format (right-to-left overrides, zero-width), Cs lone surrogates (cannot be written as UTF-8).
  text = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)
  return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def escape_markdown(text: str, width: int = 300) -> str:
  """Text that Markdown and HTML show as it is: no tag, link, image, emphasis, heading, list or table cell from it."""
  text = plain_line(text, width)
  text = re.sub(r"([\\`*_\[\]#!|~$@])", r"\\\1", text)
  text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
  text = re.sub(r"(?i)\b(https?|ftp)://", r"\1\\://", text).replace("www.", "www\\.").replace("WWW.", "WWW\\.")
  return re.sub(r"^([-+=:]|\d+(?=[.)](\s|$)))", lambda m: _escape_start(m.group(1)), text)


def _escape_start(start: str) -> str:
  """A list sign or number at the start of a line; digits cannot be escaped, so the first becomes an entity."""
  return f"&#{ord(start[0])};{start[1:]}" if start[0].isdigit() else "\\" + start


def format_value(value, digits: int = 4) -> str:
  """A cell: floats to `digits` significant digits, whole numbers in full, None as nothing, NaN as a dash."""
  if value is None:
    return ""
  if isinstance(value, bool | np.bool_):
    return "yes" if value else "no"
  if isinstance(value, int | np.integer):
    return str(int(value))
  if isinstance(value, float | np.floating):
    return "-" if math.isnan(value) else f"{float(value):.{digits}g}"
  return str(value)


# --------------------------------------------------------------------------------------------------- tables


class Link(NamedTuple):
  """A cell of a Markdown table that leads to a file; `target` is no text from outside."""

  text: str
  target: str


def _cells(rows: Sequence[Mapping], columns: Sequence[str] | None, digits: int) -> tuple[list[str], list[list]]:
  """Column names and the raw values; columns from all rows, in order of first appearance, when not given."""
  if not rows and not columns:
    raise UserError("a table needs at least one row or the names of its columns")
  names = list(columns) if columns else list(dict.fromkeys(name for row in rows for name in row))
  return names, [[row.get(name) for name in names] for row in rows]


def markdown_table(rows: Sequence[Mapping], columns: Sequence[str] | None = None, digits: int = 4) -> str:
  """Rows of dicts as a Markdown table, numbers to the right; cells are escaped.

  Args:
    rows: one dict per row; a missing value is an empty cell.
    columns: names in order; all that appear when None.
    digits: significant digits of floats.

  Returns:
    The table, ending in a newline.

  Raises:
    UserError: neither rows nor columns.
  """
  names, values = _cells(rows, columns, digits)
  numeric = [
    bool(column) and all(_is_number(v) for v in column if v is not None) for column in zip(*values, strict=True)
  ]
  numeric = numeric or [False] * len(names)
  text = [f"| {' | '.join(_markdown_cell(value, digits) for value in line)} |" for line in [names, *values]]
  rule = "|" + "|".join("---:" if right else "---" for right in numeric) + "|"
  return "\n".join([text[0], rule, *text[1:]]) + "\n"


def _markdown_cell(value, digits: int) -> str:
  if isinstance(value, Link):
    return f"[{escape_markdown(value.text)}]({value.target})"
  cell = format_value(value, digits)
  return cell if _is_plain(cell) else escape_markdown(cell, 500)


def _is_number(value) -> bool:
  return isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)


def _is_plain(cell: str) -> bool:
  """Numbers, words and single underscores inside words, which Markdown leaves alone: kept readable in the source."""
  return re.fullmatch(r"-|[-+]?[\d.]+(e[-+]?\d+)?|[A-Za-z0-9]+([_ ][A-Za-z0-9]+)*|", cell) is not None


_LATEX = {
  "\\": r"\textbackslash{}",
  "{": r"\{",
  "}": r"\}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "<": r"\textless{}",
  ">": r"\textgreater{}",
  **{c: "\\" + c for c in "&%$#_"},
}


def escape_latex(text: str) -> str:
  """Text that LaTeX sets as it is."""
  return "".join(_LATEX.get(c, c) for c in plain_line(text, 500))


def latex_table(
  rows: Sequence[Mapping], columns: Sequence[str] | None = None, caption: str = "", digits: int = 4
) -> str:
  """Rows of dicts as a LaTeX table (package booktabs), numbers to the right; cells and caption are escaped."""
  names, values = _cells(rows, columns, digits)
  columns_of = list(zip(*values, strict=True)) or [()] * len(names)
  align = "".join(
    "r" if column and all(_is_number(v) for v in column if v is not None) else "l" for column in columns_of
  )
  lines = [" & ".join(escape_latex(format_value(v, digits)) for v in row) + r" \\" for row in values]
  head = " & ".join(escape_latex(name) for name in names) + r" \\"
  parts = [r"\begin{table}[t]", r"\centering", *([rf"\caption{{{escape_latex(caption)}}}"] if caption else [])]
  parts += [rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule"]
  return "\n".join([*parts, r"\end{tabular}", r"\end{table}"]) + "\n"


def csv_table(rows: Sequence[Mapping], columns: Sequence[str] | None = None) -> str:
  """Rows of dicts as CSV, floats in full; text that a spreadsheet would run as a formula gets a leading apostrophe."""
  names, values = _cells(rows, columns, 17)
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow([_csv_cell(name) for name in names])
  writer.writerows([[_csv_cell(v) for v in row] for row in values])
  return out.getvalue()


def _csv_cell(value):
  if isinstance(value, str):
    return "'" + value if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
  return value.item() if isinstance(value, np.generic) else value


# ---------------------------------------------------------------------------------------------------- plots


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
      label = f"range of {row['seeds']} random sets"
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


# ------------------------------------------------------------------------------------------- Markdown reports


def score_edges(scores: np.ndarray, bins: int) -> np.ndarray:
  """Edges between the 0.5th and 99.5th percentile, so that a few extreme scores do not flatten the picture."""
  low, high = np.quantile(scores, [0.005, 0.995])
  if not high > low:
    low, high = low - max(abs(low), 1.0) * 1e-3, high + max(abs(high), 1.0) * 1e-3
  return np.linspace(low, high, bins + 1)


def score_histogram_text(scores: np.ndarray, selected: np.ndarray, bins: int = 15, width: int = 50) -> str:
  """Bars of characters: # selected, . left out; the outer bars hold what lies beyond."""
  scores, selected = np.asarray(scores, np.float64), np.asarray(selected, bool)
  edges = score_edges(scores, bins)
  inside = np.clip(scores, edges[0], edges[-1])
  every, kept = np.histogram(inside, edges)[0], np.histogram(inside[selected], edges)[0]
  lines = []
  for i, (count, inner) in enumerate(zip(every, kept, strict=True)):
    long = round(width * count / max(every.max(), 1))
    dark = round(long * inner / count) if count else 0
    bar = "#" * dark + "." * (long - dark)
    lines.append(f"{edges[i]:>10.3g} to {edges[i + 1]:>10.3g} | {bar:<{width}} | {count} ({inner} selected)")
  return "\n".join(lines)


def topic_table(topics: Sequence[str], selected: np.ndarray, response_tokens: np.ndarray) -> list[dict]:
  """One dict per topic, most dropped first: examples, selected, share kept, response tokens kept, change of share."""
  topics, selected = np.asarray(topics, dtype=np.str_), np.asarray(selected, bool)
  tokens = np.asarray(response_tokens, np.float64)
  names, codes = np.unique(topics, return_inverse=True)
  sizes, kept_sizes = np.bincount(codes), np.bincount(codes, selected).astype(int)
  all_tokens, kept_tokens = np.bincount(codes, tokens), np.bincount(codes, tokens * selected)
  table = []
  for i, (topic, size, kept) in enumerate(zip(names, sizes.tolist(), kept_sizes.tolist(), strict=True)):
    table.append(
      {
        "topic": str(topic),
        "examples": size,
        "selected": kept,
        "kept %": _percent(kept, size),
        "response tokens kept %": _percent(kept_tokens[i], all_tokens[i]),
        "share of pool %": _percent(size, topics.size),
        "share of coreset %": _percent(kept, selected.sum()),
      }
    )
  return sorted(table, key=lambda row: (row["kept %"], row["topic"]))


def _percent(part: float, whole: float) -> float | None:
  return round(100 * float(part) / float(whole), 1) if whole else None


def select_report_markdown(
  scores: Mapping[str, Sequence],
  texts: Sequence[str],
  summary: Mapping[str, Mapping],
  warnings: Sequence[str] = (),
  images: Mapping[str, str] | None = None,
  count: int = 10,
) -> str:
  """The report of one `select` run.

  Args:
    scores: the columns of scores.parquet, [N] each: example_id, influence, rank (1 = highest), selected (bool),
      loss, num_tokens, num_response_tokens, topic.
    texts: N strings, what the examples say (prompt and response), in the same order; shortened and escaped here.
    summary: title of a section -> its names and values, such as {"Solver": {"solver": "lissa", "residual": 0.01},
      "Data": {...}}; each becomes a table.
    warnings: sentences, such as those of `coreset.selection_warnings`; escaped here.
    images: caption -> path or URL relative to the report, written by our own stages.
    count: examples to show at each end.

  Returns:
    Markdown, ending in a newline.

  Raises:
    UserError: a column is missing, or lengths differ.
  """
  needed = ("example_id", "influence", "rank", "selected", "num_tokens", "num_response_tokens", "topic")
  missing = [name for name in needed if name not in scores]
  if missing:
    raise UserError(f"report: columns {', '.join(missing)} are missing from the scores; found {', '.join(scores)}")
  lengths = {name: len(scores[name]) for name in needed} | {"texts": len(texts)}
  if len(set(lengths.values())) != 1 or not texts:
    raise UserError(f"report: columns differ in length or are empty: {lengths}")
  selected = np.asarray(scores["selected"], bool)
  order = np.argsort(np.asarray(scores["rank"]), kind="stable")
  parts = ["# Selection report", _headline(scores, selected)]
  parts += ["## Warnings", "\n".join(f"- {escape_markdown(w, 1000)}" for w in warnings) or "None."]
  parts += [f"![{escape_markdown(caption)}]({path})" for caption, path in (images or {}).items()]
  parts += ["## Scores", "```text\n" + score_histogram_text(scores["influence"], selected) + "\n```"]
  parts += ["`#` selected, `.` left out; the outer bars hold everything beyond them."]
  parts += ["## Strongest proponents", _examples_table(scores, texts, order[:count])]
  parts += ["## Strongest opponents", _examples_table(scores, texts, order[::-1][:count])]
  topics = topic_table(scores["topic"], selected, scores["num_response_tokens"])
  parts += ["## Topics, most dropped first", markdown_table(topics[:_TOPICS]).rstrip()]
  parts += [f"{len(topics) - _TOPICS:,} more topics keep more."] if len(topics) > _TOPICS else []
  for title, values in summary.items():
    rows = [{"name": name, "value": format_value(value)} for name, value in values.items()]
    parts += [f"## {escape_markdown(title)}", markdown_table(rows, ["name", "value"]).rstrip()]
  return "\n\n".join(parts) + "\n"


def _headline(scores: Mapping[str, Sequence], selected: np.ndarray) -> str:
  tokens = np.asarray(scores["num_response_tokens"], np.int64)
  influence = np.asarray(scores["influence"], np.float64)
  share = tokens[selected].sum() / max(tokens.sum(), 1)
  return (
    f"{selected.sum():,} of {selected.size:,} examples are selected ({selected.mean():.1%}), with {share:.1%} of the "
    f"response tokens. {np.mean(influence > 0):.1%} of all examples are proponents (positive influence: more weight on "
    f"them lowers the evaluation loss)."
  )


def _examples_table(scores: Mapping[str, Sequence], texts: Sequence[str], rows: np.ndarray) -> str:
  names = {"rank": "rank", "influence": "influence", "selected": "selected", "topic": "topic"}
  names |= {"num_response_tokens": "response tokens", "example_id": "example_id"}
  table = []
  for row in rows:
    cells = {shown: scores[name][row] for name, shown in names.items()}
    # Bytes-like scalars of NumPy and Arrow come out as what format_value knows.
    cells = {shown: value.item() if hasattr(value, "item") else value for shown, value in cells.items()}
    cells |= {"topic": plain_line(cells["topic"], 60), "example_id": plain_line(cells["example_id"], 60)}
    table.append({**cells, "text": plain_line(texts[row])})
  return markdown_table(table).rstrip()


def retrain_report_markdown(
  sections: Mapping[str, tuple[Sequence[Mapping], str]],
  settings: Mapping[str, object] | None = None,
  images: Mapping[str, str] | None = None,
  level: float = 0.95,
  notes: Sequence[str] = (),
  overviews: Mapping[str, Sequence[Mapping]] | None = None,
) -> str:
  """The report of retraining on each policy's set.

  Args:
    sections: title -> (the output of `verdict.summarise`, that of `verdict.verdict`, one line for each policy) of
      trainings that are compared with each other; a single one may have an empty title.
    settings: names and values of the recipe, such as steps and learning rate.
    images: caption -> path relative to the report.
    level: of the intervals in the table.
    notes: sentences about all sections together, such as that of `verdict.many_comparisons`.
    overviews: title -> rows of a table over all sections, which comes before them.

  Returns:
    Markdown, ending in a newline.
  """
  parts = ["# Retrain and compare"]
  for title, lines in (overviews or {}).items():
    parts += [f"## {escape_markdown(title).capitalize()}", markdown_table(lines).rstrip()]
  for title, (table, verdict) in sections.items():
    lines = "\n".join(f"- {escape_markdown(line, 1000)}" for line in verdict.splitlines() if line.strip())
    parts += [f"## {escape_markdown(title).capitalize()}"] if title else []
    parts += [lines, markdown_table(retrain_rows(table)).rstrip()]
  parts += [
    f"In brackets: {level:.0%} intervals that hold for new test examples and for new trainings. Perplexity is on the "
    "test set, lower is better; its own interval is wide, because test examples differ in difficulty. to_random is the "
    "ratio to random sets on the same test examples, which is what policies are compared by; in evaluation.csv also "
    "that to full data. A policy with one training has the spread of those with several."
  ]
  parts += [escape_markdown(note, 4000) for note in notes]
  parts += [f"![{escape_markdown(caption)}]({path})" for caption, path in (images or {}).items()]
  if settings:
    recipe = [{"name": name, "value": format_value(value)} for name, value in settings.items()]
    parts += ["## Recipe", markdown_table(recipe, ["name", "value"]).rstrip()]
  return "\n\n".join(parts) + "\n"


def retrain_rows(table: Sequence[Mapping]) -> list[dict]:
  """`verdict.summarise` as rows to print: perplexities and ratios to random sets with their intervals in a cell each.

  Keys `equal` and `fraction`, where rows have them, are shown when they differ.
  """
  rows, several = [], {name for name in ("equal", "fraction") if len({row.get(name) for row in table}) > 1}
  for summary in table:
    row = {name: summary[name] for name in ("equal", "fraction") if name in several}
    names = ("policy", "seeds", "examples", "response_tokens", "steps", "trained_tokens")
    row |= {name: summary[name] for name in names}
    ratios = [name for name in ("to_random", "example_to_random") if name in summary]
    for name in ("perplexity", "example_perplexity", *ratios):
      value, low, high = (summary[f"{name}{end}"] for end in ("", "_low", "_high"))
      bounds = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
      row[name] = "" if math.isnan(value) else f"{value:.3f}{bounds}"
    rows.append(row)
  return rows
