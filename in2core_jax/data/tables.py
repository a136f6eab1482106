"""Tables as source records, a row each: CSV and TSV, Parquet, Arrow files and streams.

A row becomes the JSON object of its columns, so that every shape of `record_shapes` works, and its JSON line is what a
coreset keeps. Rows are read in batches; no table is in memory as a whole.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from in2core_jax.data.file_kinds import DataFile
from in2core_jax.data.json_files import numbered_lines
from in2core_jax.data.record_keys import column_type
from in2core_jax.data.records import BadRecords, Item, shorten
from in2core_jax.errors import UserError, how_many
from in2core_jax.parallel.host import available_bytes

_ROWS = 1024  # that are in memory as Python objects at once
_LONGEST_CELL = 50_000_000  # characters; a quote that is never closed ends there
# What a table may be refused with by pyarrow; a flipped bit can also turn a text into one that is not UTF-8.
_BROKEN = (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, KeyError, OverflowError)
_as_json = json.JSONEncoder(ensure_ascii=False).encode


def table_items(file: DataFile, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  """Yields the rows of a table.

  Args:
    file: what is read.
    fields: {role: column} of its records.
    bad: gets the rows that cannot be read.

  Raises:
    UserError: damaged, or no table; with the row at which reading stopped.
  """
  if file.kind == "csv":
    return _csv_items(file, fields, bad)
  return _row_items(file, fields, _parquet_rows(file) if file.kind == "parquet" else _arrow_rows(file))


def to_plain(value: Any) -> Any:
  """Turns a value of a table into a JSON value.

  Bytes are text, or {"bytes": how many} where they are none; NaN is null; times are ISO 8601; decimals are numbers.
  Inside an object a null is left out: columns hold every key that any row has, so it was not there when it was written.
  """
  if value is None or isinstance(value, str | bool | int):
    return value
  if isinstance(value, dict):
    return {str(key): to_plain(item) for key, item in value.items() if item is not None}
  if isinstance(value, list | tuple):
    return [to_plain(item) for item in value]
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError:
      return {"bytes": len(value)}
  if isinstance(value, float):
    return None if math.isnan(value) else value
  if isinstance(value, datetime.date | datetime.time):
    return value.isoformat()
  if isinstance(value, decimal.Decimal):
    return float(value) if value.is_finite() else None
  return str(value)


# ---- Parquet and Arrow -----------------------------------------------------------------------------------------------


def _row_items(file: DataFile, fields: Mapping[str, str], rows: Iterator[dict[str, Any]]) -> Iterator[Item]:
  number = 0
  for number, row in enumerate(rows, 1):
    value = {key: to_plain(item) for key, item in row.items()}
    yield Item(value, _as_json(value), file.shown, number, fields)
  if not number:
    raise UserError(f"{file.shown} has no rows; it must hold one record a row")


@contextlib.contextmanager
def _named(file: DataFile, place: str):
  """Turns what pyarrow says of a damaged table into one sentence that names the place."""
  try:
    yield
  except _BROKEN as error:
    detail = shorten(" ".join(str(error).split()), 200)
    raise UserError(f"{file.shown}: {place} cannot be read ({detail}); get the file again") from error


def _check_names(file: DataFile, names: list[str]) -> None:
  for i, name in enumerate(names):
    if name in names[:i]:
      raise UserError(f"{file.shown}: the column {name!r} stands twice, so that one of them would be lost; rename it")


def _rows_of(batch: pa.RecordBatch) -> Iterator[list[dict[str, Any]]]:
  batch.validate(full=True)  # offsets of a damaged file would point out of its buffers
  for i, field in enumerate(batch.schema):
    if pa.types.is_timestamp(field.type) and field.type.unit == "ns":  # which Python's times are too coarse for
      batch = batch.set_column(i, field.name, batch[i].cast(pa.timestamp("us", field.type.tz), safe=False))
  for start in range(0, batch.num_rows, _ROWS):
    yield batch.slice(start, _ROWS).to_pylist(maps_as_pydicts="strict")


def _parquet_rows(file: DataFile) -> Iterator[dict[str, Any]]:
  with _named(file, "the Parquet file"):
    # Columns are read through a small buffer: `pre_buffer` would take whole row groups into memory.
    table = pq.ParquetFile(file.path, buffer_size=1 << 16, pre_buffer=False, page_checksum_verification=True)
  with table:
    with _named(file, "the schema of the Parquet file"):
      names = table.schema_arrow.names
      meta = table.metadata
      size = sum(meta.row_group(group).total_byte_size for group in range(meta.num_row_groups))
    _check_names(file, names)
    if size > available_bytes():
      raise UserError(
        f"{file.shown}: unpacked it has {size / 1e9:,.1f} GB, which may need as much memory as token ids; give a part "
        "of it"
      )
    before = 0
    for group in range(meta.num_row_groups):
      batches = table.iter_batches(_ROWS, row_groups=[group], use_threads=False)
      while True:
        with _named(file, f"row group {group} after row {before}"):
          batch = next(batches, None)
          rows = [row for part in _rows_of(batch) for row in part] if batch is not None else []
        if batch is None:
          break
        before += len(rows)
        yield from rows


def _arrow_rows(file: DataFile) -> Iterator[dict[str, Any]]:
  before = 0
  with _named(file, "the Arrow file"):
    mapped = pa.memory_map(str(file.path))
  with mapped:
    with _named(file, "the schema of the Arrow file"):
      is_file = mapped.read(6) == b"ARROW1"
      mapped.seek(0)
      reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
      names = reader.schema.names
    _check_names(file, names)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
    while True:
      with _named(file, f"the batch after row {before}"):
        batch = next(batches, None)
        parts = _rows_of(batch) if batch is not None else iter(())
      if batch is None:
        return
      while True:
        with _named(file, f"what follows row {before}"):
          rows = next(parts, None)
        if rows is None:
          break
        before += len(rows)
        yield from rows


# ---- CSV -------------------------------------------------------------------------------------------------------------


def _csv_items(file: DataFile, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  """Yields the rows of a table of texts; the standard reader knows the lines, pyarrow's does not."""
  csv.field_size_limit(_LONGEST_CELL)
  not_utf8: list[int] = []
  rows = _csv_rows(file, not_utf8)
  _, header = next(rows, (0, []))
  names = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(header)]  # as pandas calls its index
  _check_names(file, names)
  roles = {column: role for role, column in fields.items()}
  types = [column_type(roles.get(name, name)) for name in names]
  number = 0
  for number, cells in rows:
    if not_utf8 or len(cells) != len(names):
      bad.read += 1
      reason = (
        f"it has {how_many(len(cells), 'cell')}, and the header has {len(names)}; put cells with separators into quotes"
      )
      place, shown = f"{file.shown}:{number}", shorten(",".join(cells), 2000)
      bad.refuse(place, shown, f"line {not_utf8[0]} is not UTF-8; save the file as UTF-8" if not_utf8 else reason)
      not_utf8.clear()
      continue
    value = {name: _cell(kind, cell) for name, kind, cell in zip(names, types, cells, strict=True)}
    yield Item(value, _as_json(value), file.shown, number, fields)
  if not number:
    raise UserError(f"{file.shown} has no rows; it must hold the names of its columns, and one record a row below")


def _csv_rows(file: DataFile, not_utf8: list[int]) -> Iterator[tuple[int, list[str]]]:
  """Yields (line at which it begins, cells) of each row that is not blank; `not_utf8` gets lines that are no text."""

  def lines() -> Iterator[str]:
    for number, data in numbered_lines(file):
      try:
        yield data.decode("utf-8")
      except UnicodeDecodeError:
        not_utf8.append(number)
        yield data.decode("utf-8", "replace")

  source, head = lines(), [""]
  while not head[-1].strip() and (line := next(source, None)) is not None:
    head.append(line)
  reader = csv.reader(itertools.chain(head[1:], source), delimiter=_separator(head[-1]), strict=True)
  begins = 1
  try:
    for cells in reader:
      if cells:
        yield begins, cells
      begins = reader.line_num + 1
  except csv.Error as error:
    raise UserError(
      f"{file.shown}:{begins}: broken CSV ({error}); a cell with a quote in it stands in quotes, and its quotes are "
      "doubled"
    ) from error


def _separator(header: str) -> str:
  """What stands most often between the names of the columns; tab, comma, semicolon, in this order if alike."""
  outside = "".join(header.split('"')[::2])
  return max("\t,;", key=outside.count) if any(sign in outside for sign in "\t,;") else ","


def _cell(kind: str, cell: str) -> Any:
  """A cell of a `column_type`: a text, but for columns that never hold one, whose values are those that JSON has."""
  if kind == "text":
    return cell
  text = cell.strip()
  if text.lower() in ("true", "false"):
    return text.lower() == "true"
  if kind == "truth":
    return cell
  if text.lower() in ("", "nan", "null", "none"):
    return None
  try:
    number = float(text)
  except ValueError:
    return cell
  return int(number) if number.is_integer() and "." not in text else number if math.isfinite(number) else cell
