"""A data source named in one word (`chatterbot`, `jsonl:PATH`, `tfds:NAME/SPLIT`), or several, -> records.

To add a source: a function that yields `Item`s, and its word in `load_records`.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from in2core_jax.data.assets import asset_path
from in2core_jax.data.json_files import json_items
from in2core_jax.data.record_shapes import ROLES
from in2core_jax.data.records import BadRecords, Item, Record, shorten, to_records
from in2core_jax.errors import UserError, printable

_KNOWN_SOURCES = "chatterbot[:topic,topic], jsonl:PATH, tfds:NAME/SPLIT[@DATA_DIR], or several of them joined by +"
_JOINED = re.compile(r"\+(?=chatterbot(?:[:+]|$)|jsonl:|tfds:)")
_NAMES_SOURCE = re.compile(rf"(.+?)=((?:{'|'.join(ROLES)})\s*=.*)", re.DOTALL)
_ROLE_FIRST = re.compile(rf"\s*(?:{'|'.join(ROLES)})\s*=")


def name_of(source: str) -> str:
  """The source that the file of a record (`Record.source`) is of: the corpus for one of its files, else itself."""
  return "chatterbot" if source.startswith("chatterbot/") else source


def load_records(spec: str, data_fields: str | None = None, bad: BadRecords | None = None) -> list[Record]:
  """Reads all records of a source.

  Args:
    spec: `chatterbot[:topic,topic]` (the installed corpus), `jsonl:PATH` (JSON lines or one JSON array; the path alone
      will do) or `tfds:NAME/SPLIT[@DATA_DIR]` (ArrayRecord, already prepared on disk; read without TensorFlow).
      Several of them are joined by `+`: `chatterbot+jsonl:PATH` is a mixed pool.
    data_fields: columns by role, see `parse_fields`; the corpus goes without.
    bad: gets the records that cannot be read; those of other sources than `spec` may be in it. When None, they are an
      error.

  Returns:
    The records in source order, with unique ids.

  Raises:
    UserError: unknown source, missing or broken file, unknown column, records that cannot be read, no record at all, or
      no response in any record.
  """
  groups = parse_fields(data_fields)
  parts = split_spec(spec)
  if groups and not has_columns(spec):
    raise UserError(f"data_fields={data_fields}: the chatterbot source has no columns; leave data_fields out")
  collected = BadRecords() if bad is None else bad
  before = len(collected)
  records = to_records([item for part in parts for item in _items(part, fields_of(part, groups), collected)], collected)
  if bad is None:
    collected.raise_if_any()
  if len(collected) > before and not records:
    count, shown = len(collected) - before, collected.kept[-1]
    raise UserError(
      printable(f"{spec}: none of its {count:,} records can be used; one is {shown['place']}: {shown['reason']}")
    )
  if not records:
    raise UserError(f"{spec} holds no record; give a source with at least one conversation")
  if not any(record.has_response for record in records):
    raise UserError(
      f"{spec}: none of the {len(records)} records has a response (a non-empty assistant turn that is not taken out of "
      f"the loss), so there is nothing to learn from; the first is {records[0].place} {shorten(records[0].raw)}"
    )
  return records


def parse_fields(data_fields: str | None) -> dict[str, dict[str, str]]:
  """Parses `ROLE=COLUMN,ROLE=COLUMN`, for all sources, or several of them: `SOURCE=ROLE=COLUMN,...;SOURCE=...`.

  Returns:
    {source, as it was written, or "" for all others: {role: column}}.

  Raises:
    UserError: names the roles that exist.
  """
  groups: dict[str, dict[str, str]] = {}
  # A semicolon that no ROLE= or SOURCE= follows belongs to the name of a column.
  for group in re.split(r";(?=[^;,]*=)", data_fields or ""):
    source, rest = "", group
    named = _NAMES_SOURCE.match(group)
    if named and not _ROLE_FIRST.match(group):
      source, rest = named[1].strip(), named[2]
    fields = groups.setdefault(source, {})
    for part in rest.split(","):
      if not part.strip():
        continue
      role, equals, column = (text.strip() for text in part.partition("="))
      if not equals or not column or role not in ROLES or role in fields:
        raise UserError(
          f"data_fields={data_fields!r}: cannot use {part.strip()!r}; write ROLE=COLUMN once per role, separated by "
          f"commas, or SOURCE=ROLE=COLUMN,...;SOURCE=ROLE=COLUMN,...; roles: {', '.join(ROLES)}"
        )
      fields[role] = column
  return {source: fields for source, fields in groups.items() if fields}


def fields_of(part: str, groups: Mapping[str, dict[str, str]]) -> dict[str, str]:
  """The columns of one source: those that name it, or else those for all."""
  if part.partition(":")[0] == "chatterbot":
    return {}
  return next((groups[name] for name in (part, part.removeprefix("jsonl:")) if name in groups), groups.get("", {}))


def check_fields(data_fields: str | None, specs: Iterable[str]) -> None:
  """Refuses --data_fields of a source that none of the data flags has, which would be passed over.

  Raises:
    UserError: names the sources.
  """
  parts = [part for spec in specs for part in split_spec(spec)]
  known = {name for part in parts for name in (part, part.removeprefix("jsonl:"))}
  for source in parse_fields(data_fields):
    if source and source not in known:
      raise UserError(f"data_fields={data_fields!r}: there is no source {source!r}; the sources: {', '.join(parts)}")


def split_spec(spec: str) -> list[str]:
  """The sources that a flag names, joined by +; a bare path becomes `jsonl:PATH` where there is something."""
  found = []
  for part in _JOINED.split(spec):
    pieces = part.split("+") if not _is_there(part.removeprefix("jsonl:")) else [part]
    # A + belongs to the name of a file unless what it parts are all sources.
    if len(pieces) < 2 or not all(_is_source(piece) for piece in pieces):
      pieces = [part]
    found += [f"jsonl:{piece}" if not _has_word(piece) and _is_there(piece) else piece for piece in pieces]
  return found


def _has_word(part: str) -> bool:
  return re.match(r"chatterbot(:|$)|jsonl:|tfds:", part) is not None


def _is_source(part: str) -> bool:
  return _is_there(part.removeprefix("jsonl:")) or re.match(r"chatterbot(:|$)|tfds:", part) is not None


def _is_there(path: str) -> bool:
  try:
    return bool(path) and os.path.lexists(os.path.expanduser(path))
  except ValueError:  # a zero byte
    return False


def has_columns(spec: str) -> bool:
  """Whether any part of a source has records with columns, which `data_fields` can name."""
  return any(part.partition(":")[0] != "chatterbot" for part in split_spec(spec))


def _items(part: str, fields: dict[str, str], bad: BadRecords) -> Iterator[Item]:
  """Yields what one source holds."""
  kind, _, rest = part.partition(":")
  if kind == "chatterbot":
    return _chatterbot_items(rest)
  if kind == "jsonl" and rest:
    return _checked(json_items(_path(rest), fields, bad), fields)
  if kind == "tfds" and rest:
    return _checked(_tfds_items(rest, fields), fields)
  raise UserError(f"unknown data source {part!r}; {_meant(kind, rest, part)}use one of {_KNOWN_SOURCES}")


def _path(text: str) -> pathlib.Path:
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:  # ~ of a user without a home
    raise UserError(f"{text}: {error}; write the whole path") from error


def _meant(kind: str, rest: str, part: str) -> str:
  """What an unknown source may have been meant for."""
  if kind in ("hf", "gguf", "random", "truncated", "smollm2", "gemma3"):
    return f"{kind}: names a model, for --model; "
  if rest.startswith("//"):
    return "nothing is fetched from the network, copy the file here; "
  if any(sign in part for sign in "*?["):
    return "a pattern: name each file, jsonl:ONE.jsonl+jsonl:OTHER.jsonl; "
  if part.endswith((".jsonl", ".json", ".csv", ".parquet", ".gz")) and not rest:
    return "no such file; "
  if re.fullmatch(r"[\w.-]+/[\w.-]+", part):
    return "neither a file nor, as names of a hub are, downloaded: save that data set as JSON lines first; "
  return ""


def _checked(items: Iterator[Item], fields: dict[str, str]) -> Iterator[Item]:
  """The items of a source, all of them read, if it has the columns that are named.

  Raises:
    UserError: a column that no record has.
  """
  found = list(items)
  columns = dict.fromkeys(key for item in found if isinstance(item.value, dict) for key in item.value) if fields else {}
  for role, column in fields.items():
    if found and column not in columns:
      raise UserError(
        printable(f"data_fields: no column {column!r} (for {role}) in the data; columns: {', '.join(columns)}")
      )
  return iter(found)


def _chatterbot_items(topics: str) -> Iterator[Item]:
  """Yields the conversations of the installed corpus: turns alternate between user and assistant."""
  files = {path.stem: path for path in sorted(asset_path("chatterbot-english").glob("*.yml"))}
  wanted = [topic.strip() for topic in topics.split(",") if topic.strip()] or list(files)
  for topic in wanted:
    if topic not in files:
      raise UserError(f"chatterbot has no topic {topic!r}; its topics are: {', '.join(files)}")
  loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
  for topic in dict.fromkeys(wanted):
    # The composed tree, not the constructed one: it knows the lines, and keeps `42` or `yes` as the words they are.
    root = yaml.compose(files[topic].read_text(encoding="utf-8"), Loader=loader)
    sections = {key.value: value for key, value in root.value}
    for conversation in sections["conversations"].value:
      # One conversation of the corpus is a bare string: one turn, so an example without response.
      nodes = conversation.value if isinstance(conversation, yaml.SequenceNode) else [conversation]
      turns = [node.value for node in nodes]
      messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
      value = {"topic": topic, "messages": messages}
      raw = json.dumps(value, ensure_ascii=False)
      yield Item(value, raw, f"chatterbot/{files[topic].name}", conversation.start_mark.line + 1)


def _tfds_items(rest: str, fields: dict[str, str]) -> Iterator[Item]:
  """Yields the examples of a prepared data set through `tfds.data_source`, which needs no TensorFlow."""
  import tensorflow_datasets as tfds

  name_split, _, data_dir = rest.partition("@")
  name, slash, split = name_split.rpartition("/")
  if not slash or not name or not split:
    raise UserError(f"tfds:{rest}: write tfds:NAME/SPLIT, for example tfds:my_set/train or tfds:my_set/train@DATA_DIR")
  folder = pathlib.Path(data_dir).expanduser() if data_dir else None
  if folder is not None and not folder.is_dir():
    raise UserError(f"tfds:{rest}: there is no folder {data_dir}; give the data_dir that the data set was prepared in")
  try:
    builder = tfds.builder(name, data_dir=folder)
  except ValueError as error:  # also how tfds says that nothing of this name is there
    where = data_dir or tfds.core.constants.DATA_DIR
    raise UserError(f"tfds:{rest}: no data set {name!r} is prepared in {where}; append @DATA_DIR or fix it") from error
  if split.partition("[")[0] not in builder.info.splits:
    known = ", ".join(builder.info.splits) or "none (it is not prepared: run download_and_prepare of tfds first)"
    raise UserError(f"tfds:{rest}: no split {split!r}; the splits are: {known}")
  try:
    source = builder.as_data_source(split=split)
  except (ValueError, NotImplementedError, AssertionError) as error:
    detail = " ".join(str(error).split())
    raise UserError(
      f"tfds:{rest}: cannot be read as ArrayRecord ({shorten(detail, 200)}); prepare it with file_format='array_record'"
    ) from error
  for i in range(len(source)):
    value = _to_plain(source[i])
    yield Item(value, json.dumps(value, ensure_ascii=False), f"tfds:{name}/{split}", i + 1, fields)


def _to_plain(value: Any) -> Any:
  """Turns a decoded tfds example into plain JSON values: bytes are text, arrays are lists, NaN is null."""
  if isinstance(value, bytes):
    return value.decode("utf-8", errors="replace")
  if isinstance(value, dict):
    return {key: _to_plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_to_plain(item) for item in value]
  if hasattr(value, "tolist"):
    return _to_plain(value.tolist())
  return None if isinstance(value, float) and math.isnan(value) else value
