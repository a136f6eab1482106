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

import numpy as np

from in2core_jax.errors import UserError

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


# ------------------------------------------------------------------------------------------- Markdown reports
