"""Data sources (`chatterbot`, files and folders, `tfds:NAME/SPLIT`), one or several of them, -> records.

To add a source: a function that yields `Item`s, a branch in `_items`, and its word in `source_specs`.
"""

from __future__ import annotations

import functools
import json
import logging
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from in2core_jax.data.assets import asset_path
from in2core_jax.data.file_kinds import DataFile
from in2core_jax.data.folders import data_files, is_data_name
from in2core_jax.data.hub import hub_data
from in2core_jax.data.json_files import json_items
from in2core_jax.data.message_trees import assembled
from in2core_jax.data.record_file import Records
from in2core_jax.data.record_shapes import ROLES
from in2core_jax.data.records import BadRecords, Item, Record, drawn_share, has_response, shorten, to_records
from in2core_jax.data.source_specs import Source, sources_of
from in2core_jax.data.tables import table_items, to_plain
from in2core_jax.errors import UserError, how_many, printable

log = logging.getLogger(__name__)

_KNOWN_SOURCES = (
  "chatterbot[:topic,topic], file:PATH (or jsonl:PATH; a file, a folder, a pattern), - (standard input), "
  "tfds:NAME/SPLIT[@DATA_DIR], hub:ORG/NAME[/SPLIT], or several of them joined by +"
)
_NAMES_SOURCE = re.compile(rf"(.+?)=((?:{'|'.join(ROLES)})\s*=.*)", re.DOTALL)
_ROLE_FIRST = re.compile(rf"\s*(?:{'|'.join(ROLES)})\s*=")


def name_of(record: Record) -> str:
  """The source that a record is of, as `Source.origin` says."""
  return _name_of(record.origin, record.source)


def names_of(records: Sequence[Record]) -> list[str]:
  """`name_of` of each."""
  if not isinstance(records, Records):
    return [name_of(record) for record in records]
  known = functools.cache(_name_of)
  return [known(*both) for both in zip(records.names("origin"), records.names("source"), strict=True)]


def _name_of(origin: str, source: str) -> str:
  if origin:
    return origin
  return "chatterbot" if source.startswith("chatterbot/") else source


def load_records(spec: str, data_fields: str | None = None, bad: BadRecords | None = None) -> Records:
  """Reads all records of a source.

  Args:
    spec: `chatterbot[:topic,topic]` (the installed corpus), `file:PATH` (or `jsonl:PATH`, or the path alone; see
      `folders.data_files`: JSON, CSV, Parquet or Arrow, by its contents), `-` (standard input),
      `tfds:NAME/SPLIT[@DATA_DIR]` (ArrayRecord, already prepared on disk; read without TensorFlow) or
      `hub:ORG/NAME[/SPLIT]` (see `hub.hub_data`). Several of them are joined by `+`, each with a name before and a
      share behind if need be: `talk=chatterbot+own=file:PATH*0.5`.
    data_fields: columns by role, see `parse_fields`; the corpus goes without.
    bad: gets the records that cannot be read; those of other sources than `spec` may be in it. When None, they are an
      error.

  Returns:
    The records in source order, with unique ids; they lie on the disk.

  Raises:
    UserError: unknown source, missing or broken file, unknown column, records that cannot be read, no record at all, or
      no response in any record.
  """
  groups = parse_fields(data_fields)
  parts = sources_of(spec)
  if groups and not has_columns(spec):
    raise UserError(f"data_fields={data_fields}: the chatterbot source has no columns; leave data_fields out")
  collected = BadRecords() if bad is None else bad
  before = len(collected)
  items = (item for part in parts for item in _items(part, fields_of(part, groups), collected))
  records = _drawn(to_records(items, collected), parts)
  if bad is None:
    collected.raise_if_any()
  if len(collected) > before and not records:
    count, shown = len(collected) - before, collected.kept[-1]
    raise UserError(
      printable(
        f"{spec}: none of its {how_many(count, 'record')} can be used; one is {shown['place']}: {shown['reason']}"
      )
    )
  if not records:
    raise UserError(f"{spec} holds no record; give a source with at least one conversation")
  if not has_response(records):
    raise UserError(
      f"{spec}: none of the {how_many(len(records), 'record')} has a response (a non-empty assistant turn that is not "
      f"taken out of the loss), so there is nothing to learn from; the first is {records[0].place} "
      f"{shorten(records[0].raw)}"
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


def _drawn(records: Records, parts: list[Source]) -> Records:
  """The records, of sources with a share that much."""
  shares = {part.origin: part.share for part in parts if part.share < 1}
  origins = np.array(records.names("origin"), dtype=object) if shares else None
  kept = np.ones(len(records), bool)
  for origin, share in shares.items():
    own = np.flatnonzero(origins == origin)
    if not len(own):
      continue
    drawn = own[drawn_share(records.take(own), share)]
    told = f"{origin}: a share of {share:g} is drawn, {len(drawn):,} of its {how_many(len(own), 'record')}"
    log.info("%s", printable(told))
    kept[own] = False
    kept[drawn] = True
  return records if kept.all() else records.take(np.flatnonzero(kept))


def fields_of(part: Source, groups: Mapping[str, dict[str, str]]) -> dict[str, str]:
  """The columns of one source: those that name it, or else those for all."""
  if not part.has_columns:
    return {}
  return next((groups[label] for label in part.labels if label in groups), groups.get("", {}))


def check_fields(data_fields: str | None, specs: Iterable[str]) -> None:
  """Refuses --data_fields of a source that none of the data flags has, which would be passed over.

  Raises:
    UserError: names the sources.
  """
  parts = [part for spec in specs for part in sources_of(spec)]
  known = {label for part in parts for label in part.labels}
  for source in parse_fields(data_fields):
    if source and source not in known:
      there = ", ".join(part.name or part.text for part in parts)
      raise UserError(f"data_fields={data_fields!r}: there is no source {source!r}; the sources: {there}")


def has_columns(spec: str) -> bool:
  """Whether any part of a source has records with columns, which `data_fields` can name."""
  return any(part.has_columns for part in sources_of(spec))


def _items(part: Source, fields: dict[str, str], bad: BadRecords) -> Iterator[Item]:
  """Yields what one source holds."""
  if part.kind == "chatterbot":
    items = _chatterbot_items(part.place)
  elif part.kind == "file" and part.place:
    items = _checked(_file_items(data_files(_path(part.place)), fields, bad), fields)
  elif part.kind == "hub" and part.place:
    items = _checked(_file_items(hub_data(part.place), fields, bad), fields)
  elif part.kind == "tfds" and part.place:
    items = _checked(_tfds_items(part.place, fields), fields)
  elif not part.place and is_data_name(part.text):
    raise UserError(f"{part.text}: no such file; give the path of a file of data, or one of {_KNOWN_SOURCES}")
  else:
    raise UserError(f"unknown data source {part.text!r}; {_meant(part)}use one of {_KNOWN_SOURCES}")
  origin, name = part.origin, part.name
  return (Item(one.value, one.raw, one.source, one.line, one.fields, origin, name) for one in items)


def _file_items(files: Iterable[DataFile], fields: dict[str, str], bad: BadRecords) -> Iterator[Item]:
  for file in files:
    read = json_items if file.kind == "json" else table_items
    yield from assembled(read(file, fields, bad), bad)


def _path(text: str) -> pathlib.Path:
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:  # ~ of a user without a home
    raise UserError(f"{text}: {error}; write the whole path") from error


def _meant(part: Source) -> str:
  """What an unknown source may have been meant for."""
  if part.kind == "hf" and re.fullmatch(r"[\w.-]+/[\w.-]+", part.place) and not is_data_name(part.place):
    return f"hf: names a folder of a model, for --model; a data set of the Hub is hub:{part.place}; "
  if part.kind in ("hf", "gguf", "random", "truncated", "smollm2", "gemma3"):
    return f"{part.kind}: names a model, for --model; "
  if part.kind in ("csv", "tsv", "json", "parquet", "arrow") and part.place:
    return f"the kind of a file is seen from its contents: file:{part.place}; "
  if part.place.startswith("//"):
    return "nothing is fetched from the network, copy the file here; "
  if re.fullmatch(r"[\w.-]+/[\w.-]+", part.text):
    return f"there is no such file; a data set of the Hub is hub:{part.text}; "
  return ""


def _checked(items: Iterator[Item], fields: dict[str, str]) -> Iterator[Item]:
  """Passes the items of a source on; the end is reached only if it has the columns that are named.

  Raises:
    UserError: a column that no record has.
  """
  columns: dict[str, None] = {}
  some = ""
  for item in items:
    some = some or item.source
    if fields and isinstance(item.value, dict):
      columns |= dict.fromkeys(item.value)
    yield item
  for role, column in fields.items():
    if some and column not in columns:
      raise UserError(
        printable(
          f"data_fields: no column {column!r} (for {role}) in the data of {some}; columns: {', '.join(columns)}; what "
          f"one source alone has is named as SOURCE={role}={column}"
        )
      )


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
    value = _of_tfds(source[i])
    yield Item(value, json.dumps(value, ensure_ascii=False), f"tfds:{name}/{split}", i + 1, fields)


def _of_tfds(value: Any) -> Any:
  """Turns a decoded tfds example into plain JSON values: bytes are text, arrays are lists."""
  if isinstance(value, bytes):
    return value.decode("utf-8", errors="replace")
  if isinstance(value, dict):
    return {key: _of_tfds(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_of_tfds(item) for item in value]
  return _of_tfds(value.tolist()) if hasattr(value, "tolist") else to_plain(value)
