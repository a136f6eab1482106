"""What the report of a `select` run says, as rows of tables and as figures for papers. No markup here.

Everything follows from the run's own results: equal results give equal rows and figures, with no times in them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from in2core_jax.data import tokenizing
from in2core_jax.data.records import Record, spoken
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.report import near_duplicates, table_text
from in2core_jax.report.markdown import topic_table
from in2core_jax.report.plots import bar_plot, curve_plot, residual_plot, score_histogram_plot
from in2core_jax.runs.run_folder import RunDir

TOP = 300  # strongest proponents that are searched for near copies
LENGTH_BINS = 8
FIGURE_TOPICS = 25
_COLUMNS = ("example_id", "influence", "rank", "selected", "loss", "num_tokens", "num_response_tokens", "topic")


@dataclasses.dataclass(frozen=True)
class SelectRun:
  """The results of one `select` run.

  Attributes:
    columns: of scores.parquet, [N] each: example_id, influence, rank (1 = highest), selected (bool), loss, num_tokens,
      num_response_tokens, topic; perhaps self_influence.
    records: the N training records, in the same order.
    truncated: bool [N], whether tokens of the example were cut off.
    data: `tokenizing.data_summary` of the parts.
    summary: what summary.json holds; read are policy, unit, solver, solver_steps, solver_residual, solver_curve,
      warnings and identity.
    layers: {layer: influence [N]}, which add up to the influence, or None.
    query_records: the Q evaluation records; needed with `queries`.
    queries: float32 [Q, N], influence of every training example on every evaluation example, or None.
    retrain: what evaluation.json of an `evaluate` run with this selection holds (table, verdict, recipe), or None.

  Raises:
    UserError: a column is missing, or lengths differ.
  """

  columns: Mapping[str, Sequence]
  records: Sequence[Record]
  truncated: Sequence[bool]
  data: Mapping[str, Any]
  summary: Mapping[str, Any]
  layers: Mapping[str, np.ndarray] | None = None
  query_records: Sequence[Record] = ()
  queries: np.ndarray | None = None
  retrain: Mapping[str, Any] | None = None

  def __post_init__(self):
    missing = [name for name in _COLUMNS if name not in self.columns]
    if missing:
      raise UserError(f"report: the scores have no column {', '.join(missing)}; they have {', '.join(self.columns)}")
    lengths = {name: len(values) for name, values in self.columns.items()}
    lengths |= {"records": len(self.records), "truncated": len(self.truncated)}
    lengths |= {name: len(values) for name, values in (self.layers or {}).items()}
    if len(set(lengths.values())) != 1 or not self.records:
      raise UserError(f"report: columns differ in length or are empty: {lengths}")
    shape = (len(self.query_records), len(self.records))
    if self.queries is not None and self.queries.shape != shape:
      raise UserError(f"report: the scores of evaluation examples have shape {self.queries.shape}, not {shape}")

  @classmethod
  def load(cls, folder: Any, train: Any, evals: Any, retrain: Mapping[str, Any] | None = None) -> SelectRun:
    """Reads the folder of a finished run.

    Args:
      folder: the run folder. train, evals: its `tokenizing.TokenizedDataset`s. retrain: see `retrain` of the class.

    Raises:
      UserError: a file is missing or damaged, or the data are others.
    """
    run, layers, queries = RunDir.load(folder), "layer_scores.parquet", "query_scores.parquet"
    return cls(
      run.read_scores("scores.parquet"),
      train.records,
      train.truncated,
      run.load_json("data_summary.json"),
      run.load_json("summary.json"),
      layers_of(run.read_parquet(layers)) if run.wrote(layers) else None,
      evals.records,
      _query_scores(run, queries, evals.ids, len(train)) if run.wrote(queries) else None,
      retrain,
    )

  @functools.cached_property
  def influence(self) -> np.ndarray:
    """float64 [N]."""
    return np.asarray(self.columns["influence"], np.float64)

  @functools.cached_property
  def selected(self) -> np.ndarray:
    """bool [N]."""
    return np.asarray(self.columns["selected"], bool)

  @functools.cached_property
  def order(self) -> np.ndarray:
    """int64 [N], rows from the strongest proponent to the strongest opponent."""
    return np.argsort(np.asarray(self.columns["rank"]), kind="stable")

  @functools.cached_property
  def response_tokens(self) -> np.ndarray:
    """int64 [N]."""
    return np.asarray(self.columns["num_response_tokens"], np.int64)

  @functools.cached_property
  def content_keys(self) -> list[str]:
    """N hashes, equal for copies."""
    return [record.content_key for record in self.records]

  @functools.cached_property
  def curve(self) -> tuple[list[int], np.ndarray] | None:
    """Steps and residuals [steps, Q] of the solver, or None where fewer than two were measured."""
    points = self.summary["solver_curve"]
    if len(points) < 2:
      return None
    residuals = np.array([np.atleast_1d(residual) for _, residual in points], np.float64)
    return [step for step, _ in points], residuals

  @functools.cached_property
  def top_copies(self) -> list[near_duplicates.Group]:
    """Near copies among the `TOP` strongest proponents; rows of the whole table."""
    top = self.order[:TOP]
    texts = [" ".join(map(spoken, self.records[row].messages)) for row in top]
    return [dataclasses.replace(group, rows=top[group.rows]) for group in near_duplicates.near_copies(texts)]


def _query_scores(run: RunDir, name: str, ids: Sequence[str], size: int) -> np.ndarray:
  """query_scores.parquet as float32 [Q, N], a row for each of the evaluation `ids`, whatever their order in the file.

  Raises:
    UserError: it is of other evaluation examples, or of other than `size` training examples.
  """
  names = ("query", "influence")
  table = run.read_parquet(name, required=names, only=names, repeated=["query"])
  there = table["query"][::size]
  fits = table["query"].size == len(ids) * size and sorted(there) == sorted(ids)
  if not fits or (table["query"].reshape(-1, size) != there[:, None]).any():
    raise UserError(
      f"{run.path / name}: {table['query'].size} rows are not those of these {len(ids)} evaluation and {size} training "
      "examples: the data are others"
    )
  place = {name: row for row, name in enumerate(there)}
  return table["influence"].reshape(-1, size)[[place[name] for name in ids]]


def layers_of(table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The columns of layer_scores.parquet (example after example, as `decompose.layer_columns` makes them) by layer."""
  names = list(dict.fromkeys(table["layer"]))
  values = np.asarray(table["influence"]).reshape(-1, len(names))
  return {name: values[:, place] for place, name in enumerate(names)}


# --------------------------------------------------------------------------------------------------- tables


def length_rows(run: SelectRun) -> list[dict]:
  """Selected and left out by response length, in at most eight classes of about equally many examples."""
  lengths = run.response_tokens
  # The inner quantiles alone: one that equals the shortest or the longest length still parts two classes.
  edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1], method="inverted_cdf"))
  classes = np.searchsorted(edges, lengths, side="left")
  rows = []
  for place in np.unique(classes):
    inside = classes == place
    low, high, size = int(lengths[inside].min()), int(lengths[inside].max()), int(inside.sum())
    kept = int(run.selected[inside].sum())
    label = str(low) if low == high else f"{low} to {high}"
    rows.append(
      {
        "response tokens": label,
        "examples": size,
        "selected": kept,
        "left out": size - kept,
        "kept %": round(100 * kept / size, 1),
      }
    )
  return rows


def layer_rows(run: SelectRun) -> list[dict]:
  """How much each layer contributes, and how well it alone would rank the examples; empty without `layers`."""
  layers = {name: np.asarray(values, np.float64) for name, values in (run.layers or {}).items()}
  total = sum(np.abs(values).mean() for values in layers.values())
  whole = sum(layers.values())
  return [
    {
      "layer": name,
      "mean size of contribution": float(np.abs(values).mean()),
      "share %": round(100 * float(np.abs(values).mean()) / total, 1) if total else None,
      "Spearman with all": statistics.spearman(values, whole),
      "top-half overlap with all": statistics.top_overlap(values, whole),
    }
    for name, values in layers.items()
  ]


def coverage(run: SelectRun) -> dict[str, np.ndarray]:
  """What each evaluation example receives from the training examples; needs `queries`.

  Returns:
    float64 [Q] each: mean (influence over all training examples), selected_mean (over the selected), highest (largest
    single one), positive (sum of the positive ones), positive_selected (share of that sum which the selected bring; NaN
    where nothing is positive).
  """
  scores = run.queries
  positive = np.array([np.maximum(row, 0).sum(dtype=np.float64) for row in scores])
  kept = np.array([np.maximum(row[run.selected], 0).sum(dtype=np.float64) for row in scores])
  share = np.full(len(scores), math.nan)
  np.divide(kept, positive, out=share, where=positive > 0)
  return {
    "mean": scores.mean(axis=1, dtype=np.float64),
    "selected_mean": scores[:, run.selected].sum(axis=1, dtype=np.float64) / max(run.selected.sum(), 1),
    "highest": scores.max(axis=1).astype(np.float64),
    "positive": positive,
    "positive_selected": share,
  }


def part_rows(run: SelectRun) -> list[dict]:
  """Counts of each part: examples, tokens, truncated, without response, copies."""
  return [
    {
      "part": name,
      "examples": part["examples"],
      "tokens": part["tokens"],
      "response tokens": part["response_tokens"],
      "truncated": part["truncated"],
      "without response": part["empty_responses"],
      "copies": part["duplicates"],
    }
    for name, part in run.data["parts"].items()
  ]


def overlap_rows(run: SelectRun) -> list[dict]:
  """How many examples of the second part also occur in the first."""
  return [
    {"parts": name, "same messages": count["same_messages"], "same prompt": count["same_prompt"]}
    for name, count in run.data["overlap"].items()
  ]


@dataclasses.dataclass(frozen=True)
class Finding:
  """A sentence about the data or the solve, and whether a reader should mind it."""

  text: str
  mind: bool


def findings(run: SelectRun) -> list[Finding]:
  """What to mind first: the warnings of the run, then what its numbers say about data, scores and solver."""
  found = [Finding(table_text.plain_line(warning, 1000), True) for warning in run.summary["warnings"]]
  found += [Finding(table_text.plain_line(line, 1000), True) for line in tokenizing.told_lines(run.data)]
  found += [*_overlap_findings(run), *_train_findings(run), *_score_findings(run), *_solver_findings(run)]
  return sorted(found, key=lambda finding: not finding.mind)


def _overlap_findings(run: SelectRun) -> list[Finding]:
  found = []
  for name, count in run.data["overlap"].items():
    first, second = name.split("/")
    same, prompts = count["same_messages"], count["same_prompt"]
    text = f"{same:,} examples of {second} are copies of one in {first}, {prompts:,} have a prompt that occurs there."
    found.append(Finding(text, bool(same or prompts)))
  return found


def _train_findings(run: SelectRun) -> list[Finding]:
  size, chosen = len(run.records), run.selected
  counts = collections.Counter(run.content_keys)
  copies = size - len(counts)
  kept = int(chosen.sum()) - len({run.content_keys[row] for row in np.flatnonzero(chosen)})
  truncated = np.asarray(run.truncated, bool)
  cut, empty = int(truncated.sum()), int((run.response_tokens == 0).sum())
  close = sum(len(group.rows) for group in run.top_copies)
  top = min(TOP, size)
  return [
    Finding(f"{copies:,} training examples repeat an earlier one; {kept:,} of the selected repeat another.", kept > 0),
    Finding(f"{close:,} of the {top:,} strongest proponents are near copies of another of them.", close > 0.1 * top),
    Finding(
      f"{cut:,} training examples ({cut / size:.1%}) were truncated, {int((truncated & chosen).sum()):,} of them are "
      "selected: what was cut off counts nothing.",
      cut > 0.05 * size,
    ),
    Finding(f"{empty:,} training examples have no response token: influence 0, never selected.", empty > 0),
  ]


def _score_findings(run: SelectRun) -> list[Finding]:
  found = []
  for name, values in (("response length", run.response_tokens), ("loss", run.columns["loss"])):
    values = np.asarray(values, np.float64)
    rho = statistics.spearman(run.influence, values) if np.isfinite(values).all() else math.nan
    if math.isnan(rho):
      found.append(Finding(f"Influence and {name}: no rank correlation (one of them is constant).", False))
    else:
      word = f" A ranking by influence is partly one by {name}." if abs(rho) > 0.3 else ""
      found.append(Finding(f"Influence and {name}: Spearman {rho:+.2f}.{word}", abs(rho) > 0.3))
  found += _length_findings(run)
  positive = np.sort(np.maximum(run.influence, 0))[::-1]
  if positive[0] > 0:
    few = max(1, round(0.01 * len(positive)))
    share = positive[:few].sum() / positive.sum()
    text = f"The strongest 1 % of the examples ({few:,}) bring {share:.0%} of all positive influence."
    found.append(Finding(text, bool(share > 0.25)))
  return found


def _length_findings(run: SelectRun) -> list[Finding]:
  """What the choice itself, by whatever policy, has to do with length."""
  answered = run.response_tokens > 0  # the others are never selected
  chosen, lengths = run.selected[answered], run.response_tokens[answered].astype(np.float64)
  if chosen.all() or not chosen.any():
    return []
  longer = statistics.roc_auc(lengths, chosen)
  kept, left = lengths[chosen].mean(), lengths[~chosen].mean()
  word = f" The selection is partly one by {'long' if longer.mean > 0.5 else 'short'} responses."
  biased = abs(longer.mean - 0.5) > 0.15 and not longer.low <= 0.5 <= longer.high
  text = f"Selected examples have {kept:.1f} response tokens on average, the others {left:.1f}.{word if biased else ''}"
  return [Finding(text, biased)]


def _solver_findings(run: SelectRun) -> list[Finding]:
  solver, residual = run.summary["solver"], run.summary["solver_residual"]
  if residual is None:
    return [Finding("Nobody measured the residual of the solver.", solver.get("solver") != "identity")]
  text = f"Residual of the solver: {table_text.format_value(residual)} after {run.summary['solver_steps']} steps"
  troubles = []
  if solver.get("converged") is False:  # some solvers know no tolerance
    troubles.append("above the tolerance that was asked for")
  if residual > 1:
    troubles.append("worse than no answer, whose residual is 1")
  return [Finding(", ".join([text, *troubles]) + ".", bool(troubles))]


# -------------------------------------------------------------------------------------------------- figures


def figures(run: SelectRun) -> dict[str, Figure]:
  """File name -> figure, for papers: what the page draws, in the style of the other plots of a run."""
  topics = topic_table(run.columns["topic"], run.selected, run.response_tokens)
  topics = sorted(topics, key=lambda row: -row["examples"])[:FIGURE_TOPICS]
  names = [row["topic"] or "(no topic)" for row in topics]
  made = {"scores.svg": score_histogram_plot(run.influence, run.selected)}
  if run.curve:
    steps, residuals = run.curve
    made["residual.svg"] = residual_plot(residuals, run.summary["solver"]["solver"], steps)
  made["kept-by-topic.svg"] = bar_plot(names, _kept_and_left(topics), "training examples")
  lengths = length_rows(run)
  labels = [row["response tokens"] for row in lengths]
  made["kept-by-length.svg"] = bar_plot(labels, _kept_and_left(lengths), "training examples, by response tokens")
  if run.layers:
    rows = layer_rows(run)
    sizes = {"contribution": [row["mean size of contribution"] for row in rows]}
    made["layers.svg"] = bar_plot([row["layer"] for row in rows], sizes, "mean size of the contribution")
  if run.queries is not None:
    received = coverage(run)
    places = np.arange(1, len(run.query_records) + 1)
    curves = {
      "all training examples": (places, np.sort(received["mean"])),
      "selected": (places, np.sort(received["selected_mean"])),
    }
    made["coverage.svg"] = curve_plot(curves, "evaluation examples, least covered first", "mean influence received")
  return made


def _kept_and_left(rows: Sequence[Mapping]) -> dict[str, list[int]]:
  return {
    "selected": [row["selected"] for row in rows],
    "left out": [row["examples"] - row["selected"] for row in rows],
  }
