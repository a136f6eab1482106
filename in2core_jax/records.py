"""Records with stable ids, and the shapes that people write them in.

To add a record shape: a row of `_SHAPES`. Nothing here knows a file format or a tokenizer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from in2core_jax.errors import UserError

Message = dict[str, str]
Messages = tuple[Message, ...]

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TOPIC_COLUMNS = ("topic", "source", "category")
_FIELDS = (
  *("prompt", "response", "completion", "instruction", "input", "output"),
  *("messages", "conversations", "system", "id", "topic"),
)
_CONTENT_FIELDS = frozenset(_FIELDS) - {"system", "id", "topic"}


@dataclasses.dataclass(frozen=True)
class Record:
  """One conversation of a data source.

  Attributes:
    example_id: unique within its source: the given id, or the first 16 hex digits of the content key; a repetition of
      the same messages gets the suffix -2, -3, ... in source order.
    messages: ({"role": "system" | "user" | "assistant", "content": text}, ...), ending with the last response.
    topic: column `topic`, `source` or `category`, or "".
    raw: the source record as one JSON line, exactly as it was read.
    source: the file or data set that it came from.
    line: 1-based line of the file (position in the split for tfds).
  """

  example_id: str
  messages: Messages
  topic: str
  raw: str
  source: str
  line: int

  @property
  def content_key(self) -> str:
    """SHA-256 of the messages alone: equal for duplicates, whatever their ids and topics."""
    return content_key(self.messages)

  @property
  def prompt_key(self) -> str:
    """SHA-256 of the messages before the first response."""
    first = next((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), len(self.messages))
    return content_key(self.messages[:first])

  @property
  def has_response(self) -> bool:
    """Whether there is an assistant turn."""
    return any(m["role"] == "assistant" for m in self.messages)


@dataclasses.dataclass(frozen=True)
class Item:
  """A source record before it is understood: the JSON value, its text, its place, whether fields can name columns."""

  value: Any
  raw: str
  source: str
  line: int
  has_columns: bool = True

  @property
  def place(self) -> str:
    """Where it stands, for messages."""
    return f"{self.source}:{self.line}"


def shorten(text: str, limit: int = 120) -> str:
  """Cuts a text for an error message."""
  return text if len(text) <= limit else text[:limit] + "..."


def content_key(messages: Messages) -> str:
  """Returns the SHA-256 (hex) of the canonical JSON of `messages`."""
  canonical = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False, separators=(",", ":"))
  return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def parse_fields(data_fields: str | None) -> dict[str, str]:
  """Parses `role=column,role=column` into {role: column}; raises `UserError` naming the roles that exist."""
  fields: dict[str, str] = {}
  for part in (data_fields or "").split(","):
    if not part.strip():
      continue
    role, equals, column = (text.strip() for text in part.partition("="))
    if not equals or not column or role not in _FIELDS or role in fields:
      raise UserError(
        f"data_fields={data_fields!r}: cannot use {part.strip()!r}; write ROLE=COLUMN once per role, separated by "
        f"commas; roles: {', '.join(_FIELDS)}"
      )
    fields[role] = column
  return fields


def to_records(items: list[Item], fields: dict[str, str]) -> list[Record]:
  """Reads the items as conversations and gives them unique ids.

  Args:
    items: the source records, in source order.
    fields: {role: column}, see `parse_fields`; for the items that have columns.

  Returns:
    One record per item, in the same order.

  Raises:
    UserError: unknown column or record shape, wrong types, or one given id for two different conversations.
  """
  for item in items:
    if not isinstance(item.value, dict):
      raise UserError(f"{item.place}: the record is {_type_name(item.value)}, not a JSON object: {shorten(item.raw)}")
  views = [item.value for item in items]
  if fields:
    columns = dict.fromkeys(key for item in items if item.has_columns for key in item.value)
    for role, column in fields.items():
      if column not in columns:
        raise UserError(f"data_fields: no column {column!r} (for {role}) in the data; columns: {', '.join(columns)}")
    views = [_apply_fields(item.value, fields) if item.has_columns else item.value for item in items]
  parsed = [_parse_messages(view, item.place) for view, item in zip(views, items, strict=True)]
  given = [_given_id(view, item.place) for view, item in zip(views, items, strict=True)]
  ids = _unique_ids(given, [content_key(messages) for messages in parsed], [item.place for item in items])
  return [
    Record(example_id, messages, _topic(view), item.raw, item.source, item.line)
    for example_id, messages, view, item in zip(ids, parsed, views, items, strict=True)
  ]


def _apply_fields(value: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
  """Returns the record with its columns under the names of their roles.

  Once a column is named for the text, no other column counts as text: `prompt=question` must not meet a column
  `messages` that happens to be there too.
  """
  named = {role: value[column] for role, column in fields.items() if column in value}
  if _CONTENT_FIELDS.isdisjoint(fields):
    return {**value, **named}
  return {**{key: item for key, item in value.items() if key not in _FIELDS or key in ("id", "topic")}, **named}


def _given_id(view: dict[str, Any], place: str) -> str | None:
  given = view.get("id")
  if given is None or given == "":
    return None
  if isinstance(given, bool) or not isinstance(given, (str, int)):
    raise UserError(f"{place}: the id is {_type_name(given)}, not a string or an integer")
  return _clean(str(given))


def _topic(view: dict[str, Any]) -> str:
  for column in _TOPIC_COLUMNS:
    if isinstance(view.get(column), (str, int)):
      return _clean(str(view[column]))
  return ""


def _unique_ids(given: list[str | None], keys: list[str], places: list[str]) -> list[str]:
  first: dict[str, int] = {}
  for i, name in enumerate(given):
    if name is not None and keys[first.setdefault(name, i)] != keys[i]:
      raise UserError(
        f"id {name!r} names two different conversations, at {places[first[name]]} and {places[i]}; make ids unique, "
        "or leave them out to get content hashes"
      )
  taken: set[str] = set()
  copies: dict[str, int] = {}
  ids = []
  for i, name in enumerate(given):
    base = name if name is not None else keys[i][:16]
    unique = base
    while unique in taken or (unique in first and first[unique] != i):
      copies[base] = copies.get(base, 1) + 1
      unique = f"{base}-{copies[base]}"
    taken.add(unique)
    ids.append(unique)
  return ids


def _type_name(value: Any) -> str:
  names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
  return "null" if value is None else names.get(type(value), type(value).__name__)


def _clean(text: str) -> str:
  """Replaces unpaired surrogates, which JSON can spell but no UTF-8 text can hold, by U+FFFD."""
  return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _text(view: dict[str, Any], key: str, place: str, optional: bool = False) -> str:
  value = view.get(key)
  if value is None and optional:
    return ""
  if not isinstance(value, str):
    raise UserError(f"{place}: {key!r} must be a string but is {_type_name(value)}")
  return _clean(value)


def _turns(view: dict[str, Any], key: str, place: str, names: tuple[str, str]) -> list[Message]:
  """Reads a list of turns, each an object with a role and a text column (tfds gives an object of two lists)."""
  role_key, text_key = names
  turns = view[key]
  if isinstance(turns, dict) and isinstance(turns.get(role_key), list) and isinstance(turns.get(text_key), list):
    turns = [{role_key: r, text_key: t} for r, t in zip(turns[role_key], turns[text_key], strict=True)]
  if not isinstance(turns, list):
    raise UserError(f"{place}: {key!r} must be a list of turns but is {_type_name(turns)}")
  messages = []
  for i, turn in enumerate(turns):
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
      raise UserError(f"{place}: turn {i} of {key!r} must be an object with {role_key!r} and {text_key!r}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in _ROLES:
      raise UserError(f"{place}: turn {i} of {key!r} has {role_key}={role!r}; known: {', '.join(_ROLES)}")
    messages.append({"role": _ROLES[role], "content": _text(turn, text_key, f"{place}: turn {i} of {key!r}")})
  return messages


def _pair(view: dict[str, Any], prompt: str, response: str, place: str) -> list[Message]:
  """Makes the two turns of a prompt and its response; a missing or null response is an empty one."""
  return [
    {"role": "user", "content": prompt},
    {"role": "assistant", "content": _text(view, response, place, optional=True)},
  ]


def _chat(view: dict[str, Any], place: str) -> list[Message]:
  return _turns(view, "messages", place, ("role", "content"))


def _sharegpt(view: dict[str, Any], place: str) -> list[Message]:
  return _turns(view, "conversations", place, ("from", "value"))


def raw_lines(records: Sequence[Record], rows: Iterable[int]) -> str:
  """Some of the records exactly as they were read, one a line: the text of a `coreset.jsonl`."""
  return "".join(records[row].raw + "\n" for row in rows)


def _alpaca(view: dict[str, Any], place: str) -> list[Message]:
  extra = _text(view, "input", place, optional=True)
  instruction = _text(view, "instruction", place)
  return _pair(view, f"{instruction}\n\n{extra}" if extra.strip() else instruction, "output", place)


def _prompt_completion(view: dict[str, Any], place: str) -> list[Message]:
  return _pair(view, _text(view, "prompt", place), "completion", place)


def _prompt_response(view: dict[str, Any], place: str) -> list[Message]:
  return _pair(view, _text(view, "prompt", place), "response", place)


# Columns that a record of this shape has, and what reads it; the first row whose columns are all there wins.
_SHAPES: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], str], list[Message]]], ...] = (
  (("messages",), _chat),
  (("conversations",), _sharegpt),
  (("instruction", "output"), _alpaca),
  (("prompt", "completion"), _prompt_completion),
  (("prompt", "response"), _prompt_response),
)


def _parse_messages(view: dict[str, Any], place: str) -> Messages:
  parse = next((parse for columns, parse in _SHAPES if all(column in view for column in columns)), None)
  if parse is None:
    known = "; ".join(" + ".join(columns) for columns, _ in _SHAPES)
    raise UserError(
      f"{place}: unknown record shape: its columns are {', '.join(view) or '(none)'}; known shapes: {known}; "
      "name the columns with data_fields, for example prompt=question,response=answer"
    )
  messages = parse(view, place)
  system = _text(view, "system", place, optional=True)
  if system and not any(m["role"] == "system" for m in messages):
    messages.insert(0, {"role": "system", "content": system})
  ended = _end_at_last_response(messages)
  if not ended:
    raise UserError(f"{place}: the conversation has no turn with text; remove it")
  return ended


def _end_at_last_response(messages: list[Message]) -> Messages:
  """Drops what follows the last non-empty assistant turn (nothing learns from it), or all empty assistant turns."""
  answered = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
  if answered:
    return tuple(messages[: answered[-1] + 1])
  return tuple(m for m in messages if m["role"] != "assistant")
