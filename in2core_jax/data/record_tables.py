"""Records as tables, for Parquet and Arrow: one schema for all of them, in blocks of rows, nothing in memory twice.

A column is what its values have in common. Where they have nothing in common (a number here, a list there, an object
without keys), it holds their JSON texts instead, as data tools want one type a column.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from in2core_jax.data.records import Record, content_key, rejected_turns
from in2core_jax.data.turns import Message, clean

BLOCK = 4096  # rows that are Python objects at once
_MIXED = (pa.ArrowException, OverflowError)  # values of several types; whole numbers of more than 64 bits


@dataclasses.dataclass(frozen=True)
class Columns:
  """What columns the records of a source have.

  Attributes:
    schema: of the table, in the order in which the records name them.
    as_text: names of the columns that hold JSON texts.
  """

  schema: pa.Schema
  as_text: frozenset[str]

  def batch(self, values: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    """Some records as rows; a key that a record does not have is null."""
    arrays = []
    for field in self.schema:
      column = [value.get(field.name) for value in values]
      if field.name in self.as_text:
        column = [None if item is None else json.dumps(item, ensure_ascii=False) for item in column]
      arrays.append(pa.array(column, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def blocks(lines: Iterable[str]) -> Iterator[list[dict[str, Any]]]:
  """The records of JSON lines as objects, so many at a time."""
  waiting = iter(lines)
  # Half a surrogate pair has no UTF-8 form; only an escape can spell one.
  read = lambda line: clean(json.loads(line)) if "\\u" in line else json.loads(line)  # noqa: E731
  while block := [read(line) for line in itertools.islice(waiting, BLOCK)]:
    yield block


def columns_of(lines: Iterable[str]) -> Columns:
  """The columns of records; reads all of them once.

  Args:
    lines: each a JSON object.
  """
  types: dict[str, pa.DataType | None] = {}  # None: texts
  for block in blocks(lines):
    for name in dict.fromkeys(key for value in block for key in value):
      types[name] = _common(types.get(name, pa.null()), [value.get(name) for value in block])
  as_text = {name for name, kind in types.items() if kind is None or _is_hollow(kind)}
  return Columns(
    pa.schema([(name, pa.string() if name in as_text else kind) for name, kind in types.items()]), frozenset(as_text)
  )


def _common(before: pa.DataType | None, values: list[Any]) -> pa.DataType | None:
  """The type of a column with more values; None where there is none."""
  if before is None:
    return None
  try:
    both = [pa.schema([("x", kind)]) for kind in (before, pa.array(values).type)]
    return pa.unify_schemas(both, promote_options="permissive").field("x").type
  except _MIXED:
    return None


def _is_hollow(kind: pa.DataType) -> bool:
  """Whether an object without any key is in it, which Parquet has no form for."""
  if pa.types.is_struct(kind):
    return not kind.num_fields or any(_is_hollow(field.type) for field in kind)
  return pa.types.is_list(kind) and _is_hollow(kind.value_type)


@dataclasses.dataclass(frozen=True)
class Table:
  """Records with columns of ours in front.

  Attributes:
    lines: JSON text of each record, [N].
    ours: name -> [N] values; a column of the records of the same name is called record_NAME.
    columns: of the records.
  """

  lines: Sequence[str]
  ours: Mapping[str, np.ndarray]
  columns: Columns

  @classmethod
  def of(cls, lines: Sequence[str], ours: Mapping[str, np.ndarray] | None = None) -> Table:
    """Looks at all records for their columns."""
    return cls(lines, ours or {}, columns_of(lines))

  @property
  def schema(self) -> pa.Schema:
    """Our columns, then those of the records."""
    taken, named = {*self.ours, *self.columns.schema.names}, []
    for field in self.columns.schema:
      name = field.name
      while name in (self.ours if name == field.name else taken):
        name = f"record_{name}"
      taken.add(name)
      named.append(field.with_name(name))
    kind = lambda values: pa.string() if values.dtype == object else pa.from_numpy_dtype(values.dtype)  # noqa: E731
    return pa.schema([*((name, kind(values)) for name, values in self.ours.items()), *named])

  def batches(self) -> Iterator[pa.RecordBatch]:
    """All rows, a block at a time."""
    schema, start = self.schema, 0
    for block in blocks(self.lines):
      stop = start + len(block)
      ours = [pa.array(values[start:stop], schema.field(name).type) for name, values in self.ours.items()]
      yield pa.RecordBatch.from_arrays([*ours, *self.columns.batch(block).columns], schema=schema)
      start = stop


# ---- conversations ---------------------------------------------------------------------------------------------------


def chat_line(record: Record, system: str = "") -> str:
  """A record as other trainers read it: a JSON line with `messages`, and `tools` where there are some.

  A preference pair has `prompt`, `chosen` and `rejected` in place of `messages`.

  Args:
    record: of which what is rendered goes out.
    system: system prompt of a conversation that has none of its own; "": none is added.
  """
  messages: list[Message] = list(record.messages)
  if system and messages[0]["role"] != "system":
    messages.insert(0, {"role": "system", "content": system})
  value: dict[str, Any] = {"messages": messages}
  if answer := rejected_turns(record):
    at = len(messages) - len(record.messages) + len(record.rejected) - len(answer)
    value = {"prompt": messages[:at], "chosen": messages[at:], "rejected": list(answer)}
  return json.dumps(value | ({"tools": list(record.tools)} if record.tools else {}), ensure_ascii=False)


def is_chat_line(record: Record, system: str = "") -> bool:
  """Whether a record says the same as it was read, to who looks at `messages` and `tools` alone."""
  value = json.loads(record.raw)
  found = value.get("messages")
  if not isinstance(found, list) or not all(isinstance(turn, dict) and turn.keys() >= {"role"} for turn in found):
    return False
  wanted = json.loads(chat_line(record, system))
  return content_key(wanted["messages"], wanted.get("tools", ())) == _key_as_read(found, value.get("tools"))


def _key_as_read(turns: list[dict[str, Any]], tools: Any) -> str:
  known = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "train")
  return content_key([{"content": "", **{k: turn[k] for k in known if k in turn}} for turn in turns], tools or ())
