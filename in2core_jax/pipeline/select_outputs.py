"""What a select run writes for other tools: the coreset in their forms, a file for each source, the mixture, the pool.

`coreset.jsonl` is the records as they were read; all else here says the same in another form, and no number depends on
it. So a finished run adds what it is asked for and does not have.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from in2core_jax.data import record_tables, sources
from in2core_jax.data.ragged import taken
from in2core_jax.data.record_tables import Table
from in2core_jax.data.records import Raws, raw_lines, source_labels
from in2core_jax.data.tokenizing import TokenizedDataset
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs.run_folder import RunDir, hash_of

log = logging.getLogger(__name__)

POOL = "pool_scored.parquet"
TOKENS = "coreset_tokens"
# Word of --coreset_format or --write -> the file of it that is written last.
FORMS = {"parquet": "coreset.parquet", "hf": "coreset_hf/state.json", "tokens": f"{TOKENS}/state.json", "pool": POOL}
_IGNORED = -100  # label of a token that no loss counts, as PyTorch has it


# ---- by source -------------------------------------------------------------------------------------------------------


def mixture(names: Sequence[str], selected: np.ndarray, tokens: np.ndarray) -> list[dict[str, Any]]:
  """What was chosen of each source, in the order in which they come.

      weight = (chosen of the source / examples of the source) / (chosen / examples)

  Args:
    names: source of each example, [N].
    selected: bool [N].
    tokens: int [N], response tokens.

  Returns:
    For each source: counts in the pool and chosen, the same of response tokens; `share` of the chosen examples and
    `token_share` of their response tokens; `weight`: how often it is drawn for each time that the pool as it is would.
  """
  order = {name: i for i, name in enumerate(dict.fromkeys(names))}
  code = np.array([order[name] for name in names], np.int64)
  total, all_tokens = int(selected.sum()), int(tokens[selected].sum())
  rows = []
  for name, i in order.items():
    own = code == i
    kept = own & selected
    count, kept_tokens = int(kept.sum()), int(tokens[kept].sum())
    rows.append(
      {
        "source": name,
        "pool_examples": int(own.sum()),
        "pool_response_tokens": int(tokens[own].sum()),
        "examples": count,
        "response_tokens": kept_tokens,
        "share": count / total if total else 0.0,
        "token_share": kept_tokens / all_tokens if all_tokens else 0.0,
        "weight": (count / own.sum()) / (total / len(selected)) if total else 0.0,
      }
    )
  return rows


def file_names(names: Sequence[str]) -> dict[str, str]:
  """Source -> a file name of its own, `coreset/NAME.jsonl`."""
  found: dict[str, str] = {}
  taken: set[str] = set()
  for name, label in source_labels(names).items():
    word = re.sub(r"[^\w.-]+", "-", label).strip("-.") or "source"
    one, number = word, 1
    while one.casefold() in taken:  # as file systems that do not tell cases apart see it
      number += 1
      one = f"{word}-{number}"
    taken.add(one.casefold())
    found[name] = f"coreset/{one}.jsonl"
  return found


def write_sources(
  run_dir: RunDir, train: TokenizedDataset, selected: np.ndarray, weights: np.ndarray | None = None
) -> list[dict[str, Any]]:
  """mixture.json and, of several sources, a file for each; returns the rows of the mixture.

  Args:
    run_dir: of the run.
    train: N examples.
    selected: bool [N].
    weights: f64 [N], of the selected; None: they have none.
  """
  names = sources.names_of(train.records)
  rows = mixture(names, selected, train.num_response_tokens)
  if len(rows) > 1:
    for name, file in file_names([row["source"] for row in rows]).items():
      own = [row for row in np.flatnonzero(selected) if names[row] == name]
      run_dir.write_text(file, raw_lines(train.records, own, weights))
      next(row for row in rows if row["source"] == name)["file"] = file
  else:
    rows[0]["file"] = "coreset.jsonl"
  run_dir.write_json("mixture.json", {"sources": rows})
  return rows


# ---- in other forms --------------------------------------------------------------------------------------------------


def add_forms(run_dir: RunDir, train: TokenizedDataset, s: Settings) -> None:
  """What a finished run is asked for besides and does not have (--coreset_format, --write=pool)."""
  if run_dir.writer and any(s.writes(word) for word in FORMS):
    write_forms(run_dir, train, run_dir.read_parquet("scores.parquet"), s)


def write_forms(run_dir: RunDir, train: TokenizedDataset, columns: Mapping[str, np.ndarray], s: Settings) -> None:
  """The forms that are asked for and are not there, by the process that writes.

  Args:
    run_dir: with its scores.parquet.
    train: N examples.
    columns: of scores.parquet.
    s: --coreset_format, --write.
  """
  rows = np.flatnonzero(columns["selected"])
  weights = columns.get("weight")
  lines = lambda: Raws(taken(train.records, rows), None if weights is None else weights[rows])  # noqa: E731
  make: dict[str, Callable[[], None]] = {
    "parquet": lambda: _write_parquet(run_dir, FORMS["parquet"], Table.of(lines())),
    "hf": lambda: _write_table_hf(run_dir, "coreset_hf", Table.of(lines())),
    "tokens": lambda: _write_hf(run_dir, TOKENS, _TOKEN_SCHEMA, _token_batches(train, rows)),
    "pool": lambda: _write_parquet(run_dir, POOL, _pool(train, columns)),
  }
  for word, name in FORMS.items():
    if run_dir.writer and s.writes(word) and run_dir.distrust(name) is not None:
      make[word]()
      log.info("%s", run_dir.path / name.removesuffix("/state.json"))


def _pool(train: TokenizedDataset, columns: Mapping[str, np.ndarray]) -> Table:
  return Table.of(Raws(train.records), pool_columns(train, columns))


def pool_columns(train: TokenizedDataset, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Columns of the scored pool beside those of the records: of scores.parquet, and the places of source and topic."""
  source = np.array(sources.names_of(train.records), dtype=object)
  found = {"example_id": columns["example_id"], "source": source}
  found |= {name: values for name, values in columns.items() if name != "example_id"}
  for name, groups in (("source_quota", source), ("topic_quota", columns["topic"])):
    _, code = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    found[name] = np.bincount(code, weights=columns["selected"]).astype(np.int64)[code]
  return found


# ---- files -----------------------------------------------------------------------------------------------------------

_TOKEN_SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels")])
_TOKEN_SCHEMA = _TOKEN_SCHEMA.append(pa.field("attention_mask", pa.list_(pa.int8())))


def _write_parquet(run_dir: RunDir, name: str, table: Table) -> None:
  _tell_texts(name, table)

  def write(stream: BinaryIO) -> None:
    with pq.ParquetWriter(stream, table.schema, compression="zstd", write_page_checksum=True) as writer:
      for batch in table.batches():
        writer.write_batch(batch)

  run_dir.write_streamed(name, write)


def _write_table_hf(run_dir: RunDir, folder: str, table: Table) -> None:
  _tell_texts(folder, table)
  _write_hf(run_dir, folder, table.schema, table.batches())


def _write_hf(run_dir: RunDir, folder: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
  """A folder as `datasets.Dataset.save_to_disk` leaves it; the features follow from the Arrow schema."""
  data = "data-00000-of-00001.arrow"

  def write(stream: BinaryIO) -> None:
    with pa.ipc.new_stream(stream, schema) as writer:
      for batch in batches:
        writer.write_batch(batch)

  run_dir.write_streamed(f"{folder}/{data}", write)
  texts = dict.fromkeys(("citation", "description", "homepage", "license"), "")
  run_dir.write_json(f"{folder}/dataset_info.json", texts | {"features": None})
  fingerprint = hash_of([run_dir.identity_sha256, folder])[:16]  # names what `datasets` caches of it
  state = {"_data_files": [{"filename": data}], "_fingerprint": fingerprint, "_format_columns": None}
  state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": "train"}
  run_dir.write_json(f"{folder}/state.json", state)


def _token_batches(train: TokenizedDataset, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
  for start in range(0, len(rows), record_tables.BLOCK):
    part = rows[start : start + record_tables.BLOCK]
    ids = [train.tokens[row] for row in part]
    labels = [np.where(train.response_mask[row], train.tokens[row], _IGNORED) for row in part]
    masks = [np.ones(len(tokens), np.int8) for tokens in ids]
    columns = [pa.array(values, field.type) for values, field in zip((ids, labels, masks), _TOKEN_SCHEMA, strict=True)]
    yield pa.RecordBatch.from_arrays(columns, schema=_TOKEN_SCHEMA)


def _tell_texts(name: str, table: Table) -> None:
  if table.columns.as_text:
    words = ", ".join(sorted(map(json.dumps, table.columns.as_text)))
    log.info("%s: values of several types, written as JSON texts: %s", name, words)
