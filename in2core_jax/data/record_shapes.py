"""The shapes that people write a record in -> its messages, its tools, and the keys that nobody reads.

To add a shape: a row of `_MORE_SHAPES`. Nothing here knows a file format or a tokenizer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from in2core_jax.data import media, preferences, record_keys
from in2core_jax.data.key_names import by_known_names, is_empty
from in2core_jax.data.turns import REASONING, Message, TurnReader, clean, listed, read_tools, type_name
from in2core_jax.errors import UserError

Messages = tuple[Message, ...]

TOPIC_COLUMNS = ("topic", "source", "category")
_SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
# What --data_fields can name.
ROLES = (
  *("prompt", "response", "completion", "instruction", "input", "output"),
  *("messages", "conversations", "system", "history", "tools", "reasoning", "id", "topic", "weight"),
  *("chosen", "rejected"),
)
_TEXT_ROLES = frozenset(ROLES) - {"system", "tools", "id", "topic", "weight"}
# Columns that often hold the whole record once more, as one text.
_RENDERINGS = ("text", "full_text", "formatted_text")
_NO_TEXT = ("id", "weight", *TOPIC_COLUMNS)  # columns that nobody takes for a part of the conversation
_Parse = Callable[[Mapping[str, Any], TurnReader, set[str]], list[Message]]
# A round as an object: its question and its answer.
_ROUNDS = (("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("prompt", "response"))
_ROUNDS += (("question", "answer"), ("query", "response"), ("instruction", "output"), ("q", "a"))
_ROUNDS += (("input", "output"), ("human", "bot"), ("user", "bot"))


@dataclasses.dataclass(frozen=True)
class Conversation:
  """What a record says.

  Attributes:
    messages: see `turns`; they end with the last response that is learnt.
    tools: definitions of the tools that it may call.
    unread: names of keys that nobody reads and that are not known to be without meaning.
    given_id, topic: as the record names them; None and "" where it does not.
    rejected: of a preference pair, the conversation with the rejected answer; `messages` is that with the chosen one.
    weight: how much its loss counts in a training.
  """

  messages: Messages
  tools: tuple[dict[str, Any], ...]
  unread: tuple[str, ...]
  given_id: str | None
  topic: str
  rejected: Messages = ()
  weight: float = 1.0


def is_learnt(message: Message) -> bool:
  """Whether the loss counts a message: a response that its owner has not taken out."""
  return message["role"] == "assistant" and message.get("train", True)


def read_record(value: Mapping[str, Any], fields: Mapping[str, str]) -> Conversation:
  """Reads a record.

  Args:
    value: its JSON object.
    fields: {role: column}, see `sources.parse_fields`. Once a column is named for the text, no other column counts as
      text: `prompt=question` must not meet a column `messages` that happens to be there too. What is no text (id,
      topic, weight) is read by our names all the same.

  Raises:
    UserError: an unknown shape, wrong types, or what cannot be rendered; without the place of the record.
  """
  named = not _TEXT_ROLES.isdisjoint(fields)
  kept = {
    key: item
    for key, item in value.items()
    if (not named or key in _NO_TEXT) and not (key == "weight" and key in fields)
  }
  named_columns = {role: value[column] for role, column in fields.items() if column in value}
  view, stood = (kept, {}) if named else _by_known_names(kept)
  view = view | named_columns
  reader, used, rejected = TurnReader(), set(), []
  sides = preferences.sides_of(view)
  if sides:
    used.update(sides)
    context = lambda seen, answer: _prompt(seen, answer, reader, used)  # noqa: E731
    messages, rejected = preferences.read_pair(view, sides, reader, context)
    _add_system(view, rejected, reader, used)
  else:
    columns, parse = _shape_of(view, value)
    used.update(columns)
    messages = parse(view, reader, used)
  unread = _add_system(view, messages, reader, used)
  tools = _tools(view, reader, used)
  topic = _topic(view, used)
  given_id, weight = _given_id(view), _weight(view, fields, used)
  read = {"id"} | used
  read = {fields.get(role, stood.get(role, role)) for role in read if role in fields or role in stood or role in kept}
  placeholders = media.placeholders([*messages, *rejected])
  for key, item in value.items():
    if key not in read and not is_empty(item):
      media.refuse_key(key, item, placeholders, none_known=named or not record_keys.has_no_meaning(key, item))
      # Whoever names the columns of the text has said that the others are none of it.
      other = key == "weight" and "weight" in fields  # another column is named as the weight
      says = not other and (not named or key == "weight")
      settled = (says and record_keys.check_record_key(key, item)) or _is_rendering(key, item, messages)
      if not settled and not record_keys.has_no_meaning(key, item):
        unread.append(key)
  unread += [*reader.unread, *(f"{word}{media.IN_A_TEXT}" for word in placeholders)]
  ended = _end_at_last_response(messages)
  other = _end_at_last_response(rejected) if rejected else ()
  return Conversation(ended, tools, tuple(dict.fromkeys(map(clean, unread))), given_id, topic, other, weight)


def _is_rendering(key: str, value: Any, messages: Sequence[Message]) -> bool:
  """Whether a text is the conversation once more, written out as some trainer wants it."""
  if key not in _RENDERINGS or not isinstance(value, str):
    return False
  at = 0
  for said in (message["content"].strip() for message in messages):
    at = value.find(said, at)
    if at < 0:
      return False
    at += len(said)
  return True


# ---- the parts that all shapes have ----------------------------------------------------------------------------------


def _given_id(view: Mapping[str, Any]) -> str | None:
  given = view.get("id")
  if given is None or given == "":
    return None
  if isinstance(given, bool) or not isinstance(given, str | int):
    raise UserError(f"the id is {type_name(given)}, not a string or an integer")
  return clean(str(given))


def _weight(view: Mapping[str, Any], fields: Mapping[str, str], used: set[str]) -> float:
  """How much the record's loss counts; 1 where it does not say. What else a key `weight` says is told with the rest."""
  value = view.get("weight")
  if record_keys.weighs("weight", value):
    used.add("weight")
    return float(value)
  if "weight" in fields and not is_empty(value) and (value != 1 or isinstance(value, bool)):
    raise UserError(
      f"{fields['weight']!r} is {record_keys.shown(value)}, and a weight is a number above 0 and up to a million; "
      "change it, or remove such records"
    )
  used.update(["weight"] if "weight" in fields else [])
  return 1.0


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
  value = listed(value, "history")
  if is_empty(value):
    return []
  if not isinstance(value, list):
    raise UserError(f"'history' must be a list of earlier rounds but is {type_name(value)}")
  messages: list[Message] = []
  for i, pair in enumerate(value):
    at = f"round {i} of 'history'"
    if isinstance(pair, dict) and ("role" in pair or "from" in pair):
      messages.append(reader.turn(pair, at, "history[]"))
    else:
      messages += _turns_of_round(pair, at, "history[]", reader)
  return messages


def _turns_of_round(pair: Any, at: str, path: str, reader: TurnReader) -> list[Message]:
  """A question and its answer; nothing where both are empty."""
  question, answer, rest = _round(pair, at)
  if is_empty(question) and is_empty(answer):
    return []
  system = rest.pop("system", None)  # XTuner has it in the first round
  first = [reader.turn({"role": "system", "content": system}, at, path)] if not is_empty(system) else []
  asked = reader.turn({"role": "user", "content": question}, at, path)
  return [*first, asked, reader.turn({"role": "assistant", "content": answer} | rest, at, path)]


def _names_of_round(pair: Any) -> tuple[str, str] | None:
  """The names of its question and answer; None for what is no such object."""
  if not isinstance(pair, dict) or "role" in pair or "from" in pair:
    return None
  return next((names for names in _ROUNDS if all(name in pair for name in names)), None)


def _round(pair: Any, at: str) -> tuple[Any, Any, dict[str, Any]]:
  """(question, answer, what else is there) of an earlier round."""
  if isinstance(pair, list) and len(pair) == 2 and not any(isinstance(text, dict) for text in pair):
    return pair[0], pair[1], {}
  names = _names_of_round(pair)
  if names is None:
    raise UserError(f"{at} must be a question and its answer, [question, answer], but is {record_keys.shown(pair)}")
  rest = {key: item for key, item in pair.items() if key not in names}
  return pair[names[0]], pair[names[1]], rest


# ---- the shapes ------------------------------------------------------------------------------------------------------


def _turns(view: Mapping[str, Any], key: str, reader: TurnReader, spelling: int = 0) -> list[Message]:
  """A conversation: turns with roles, texts that alternate between user and assistant, or rounds of two texts."""
  value = listed(view[key], key)
  if isinstance(value, list) and value:
    if all(isinstance(text, str) for text in value):
      return [{"role": ("user", "assistant")[i % 2], "content": clean(text)} for i, text in enumerate(value)]
    if all(_names_of_round(pair) for pair in value):
      rounds = (_turns_of_round(pair, f"round {i} of {key!r}", f"{key}[]", reader) for i, pair in enumerate(value))
      return [message for found in rounds for message in found]
  return reader.turns(value, key, spelling)


def _pair(prompt: str, response: str, *extras: str) -> _Parse:
  """Reads a prompt, the columns that are added to it, and its response; with earlier rounds and reasoning."""

  def parse(view: Mapping[str, Any], reader: TurnReader, used: set[str]) -> list[Message]:
    used.update(("history", *extras))
    messages = _history(view.get("history"), reader)
    if _has_roles(view[prompt]):
      # As TRL has it: what stands in the prompt is context, and the completion alone is learnt.
      asked = [{**m, "train": False} if is_learnt(m) else m for m in reader.turns(view[prompt], prompt)]
      texts = []
    else:
      asked, texts = [{"role": "user", "content": ""}], [_text(view, prompt)]
    more = [text for text in (_text(view, extra, optional=True) for extra in extras) if text.strip()]
    if texts or more:
      asked[-1]["content"] = "\n\n".join([*filter(None, [asked[-1]["content"]]), *texts, *more])
    if _has_roles(view.get(response)):
      return [*messages, *asked, *reader.turns(view[response], response)]
    answer = {"role": "assistant", "content": _text(view, response, optional=True)}
    said = [key for key in REASONING[:3] if not is_empty(view.get(key))]
    thoughts = {key: view[key] for key in said if not record_keys.is_switch(view[key])}
    used.update(thoughts)
    return [*messages, *asked, reader.turn(answer | thoughts, "the record", "")]

  return parse


def _has_roles(value: Any) -> bool:
  """Whether a prompt or a completion is a list of turns (tfds: an object of lists) and no text."""
  if isinstance(value, dict):
    return bool(value) and all(isinstance(column, list) for column in value.values())
  return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


_PROMPTS = (
  ("prompt",),
  ("question",),
  ("instruction", "input", "context"),
  ("query",),
  ("problem",),
  ("input",),
)
_DIALOGUES = {"messages": 0, "conversations": 1, "conversation": 0}  # with what `TurnReader.turns` calls their spelling


def _prompt(view: Mapping[str, Any], answer: str, reader: TurnReader, used: set[str]) -> list[Message]:
  """The prompt of a preference pair, if it has columns of its own; `answer` is the chosen one."""
  prompt: list[Message] = []
  first = next((names for names in _PROMPTS if not is_empty(view.get(names[0]))), None)
  if first:
    read: set[str] = {first[0]}
    prompt = _pair(first[0], "", *first[1:])(view, reader, read)[:-1]
    used.update(read.difference(REASONING))  # of which answer it would be, nobody says
  for key in (key for key in _DIALOGUES if not is_empty(view.get(key))):
    turns = _turns(view, key, reader, _DIALOGUES[key])
    # Some write the chosen side once more as a conversation.
    again = bool(turns) and turns[-1]["role"] == "assistant" and turns[-1]["content"].strip() == answer.strip()
    turns = turns[:-1] if again else turns
    if again or (turns and turns[-1]["role"] != "assistant" and not prompt):
      used.add(key)
      prompt = prompt or turns
  return prompt


def _conversation(key: str, spelling: int = 0) -> _Parse:
  return lambda view, reader, used: _turns(view, key, reader, spelling)


_SPEAKERS = re.compile(r"### ?(Human|User|Assistant|System): ?")


def _written_out(view: Mapping[str, Any], reader: TurnReader, used: set[str]) -> list[Message]:
  """Turns that stand in one text, `### Human: ... ### Assistant: ...`."""
  before, *rest = _SPEAKERS.split(_text(view, "text"))
  if before.strip():
    raise UserError(f"'text' has {record_keys.shown(before)} before its first speaker; remove it, or write 'messages'")
  said = [text.strip() for text in rest[1::2]]
  return [
    reader.turn({"role": role, "content": text}, "the text", "text") for role, text in zip(rest[::2], said, strict=True)
  ]


def _has_speakers(view: Mapping[str, Any]) -> bool:
  text = view["text"]
  return isinstance(text, str) and {"Assistant"} < {*_SPEAKERS.findall(text)}


def _is_texts(view: Mapping[str, Any]) -> bool:
  return isinstance(view["data"], list) and all(isinstance(text, str) for text in view["data"])


@dataclasses.dataclass(frozen=True)
class _Shape:
  """Columns that a record of this shape has, and what reads it, adding the columns that it reads besides."""

  columns: tuple[str, ...]
  parse: _Parse
  fits: Callable[[Mapping[str, Any]], bool] = lambda view: True


# The first that fits is taken. A record that one of the first kind reads is not looked at by others: it keeps its id.
_FIRST_SHAPES = (
  _Shape(("messages",), _conversation("messages")),
  _Shape(("conversations",), _conversation("conversations", spelling=1)),  # ShareGPT, LIMA
  _Shape(("instruction", "output"), _pair("instruction", "output", "input")),  # Alpaca
  _Shape(("prompt", "completion"), _pair("prompt", "completion")),
  _Shape(("prompt", "response"), _pair("prompt", "response")),
)
_MORE_SHAPES = (
  _Shape(("instruction", "response"), _pair("instruction", "response", "input", "context")),  # Dolly
  _Shape(("question", "response"), _pair("question", "response")),  # OpenOrca
  _Shape(("question", "answer"), _pair("question", "answer")),  # GSM8K
  _Shape(("query", "response"), _pair("query", "response")),  # MetaMath
  _Shape(("problem", "solution"), _pair("problem", "solution")),
  _Shape(("inputs", "targets"), _pair("inputs", "targets")),  # FLAN, Aya
  _Shape(("input", "output"), _pair("input", "output"), lambda view: "instruction" not in view),
  _Shape(("conversation",), _conversation("conversation")),
  _Shape(("data",), _conversation("data"), _is_texts),  # UltraChat
  _Shape(("text",), _written_out, _has_speakers),  # Guanaco
)


def _by_known_names(kept: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
  """The record with the names that we read; those of shapes only where it has no shape without them."""
  extras = {"history", *_SYSTEM, *_TOOLS, *REASONING[:3], *(["input"] if "instruction" in kept else [])}
  view, stood = by_known_names(kept, extras)
  if any(view.keys() >= {*shape.columns} and shape.fits(view) for shape in (*_FIRST_SHAPES, *_MORE_SHAPES)):
    return view, stood
  columns = {column for shape in (*_FIRST_SHAPES, *_MORE_SHAPES) for column in shape.columns}
  return by_known_names(kept, {*extras, *columns, "input"})


_WRITE = "write each record as 'messages' with roles and contents"
# Columns of other formats that no shape has -> what they hold, what to do.
_NOT_READ = {
  "input_ids": f"holds token ids of another program; give the texts that they were made of: {_WRITE}",
  "segments": f"holds segments of Axolotl, which have no roles; {_WRITE}",
  "input_output": f"holds segments of Axolotl, which have no roles; {_WRITE}",
  "contents": f"holds turns of Gemini's API; {_WRITE}",
  "body": "holds a request of a batch API; give what it holds as the record",
  "preferred_output": "is one side of a preference pair; write 'prompt', 'chosen' and 'rejected'",
}


def _refuse_shape(value: Mapping[str, Any]) -> NoReturn:
  """Refuses a record of no shape, with what would help with its columns."""
  filled = {key: item for key, item in value.items() if not is_empty(item)}
  for key in (key for key in _NOT_READ if key in filled):
    raise UserError(f"{key!r} {_NOT_READ[key]}")
  turns = next((key for key, item in filled.items() if _has_roles(item)), None)
  texts = [key for key, item in filled.items() if isinstance(item, str) and not record_keys.has_no_meaning(key, item)]
  help_ = "name the columns, for example with data_fields=prompt=question,response=answer"
  if turns:
    help_ = f"name the columns, for example with data_fields=messages={clean(turns)}"
  elif texts and {"text", "chat"}.issuperset(texts):
    help_ = f"{texts[0]!r} alone does not say what in it is the response: {_WRITE}"
  known = "; ".join(" + ".join(shape.columns) for shape in (*_FIRST_SHAPES, *_MORE_SHAPES[:-2])) + "; chosen + rejected"
  raise UserError(
    f"unknown record shape: its columns are {', '.join(map(clean, value)) or '(none)'}; known shapes: {known}; text "
    f"with ### Human: and ### Assistant:; {help_}"
  )


def _shape_of(view: Mapping[str, Any], value: Mapping[str, Any]) -> tuple[tuple[str, ...], _Parse]:
  """The first shape whose columns are all filled, or else there: a table of several shapes has empty columns."""
  filled = {column for column in view if not is_empty(view[column])}
  there = lambda columns: view.keys() >= {*columns}  # noqa: E731
  asked = lambda columns: columns[0] in filled and there(columns)  # noqa: E731
  # A blank prompt with an answer is a pair all the same.
  blank = lambda columns: there(columns) and isinstance(view[columns[0]], str) and filled & {*columns}  # noqa: E731
  for shapes, fit in (
    *((_FIRST_SHAPES, fit) for fit in (filled.issuperset, asked, blank)),
    *((_MORE_SHAPES, fit) for fit in (filled.issuperset, asked)),
    *((shapes, there) for shapes in (_FIRST_SHAPES, _MORE_SHAPES)),
  ):
    for shape in shapes:
      if fit(shape.columns) and shape.fits(view):
        return shape.columns, shape.parse
  _refuse_shape(value)


def _end_at_last_response(messages: list[Message]) -> Messages:
  """Drops what follows the last response that is learnt; without one, assistant turns that say nothing."""
  said = lambda m: m["content"].strip() or "tool_calls" in m or "reasoning_content" in m  # noqa: E731
  answered = [i for i, message in enumerate(messages) if is_learnt(message) and said(message)]
  ended = messages[: answered[-1] + 1] if answered else [m for m in messages if m["role"] != "assistant" or said(m)]
  if not ended:
    raise UserError("the conversation has no turn with text; remove it")
  return tuple(ended)
