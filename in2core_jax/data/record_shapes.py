"""The shapes that people write a record in -> its messages, its tools, and the keys that nobody reads.

To add a shape: a row of `_SHAPES`. Nothing here knows a file format or a tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from in2core_jax.data import record_keys
from in2core_jax.data.record_keys import is_empty
from in2core_jax.data.turns import REASONING, Message, TurnReader, clean, read_tools, type_name
from in2core_jax.errors import UserError

Messages = tuple[Message, ...]

TOPIC_COLUMNS = ("topic", "source", "category")
_SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
# What --data_fields can name.
ROLES = (
  *("prompt", "response", "completion", "instruction", "input", "output"),
  *("messages", "conversations", "system", "history", "tools", "reasoning", "id", "topic"),
)
_TEXT_ROLES = frozenset(ROLES) - {"system", "tools", "id", "topic"}
# A round of `history` as an object: its question and its answer.
_ROUNDS = (("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("prompt", "response"))
_ROUNDS += (("question", "answer"), ("query", "response"), ("instruction", "output"), ("q", "a"))


@dataclasses.dataclass(frozen=True)
class Conversation:
  """What a record says.

  Attributes:
    messages: see `turns`; they end with the last response that is learnt.
    tools: definitions of the tools that it may call.
    unread: names of keys that nobody reads and that are not known to be without meaning.
    given_id, topic: as the record names them; None and "" where it does not.
  """

  messages: Messages
  tools: tuple[dict[str, Any], ...]
  unread: tuple[str, ...]
  given_id: str | None
  topic: str


def is_learnt(message: Message) -> bool:
  """Whether the loss counts a message: a response that its owner has not taken out."""
  return message["role"] == "assistant" and message.get("train", True)


def read_record(value: Mapping[str, Any], fields: Mapping[str, str]) -> Conversation:
  """Reads a record.

  Args:
    value: its JSON object.
    fields: {role: column}, see `sources.parse_fields`. Once a column is named for the text, no other column counts as
      text: `prompt=question` must not meet a column `messages` that happens to be there too.

  Raises:
    UserError: an unknown shape, wrong types, or what cannot be rendered; without the place of the record.
  """
  named = not _TEXT_ROLES.isdisjoint(fields)
  kept = {key: item for key, item in value.items() if not named or key in ("id", *TOPIC_COLUMNS)}
  view = kept | {role: value[column] for role, column in fields.items() if column in value}
  columns, parse = _shape_of(view, value)
  reader, used = TurnReader(), set(columns)
  messages = parse(view, reader, used)
  unread = _add_system(view, messages, reader, used)
  tools = _tools(view, reader, used)
  topic = _topic(view, used)
  given_id = _given_id(view)
  read = {"id"} | used
  read = {fields.get(role, role) for role in read if role in fields or role in kept}
  for key, item in value.items():
    if key not in read and not is_empty(item):
      record_keys.refuse_medium(key, item)
      # Whoever names the columns of the text has said that the others are none of it.
      settled = not named and record_keys.check_record_key(key, item)
      if not settled and not record_keys.has_no_meaning(key, item):
        unread.append(key)
  unread += reader.unread
  return Conversation(_end_at_last_response(messages), tools, tuple(dict.fromkeys(map(clean, unread))), given_id, topic)


# ---- the parts that all shapes have ----------------------------------------------------------------------------------


def _given_id(view: Mapping[str, Any]) -> str | None:
  given = view.get("id")
  if given is None or given == "":
    return None
  if isinstance(given, bool) or not isinstance(given, str | int):
    raise UserError(f"the id is {type_name(given)}, not a string or an integer")
  return clean(str(given))


def _topic(view: Mapping[str, Any], used: set[str]) -> str:
  for column in TOPIC_COLUMNS:
    if isinstance(view.get(column), str | int):
      used.add(column)
      return clean(str(view[column]))
  return ""


def _add_system(view: Mapping[str, Any], messages: list[Message], reader: TurnReader, used: set[str]) -> list[str]:
  """Puts the record's system prompt first; returns the keys of those that are not rendered."""
  found = {}
  for key in (key for key in _SYSTEM if not is_empty(view.get(key))):
    used.add(key)
    given = view[key] if isinstance(view[key], list) else _text(view, key)
    found[key] = reader.turn({"role": "system", "content": given}, f"{key!r}", key)["content"]
  if len(set(found.values())) > 1:
    raise UserError(f"{' and '.join(map(repr, found))} are different system prompts; keep one")
  if not found:
    return []
  text = next(iter(found.values()))
  there = [message["content"] for message in messages if message["role"] == "system"]
  if not there:
    messages.insert(0, {"role": "system", "content": text})
  return list(found) if there and text.strip() not in [given.strip() for given in there] else []


def _tools(view: Mapping[str, Any], reader: TurnReader, used: set[str]) -> tuple[dict[str, Any], ...]:
  keys = [key for key in _TOOLS if not is_empty(view.get(key))]
  used.update(keys)
  found = [read_tools(view[key], key) for key in keys] + [read_tools(tools, "tools") for tools in reader.tools]
  if any(tools != found[0] for tools in found):
    raise UserError("tools are defined in several places of the record, and they differ; keep one list, 'tools'")
  return tuple(found[0]) if found else ()


def _text(view: Mapping[str, Any], key: str, optional: bool = False) -> str:
  value = view.get(key)
  if value is None and optional:
    return ""
  if not isinstance(value, str):
    raise UserError(f"{key!r} must be a string but is {type_name(value)}")
  return clean(value)


def _history(value: Any, reader: TurnReader) -> list[Message]:
  """Earlier rounds: pairs of a question and an answer, objects of two texts, or turns with roles."""
  if is_empty(value):
    return []
  if not isinstance(value, list):
    raise UserError(f"'history' must be a list of earlier rounds but is {type_name(value)}")
  messages: list[Message] = []
  for i, pair in enumerate(value):
    at = f"round {i} of 'history'"
    if isinstance(pair, dict) and ("role" in pair or "from" in pair):
      messages.append(reader.turn(pair, at, "history[]"))
      continue
    question, answer, rest = _round(pair, at)
    if is_empty(question) and is_empty(answer):
      continue
    messages.append(reader.turn({"role": "user", "content": question}, at, "history[]"))
    messages.append(reader.turn({"role": "assistant", "content": answer} | rest, at, "history[]"))
  return messages


def _round(pair: Any, at: str) -> tuple[Any, Any, dict[str, Any]]:
  """(question, answer, what else is there) of an earlier round."""
  if isinstance(pair, list) and len(pair) == 2 and not any(isinstance(text, dict) for text in pair):
    return pair[0], pair[1], {}
  names = next((names for names in _ROUNDS if isinstance(pair, dict) and all(name in pair for name in names)), None)
  if names is None:
    raise UserError(f"{at} must be a question and its answer, [question, answer], but is {record_keys.shown(pair)}")
  rest = {key: item for key, item in pair.items() if key not in names}
  return pair[names[0]], pair[names[1]], rest


# ---- the shapes ------------------------------------------------------------------------------------------------------


def _pair(view: Mapping[str, Any], prompt: str, response: str, reader: TurnReader, used: set[str]) -> list[Message]:
  """Earlier rounds, a prompt and its response; a missing or null response is an empty one."""
  used.add("history")
  messages = _history(view.get("history"), reader)
  answer = {"role": "assistant", "content": _text(view, response, optional=True)}
  thoughts = {key: view[key] for key in REASONING[:3] if not is_empty(view.get(key))}
  used.update(thoughts)
  return [
    *messages,
    {"role": "user", "content": prompt},
    reader.turn(answer | thoughts, "the record", ""),
  ]


def _chat(view: Mapping[str, Any], reader: TurnReader, used: set[str]) -> list[Message]:
  return reader.turns(view["messages"], "messages")


def _sharegpt(view: Mapping[str, Any], reader: TurnReader, used: set[str]) -> list[Message]:
  return reader.turns(view["conversations"], "conversations", spelling=1)


def _alpaca(view: Mapping[str, Any], reader: TurnReader, used: set[str]) -> list[Message]:
  used.add("input")
  extra = _text(view, "input", optional=True)
  instruction = _text(view, "instruction")
  return _pair(view, f"{instruction}\n\n{extra}" if extra.strip() else instruction, "output", reader, used)


def _prompt_completion(view: Mapping[str, Any], reader: TurnReader, used: set[str]) -> list[Message]:
  return _pair(view, _text(view, "prompt"), "completion", reader, used)


def _prompt_response(view: Mapping[str, Any], reader: TurnReader, used: set[str]) -> list[Message]:
  return _pair(view, _text(view, "prompt"), "response", reader, used)


_Parse = Callable[[Mapping[str, Any], TurnReader, set[str]], list[Message]]
# Columns that a record of this shape has, and what reads it, adding the columns that it reads besides.
_SHAPES: tuple[tuple[tuple[str, ...], _Parse], ...] = (
  (("messages",), _chat),
  (("conversations",), _sharegpt),
  (("instruction", "output"), _alpaca),
  (("prompt", "completion"), _prompt_completion),
  (("prompt", "response"), _prompt_response),
)


def _shape_of(view: Mapping[str, Any], value: Mapping[str, Any]) -> tuple[tuple[str, ...], _Parse]:
  """The first shape whose columns are all filled, or else there: a table of several shapes has empty columns."""
  filled = {column for column in view if not is_empty(view[column])}
  for there in (filled.issuperset, lambda columns: columns[0] in filled and view.keys() >= {*columns}):
    for columns, parse in _SHAPES:
      if there(columns):
        return columns, parse
  for columns, parse in _SHAPES:
    if view.keys() >= {*columns}:
      return columns, parse
  known = "; ".join(" + ".join(columns) for columns, _ in _SHAPES)
  raise UserError(
    f"unknown record shape: its columns are {', '.join(map(clean, value)) or '(none)'}; known shapes: {known}; "
    "name the columns with data_fields, for example prompt=question,response=answer"
  )


def _end_at_last_response(messages: list[Message]) -> Messages:
  """Drops what follows the last response that is learnt; without one, assistant turns that say nothing."""
  said = lambda m: m["content"].strip() or "tool_calls" in m or "reasoning_content" in m  # noqa: E731
  answered = [i for i, message in enumerate(messages) if is_learnt(message) and said(message)]
  ended = messages[: answered[-1] + 1] if answered else [m for m in messages if m["role"] != "assistant" or said(m)]
  if not ended:
    raise UserError("the conversation has no turn with text; remove it")
  return tuple(ended)
