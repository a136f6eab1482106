"""What the report of a `select` run says, as rows of tables and as figures for papers. No markup here.

Everything follows from the run's own results: equal results give equal rows and figures, with no times in them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from in2core_jax.data.records import Record, first_of, spoken
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.report import near_duplicates
from in2core_jax.report.markdown import topic_table
from in2core_jax.report.plots import bar_plot, curve_plot, residual_plot, score_histogram_plot
from in2core_jax.runs.run_folder import RunDir

TOP = 300  # first choices that are searched for near-duplicates
LENGTH_BINS = 8
FIGURE_TOPICS = 25
_COLUMNS = ("example_id", "influence", "rank", "selected", "loss", "num_tokens", "num_response_tokens", "topic")


@dataclasses.dataclass(frozen=True)
class SelectRun:
  """The results of one `select` run.

  Attributes:
    columns: of scores.parquet, [N] each: example_id, influence, rank (1 = highest), selected (bool), loss, num_tokens,
      num_response_tokens, topic; perhaps self_influence, and choice (1 = chosen first, 0 = left out) with reason.
    records: the N training records, in the same order.
    truncated: bool [N], whether tokens of the example were cut off.
    data: `summaries.data_summary` of the parts.
    summary: what summary.json holds; read are policy, rule, apart, another_kind, queries, eval_sources, unit, solver,
      solver_steps, solver_residual, solver_curve, warnings and identity.
    layers: {layer: influence [N]}, which add up to the influence, or None.
    query_records: the Q evaluation records; needed with `queries`.
    queries: float32 [Q, N], influence of every training example on every evaluation example, or None.
    retrain: what evaluation.json of an `evaluate` run with this selection holds (table, verdict, recipe, warnings), and
      in `candidate` what its table calls this selection; or None.

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
  def first(self) -> np.ndarray:
    """int64 [N], rows in order of choice, then those left out by rank; by rank alone where the order is not known."""
    if "choice" not in self.columns:
      return self.order
    choice = np.asarray(self.columns["choice"], np.int64)
    return np.lexsort((self.columns["rank"], np.where(choice == 0, len(choice) + 1, choice)))

  @property
  def rule(self) -> str:
    """The rule that chose; with the policy `auto` the one that it took."""
    return self.summary.get("rule", self.summary["policy"])

  @functools.cached_property
  def response_tokens(self) -> np.ndarray:
    """int64 [N]."""
    return np.asarray(self.columns["num_response_tokens"], np.int64)

  @functools.cached_property
  def copies(self) -> np.ndarray:
    """int64 [N], equal for duplicates."""
    return first_of(self.records)

  @functools.cached_property
  def curve(self) -> tuple[list[int], np.ndarray] | None:
    """Steps and residuals [steps, Q] of the solver, or None where fewer than two were measured."""
    points = self.summary["solver_curve"]
    if len(points) < 2:
      return None
    residuals = np.array([np.atleast_1d(residual) for _, residual in points], np.float64)
    return [step for step, _ in points], residuals

  @property
  def searched(self) -> np.ndarray:
    """int64 [n], the first choices, or where their order is not known the strongest proponents; at most `TOP`."""
    return self.first[: min(TOP, int(self.selected.sum()))] if "choice" in self.columns else self.first[:TOP]

  @functools.cached_property
  def top_copies(self) -> list[near_duplicates.Group]:
    """Near-duplicates among the `searched` rows; rows of the whole table."""
    top = self.searched
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
  """Counts of each part: examples, tokens, truncated, without response, duplicates."""
  return [
    {
      "part": name,
      "examples": part["examples"],
      "tokens": part["tokens"],
      "response tokens": part["response_tokens"],
      "truncated": part["truncated"],
      "without response": part["empty_responses"],
      "duplicates": part["duplicates"],
    }
    for name, part in run.data["parts"].items()
  ]


def target_rows(run: SelectRun) -> list[dict]:
  """What each source of evaluation examples counts; empty where all examples count alike."""
  return [row | {"share": f"{row['share']:.1%}"} for row in run.summary.get("eval_sources") or ()]


def overlap_rows(run: SelectRun) -> list[dict]:
  """How many examples of the second part also occur in the first."""
  return [
    {"parts": name, "same messages": count["same_messages"], "same prompt": count["same_prompt"]}
    for name, count in run.data["overlap"].items()
  ]


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
