"""A data source named in one word (`chatterbot`, `jsonl:PATH`, `tfds:NAME/SPLIT`), or several, -> records.

To add a source: a function that yields `Item`s, and its word in `load_records`.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import yaml

from in2core_jax.assets import asset_path
from in2core_jax.errors import UserError
from in2core_jax.records import Item, Record, parse_fields, shorten, to_records

_KNOWN_SOURCES = "chatterbot[:topic,topic], jsonl:PATH, tfds:NAME/SPLIT[@DATA_DIR], or several of them joined by +"
_JOINED = re.compile(r"\+(?=chatterbot(?:[:+]|$)|jsonl:|tfds:)")


def load_records(spec: str, data_fields: str | None = None) -> list[Record]:
  """Reads all records of a source.

  Args:
    spec: `chatterbot[:topic,topic]` (the installed corpus), `jsonl:PATH` (JSON lines or one JSON array) or
      `tfds:NAME/SPLIT[@DATA_DIR]` (ArrayRecord, already prepared on disk; read without TensorFlow). Several of them
      are joined by `+`: `chatterbot+jsonl:PATH` is a mixed pool.
    data_fields: columns by role, `prompt=question,response=answer,id=key,topic=kind`, for records of another shape;
      in a mixed pool they are those of its files and prepared sets, and the corpus goes without.

  Returns:
    The records in source order, with unique ids.

  Raises:
    UserError: unknown source, missing or broken file, unknown column or record shape, wrong types, one given id for
      two different conversations, no record at all, or no response in any record.
  """
  fields = parse_fields(data_fields)
  if fields and not has_columns(spec):
    raise UserError(f"data_fields={data_fields}: the chatterbot source has no columns; leave data_fields out")
  records = to_records([item for part in _JOINED.split(spec) for item in _items(part)], fields)
  if not records:
    raise UserError(f"{spec} holds no record; give a source with at least one conversation")
  if not any(record.has_response for record in records):
    raise UserError(
      f"{spec}: none of the {len(records)} records has a response (a non-empty assistant turn), so there is nothing to "
      f"learn from; the first is {records[0].source}:{records[0].line} {shorten(records[0].raw)}"
    )
  return records


def has_columns(spec: str) -> bool:
  """Whether any part of a source has records with columns, which `data_fields` can name."""
  return any(part.partition(":")[0] != "chatterbot" for part in _JOINED.split(spec))


def _items(spec: str) -> Iterator[Item]:
  """Yields what one source holds."""
  kind, _, rest = spec.partition(":")
  if kind == "chatterbot":
    return _chatterbot_items(rest)
  if kind == "jsonl" and rest:
    return _json_items(pathlib.Path(rest).expanduser())
  if kind == "tfds" and rest:
    return _tfds_items(rest)
  raise UserError(f"unknown data source {spec!r}; use one of {_KNOWN_SOURCES}")


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
      yield Item(value, raw, f"chatterbot/{files[topic].name}", conversation.start_mark.line + 1, has_columns=False)


def _json_items(path: pathlib.Path) -> Iterator[Item]:
  """Yields the elements of a JSON array, or else of JSON lines."""
  if not path.is_file():
    raise UserError(f"{path}: no such file; give the path of a JSON lines file or of a JSON array")
  data = path.read_bytes()
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise UserError(f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8") from error
  if not text.strip():
    raise UserError(f"{path} is empty; it must hold one JSON object a line, or one JSON array")
  return _array_items(path, text) if text.lstrip().startswith("[") else _line_items(path, text)


def _line_items(path: pathlib.Path, text: str) -> Iterator[Item]:
  # Lines end at \n and nowhere else: str.splitlines would also cut at U+2028 and its kin, which JSON allows in strings.
  for number, line in enumerate(text.split("\n"), 1):
    line = line.removesuffix("\r")
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError as error:
      raise UserError(
        f"{path}:{number}: broken JSON ({error}) in {shorten(line, 80)!r}; each line must be one whole JSON object "
        "(or the file one JSON array)"
      ) from error
    yield Item(value, line, str(path), number)


def _array_items(path: pathlib.Path, text: str) -> Iterator[Item]:
  decoder, end = json.JSONDecoder(), len(text)

  def skip_space(at: int) -> int:
    while at < end and text[at] in " \t\r\n":
      at += 1
    return at

  def broken(what: str, at: int) -> UserError:
    line = text.count("\n", 0, at) + 1
    return UserError(f"{path}:{line}: broken JSON array ({what}) at {shorten(text[at:], 40)!r}")

  at = skip_space(skip_space(0) + 1)
  line, counted = 1, 0
  closed = at < end and text[at] == "]"
  while not closed:
    try:
      value, stop = decoder.raw_decode(text, at)
    except ValueError as error:
      raise broken(getattr(error, "msg", str(error)), min(getattr(error, "pos", at), end)) from error
    line, counted = line + text.count("\n", counted, at), at
    source_text = text[at:stop]
    # `raw` is one line; an element that was printed over several lines has to be printed anew.
    raw = json.dumps(value, ensure_ascii=False) if "\n" in source_text else source_text.replace("\r", "")
    yield Item(value, raw, str(path), line)
    at = skip_space(stop)
    if at >= end or text[at] not in ",]":
      raise broken("expected a comma or the closing bracket", at)
    closed = text[at] == "]"
    at = at if closed else skip_space(at + 1)
  if skip_space(at + 1) < end:
    raise broken("text after the closing bracket", skip_space(at + 1))


def _tfds_items(rest: str) -> Iterator[Item]:
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
    yield Item(value, json.dumps(value, ensure_ascii=False), f"tfds:{name}/{split}", i + 1)


def _to_plain(value: Any) -> Any:
  """Turns a decoded tfds example into plain JSON values: bytes are text, arrays are lists."""
  if isinstance(value, bytes):
    return value.decode("utf-8", errors="replace")
  if isinstance(value, dict):
    return {key: _to_plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_to_plain(item) for item in value]
  if hasattr(value, "tolist"):
    return _to_plain(value.tolist())
  return value
