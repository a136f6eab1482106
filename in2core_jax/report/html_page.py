"""report.html of a `select` run: one file without network, which a browser opens from disk.

Tables and pictures are rendered here, by Jinja with autoescaping. The examples travel as one JSON text in a
`<script type="application/json">`, of which `templates/report.js` puts the page that is looked at into the document, as
text and never as markup. A content security policy names the hashes of our one script and one style sheet, so a browser
runs nothing else, and loads nothing.

The same run gives the same bytes: no times, no host names.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np

from in2core_jax.data.records import Record, rejected_turns, spoken
from in2core_jax.errors import printable
from in2core_jax.report import answer, charts, facts, findings, table_text
from in2core_jax.report.facts import SelectRun
from in2core_jax.report.markdown import retrain_rows, topic_table
from in2core_jax.report.templating import carried, environment
from in2core_jax.runs.identities import by_flags

LISTED = 60_000  # examples in the page; of more, the first choices and the strongest of both ends
TEXT_BUDGET = 8_000_000  # characters of all listed texts together
CUTS = (200_000, 40_000, 8_000, 2_000, 800, 160)  # characters of one example: the largest that keeps the budget
FULL = 100  # strongest at each end whose texts are not cut, within a budget of their own
FULL_BUDGET = 4_000_000
PARTNERS = 10  # training examples at each end, for each evaluation example
QUERIES = 2_000  # evaluation examples in the page
TOPIC_ROWS = 50
NAME = 100  # characters of an id or a topic
ASKED = 120  # characters of the query that a choice was made for
_TURN = re.compile(r"in turn for query (.+), round [\d,]+")  # of `selection.reasons`, whose ids are `printable`
# How the page names the turns: r a response, whose tokens the loss counts, and a an assistant's turn before the first
# user's, which is no response.
_ROLES = {"system": "s", "user": "u", "assistant": "r", "tool": "t"}


def select_page(run: SelectRun) -> str:
  """The page of one `select` run, as HTML. Texts of the data stay texts, whatever they hold."""
  (script, script_hash), (style, style_hash) = carried("report.js"), carried("report.css")
  listing = _Listing.of(run)
  page = (
    environment()
    .get_template("report.html.j2")
    .render(
      script=script,
      script_hash=script_hash,
      style=style,
      style_hash=style_hash,
      data=embed_json(_payload(run, listing)),
      listing=listing,
      **_overview(run),
      **_settings(run),
    )
  )
  return _SURROGATES.sub("\ufffd", page)  # which UTF-8 has no form for; in the JSON they are escaped


# ----------------------------------------------------------------------------------------------- JSON in HTML

_SURROGATES = re.compile("[\ud800-\udfff]")
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def embed_json(obj: Any) -> markupsafe.Markup:
  """JSON that can stand inside a script element: what could end or open markup becomes a JSON escape.

  Raises:
    ValueError: NaN or an infinity, which JSON has no form for.
  """
  text = json.dumps(obj, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
  return markupsafe.Markup(_UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def _numbers(values: Iterable[float], digits: int = 6) -> list[float | None]:
  """Floats in few digits, for a small page; None where there is no number."""
  return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in np.asarray(values).tolist()]


def _bits(values: Iterable[bool]) -> str:
  return "".join("1" if value else "0" for value in values)


# ------------------------------------------------------------------------------------------ what the page lists


@dataclasses.dataclass(frozen=True)
class _Listing:
  """Which examples the page holds, and how much of their texts.

  Attributes:
    rows: int64 [n], of the whole table, in source order.
    total: N.
    limits: int64 [n], characters of each example's text.
    cut: characters of the texts that are not shown in full.
    shortened: how many of the listed texts are cut.
    full: how many are in full because of their place.
  """

  rows: np.ndarray
  total: int
  limits: np.ndarray
  cut: int
  shortened: int
  full: int

  @classmethod
  def of(cls, run: SelectRun) -> _Listing:
    """Chooses the rows and their lengths; by rank alone, so the same run gives the same page."""
    total = len(run.records)
    special = _special_rows(run)
    rows = np.unique(np.concatenate([*_ends(run, LISTED // (3 if "choice" in run.columns else 2)), special]))
    lengths = {row: sum(len(spoken(message)) for message in run.records[row].messages) for row in rows.tolist()}
    sizes = np.array(list(lengths.values()), np.int64)
    cut = next((size for size in CUTS if np.minimum(sizes, size).sum() <= TEXT_BUDGET), CUTS[-1])
    limits = dict.fromkeys(lengths, cut)
    budget, full = FULL_BUDGET, 0
    for row in special.tolist():
      if cut < lengths[row] <= budget and lengths[row] <= CUTS[0]:
        limits[row], budget, full = lengths[row], budget - lengths[row], full + 1
    shortened = sum(lengths[row] > limit for row, limit in limits.items())
    return cls(rows, total, np.array(list(limits.values()), np.int64), cut, shortened, full)

  def places(self, rows: Iterable[int]) -> list[int]:
    """Rows of the whole table as places in the listing."""
    return np.searchsorted(self.rows, np.asarray(list(rows), np.int64)).tolist()


def _ends(run: SelectRun, count: int) -> list[np.ndarray]:
  """The first choices, where their order is known, and the strongest of both ends of the ranking by influence."""
  first = [run.first[:count]] if "choice" in run.columns else []
  return [*first, run.order[:count], run.order[::-1][:count]]


def _special_rows(run: SelectRun) -> np.ndarray:
  """Rows whose texts matter most, in order: the ends in turn, near-duplicates, partners of queries."""
  ends = np.stack(_ends(run, FULL), axis=1).reshape(-1)
  copies = [row for group in run.top_copies for row in group.rows.tolist()]
  partners = [] if run.queries is None else [row for scores in run.queries[:QUERIES] for row in _partners(scores)]
  return np.array(list(dict.fromkeys([*ends.tolist(), *copies, *partners])), np.int64)


def _partners(scores: np.ndarray) -> list[int]:
  """Rows of the examples that help an evaluation example most, then of those that hurt it most."""
  order = np.argsort(-scores, kind="stable")
  helps = [row for row in order[:PARTNERS].tolist() if scores[row] > 0]
  return helps + [row for row in order[::-1][:PARTNERS].tolist() if scores[row] < 0]


def _texts(records: Sequence[Record], limits: Iterable[int]) -> dict[str, list]:
  """Turns for the page: roles as one letter each, texts as strings, or as [start, characters left out] when cut.

  A text that is too long gives each of its turns an equal share of its limit.
  """
  roles, texts = [], []
  for record, limit in zip(records, limits, strict=True):
    lost = rejected_turns(record)
    contents = [spoken(message) for message in (*record.messages, *lost)]
    first = next((i for i, message in enumerate(record.messages) if message["role"] == "user"), len(contents))
    letters = [_ROLES[message["role"]] if message.get("train", True) else "a" for message in record.messages]
    letters += ["x" if message["role"] == "assistant" else _ROLES[message["role"]] for message in lost]
    roles.append("".join("a" if letter == "r" and i < first else letter for i, letter in enumerate(letters)))
    share = limit if sum(map(len, contents)) <= limit else max(limit // len(contents), 1)
    texts.append([text if len(text) <= share else [text[:share], len(text) - share] for text in contents])
  return {"roles": roles, "texts": texts}


def _payload(run: SelectRun, listing: _Listing) -> dict[str, Any]:
  """What the script reads: columns of the listed examples, groups of near-duplicates, evaluation examples."""
  rows = listing.rows
  part = {name: np.asarray(values)[rows] for name, values in run.columns.items()}
  topics = sorted({str(topic) for topic in part["topic"]})
  number = {topic: place for place, topic in enumerate(topics)}
  examples = {
    "id": [str(name)[:NAME] for name in part["example_id"]],
    "influence": _numbers(part["influence"]),
    "rank": part["rank"].tolist(),
    "selected": _bits(part["selected"]),
    "truncated": _bits(np.asarray(run.truncated, bool)[rows]),
    "loss": _numbers(part["loss"], 4),
    "tokens": part["num_tokens"].tolist(),
    "responses": part["num_response_tokens"].tolist(),
    "topic": [number[str(topic)] for topic in part["topic"]],
    **_texts([run.records[row] for row in rows], listing.limits.tolist()),
  }
  if "choice" in part:
    examples["choice"] = part["choice"].tolist()
    examples["reason"] = [table_text.plain_line(reason) for reason in part["reason"]]
    examples |= _asked(part["reason"], run.query_records)
  if "self_influence" in part:
    examples["self_influence"] = _numbers(part["self_influence"])
  copies = [{"rows": listing.places(g.rows), "similarity": _numbers(g.similarity, 2)} for g in run.top_copies]
  names = [topic[:NAME] for topic in topics]
  return {"total": listing.total, "topics": names, "examples": examples, "copies": copies} | _queries(run, listing)


def _asked(reasons: Iterable[str], records: Sequence[Record]) -> dict[str, list]:
  """What the queries say that examples were chosen for: their texts, and for each example its place in them or -1."""
  texts, places, found = {}, {}, []
  for record in records:
    words = next((spoken(message) for message in record.messages if message["role"] == "user"), "")
    texts.setdefault(printable(record.example_id[:80]), table_text.plain_line(words, ASKED))
  for reason in reasons:
    turn = _TURN.match(reason)
    known = turn is not None and turn[1] in texts
    found.append(places.setdefault(turn[1], len(places)) if known else -1)
  return {"asked": found, "asked_texts": [texts[name] for name in places]} if places else {}


def _queries(run: SelectRun, listing: _Listing) -> dict[str, Any]:
  """The evaluation examples with what they receive and their partners; nothing without `queries`."""
  if run.queries is None:
    return {"queries": None}
  records = run.query_records[:QUERIES]
  partners = [_partners(scores) for scores in run.queries[:QUERIES]]
  received = {name: _numbers(values[:QUERIES], 4) for name, values in facts.coverage(run).items()}
  return {
    "queries": {
      "id": [record.example_id[:NAME] for record in records],
      "topic": [record.topic[:NAME] for record in records],
      **_texts(records, itertools.repeat(max(TEXT_BUDGET // (4 * len(records)), CUTS[-1]), len(records))),
      **received,
      "rows": [listing.places(rows) for rows in partners],
      "influence": [_numbers(scores[rows]) for scores, rows in zip(run.queries, partners, strict=False)],
    }
  }


# ---------------------------------------------------------------------------------------- tables and pictures


def _overview(run: SelectRun) -> dict[str, Any]:
  """What the template shows besides the examples."""
  topics = topic_table(run.columns["topic"], run.selected, run.response_tokens)
  lengths, layers = facts.length_rows(run), facts.layer_rows(run)
  gains = [(gain.name, (gain.by_token, gain.by_example)) for gain in answer.gains(run)]
  return {
    "facts": {
      "proponents": float(np.mean(run.influence > 0)),
      "copies": len(run.top_copies),
      "ordered": "choice" in run.columns,
      "queries": 0 if run.queries is None else len(run.query_records),
      "top": len(run.searched),
    },
    "answer": answer.answer(run),
    "numbers": answer.numbers(run),
    "warnings": findings.warnings(run),
    "fine": findings.fine(run),
    "parts": facts.part_rows(run),
    "targets": facts.target_rows(run),
    "overlaps": facts.overlap_rows(run),
    "topics": [row | {"topic": table_text.plain_line(row["topic"], NAME)} for row in topics[:TOPIC_ROWS]]
    if len(topics) > 1
    else [],
    "more_topics": max(len(topics) - TOPIC_ROWS, 0),
    "lengths": lengths,
    "layers": layers,
    "retrain": _retrain(run.retrain),
    "charts": {
      "gain": charts.intervals(gains) if gains else None,
      "scores": charts.histogram(run.influence, run.selected),
      "residual": charts.curve(*run.curve) if run.curve else None,
      "lengths": charts.bars([row["response tokens"] for row in lengths], _halves(lengths)),
      "layers": charts.bars(
        [row["layer"].removeprefix("layer ") for row in layers],
        {"contribution": [row["mean size of contribution"] for row in layers]},
      )
      if layers
      else None,
    },
  }


def _halves(rows: Sequence[Mapping]) -> dict[str, list[float]]:
  return {"selected": [row["selected"] for row in rows], "left out": [row["left out"] for row in rows]}


def _retrain(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """The table of an `evaluate` run, read back from JSON, where a missing interval is null."""
  if found is None:
    return None
  table = [{key: math.nan if value is None else value for key, value in row.items()} for row in found["table"]]
  rows = [{name.replace("_", " "): value for name, value in row.items()} for row in retrain_rows(table)]
  told = found.get("warnings", ())  # they stand at the top of the page
  verdict = [line for line in found["verdict"] if line not in told]
  return {"rows": rows, "verdict": verdict, "recipe": found["recipe"]}


def _settings(run: SelectRun) -> dict[str, Any]:
  """Flags, solver and identity: what a reader needs to judge, or to repeat, the run."""
  summary = run.summary
  solver = dict(summary["solver"]) | {"steps": summary["solver_steps"], "residual": summary["solver_residual"]}
  identity = summary["identity"]
  hashes = {"model_hash": identity["model_hash"]} | {f"data {part}": value for part, value in identity["data"].items()}
  return {
    "policy": summary["policy"],
    "rule": summary.get("rule", summary["policy"]),
    "unit": summary["unit"],
    "version": identity["version"],
    "solver": solver,
    "flags": dict(sorted(by_flags(identity["flags"]).items())),
    "hashes": hashes,
  }
