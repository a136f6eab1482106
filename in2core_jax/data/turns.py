"""One turn of a conversation, in the spellings that people use -> a message: role, text, reasoning, tool calls, loss.

A message is a dict of "role" (system, user, assistant, tool), "content" (a string) and, only where they are there,
"reasoning_content", "tool_calls", "name", "tool_call_id", and "train": False for a response out of the loss.
"""

from __future__ import annotations

import json
import re
from typing import Any

from in2core_jax.data import media, record_keys
from in2core_jax.data.content_blocks import expand
from in2core_jax.data.json_text import Decoder, Refused
from in2core_jax.data.key_names import by_known_names, is_empty, meant
from in2core_jax.data.record_keys import shown
from in2core_jax.errors import UserError

Message = dict[str, Any]

_CALLS = "calls"  # a turn whose text is a tool call in JSON
_ROLES = {
  **dict.fromkeys(("system", "developer", "sys", "system_prompt", "system_message"), "system"),
  **dict.fromkeys(("user", "human", "prompter", "usr", "customer", "question", "instruction"), "user"),
  **dict.fromkeys(("prompt", "query"), "user"),
  **dict.fromkeys(
    ("assistant", "gpt", "model", "bot", "chatgpt", "chatbot", "ai", "asst", "llm", "agent"), "assistant"
  ),
  **dict.fromkeys(("ai_assistant", "bard", "bing", "claude", "gemini", "gpt4", "gpt_4", "gpt_3.5"), "assistant"),
  **dict.fromkeys(("answer", "response", "completion"), "assistant"),
  **dict.fromkeys(("tool", "function", "observation", "ipython", "environment", "api"), "tool"),
  **dict.fromkeys(("tool_response", "function_response", "tool_result", "tool_output", "function_output"), "tool"),
  **dict.fromkeys(("tool_responses", "tool_results", "function_result", "tool_return", "function_return"), "tool"),
  **dict.fromkeys(("function_call", "tool_call", "tool_calls", "function_calls"), _CALLS),
}
_SPELLINGS = (("role", "content"), ("from", "value"))
_OTHERS = (("role", "value"), ("role", "text"), ("role", "message"), ("from", "content"), ("from", "text"))
_OTHERS += (("speaker", "text"), ("speaker", "content"), ("author", "content"), ("author", "text"))
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
# What `turn` reads, whatever the case of its letters.
_KNOWN = frozenset(["role", "content", "from", "value", "name", "tool_call_id", "tool_calls", "function_call"])
_KNOWN |= {"tools", "functions", *REASONING[:3]}
_NAN = re.compile(r"\bNaN\b")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA_PARTS = ("image", "audio", "video", "file", "document", "media")


def type_name(value: Any) -> str:
  """A JSON value's type in words."""
  names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
  return "null" if value is None else names.get(type(value), type(value).__name__)


def clean(value: Any) -> Any:
  """Replaces unpaired surrogates, which JSON can spell but no UTF-8 text can hold, by U+FFFD."""
  if isinstance(value, str):
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
  if isinstance(value, dict):
    return {clean(key): clean(item) for key, item in value.items()}
  return [clean(item) for item in value] if isinstance(value, list) else value


class TurnReader:
  """Reads the turns of one record.

  Attributes:
    tools: definitions of tools that stood in the turns, as they were found.
    unread: names of keys that nobody reads and that may mean something, as `messages[].mood`.
  """

  def __init__(self):
    self.tools: list[Any] = []
    self.unread: list[str] = []

  def turns(self, value: Any, key: str, spelling: int = 0) -> list[Message]:
    """Reads a list of turns (tfds gives an object of lists).

    Args:
      value: the list.
      key: its name.
      spelling: 0 where turns mostly have a role and a content, 1 for from and value; each may have the other, or yet
        another one.

    Raises:
      UserError: not such a list, or what `turn` refuses.
    """
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
      if len({len(column) for column in value.values()}) > 1:
        raise UserError(f"{key!r} is an object of lists that differ in length")
      value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
      raise UserError(f"{key!r} must be a list of turns but is {type_name(value)}")
    places = [(_by_known_names(turn), f"turn {i} of {key!r}") for i, turn in enumerate(value)]
    return [self.turn(each, at, f"{key}[]", spelling) for turn, at in places for each in expand(turn, at)]

  def turn(self, turn: Any, at: str, path: str, spelling: int = 0) -> Message:
    """Reads one turn.

    Args:
      turn: an object with a role and a text.
      at: where it stands, for messages.
      path: the same for names of keys, such as `messages[]`.
      spelling: see `turns`.

    Raises:
      UserError: no such object, an unknown role, pictures, something of a wrong type.
    """
    turn = _by_known_names(turn)
    pair = self._spelling(turn, at, spelling)
    role = _role(turn[pair[0]], pair[0], at)
    message: Message = {"role": role, "content": ""}
    thought = None
    if role == _CALLS:
      message = {"role": "assistant", "content": "", "tool_calls": self._calls(turn.get(pair[1]), at, path)}
    else:
      message["content"], thought = self._content(turn.get(pair[1]), role, pair[1], at, path)
    rest = [key for key in turn if key not in pair and not is_empty(turn[key]) and not _no_calls(key, turn[key])]
    rest = self._of_assistant(message, turn, rest, thought, at, path)
    rest = self._names(message, turn, rest, at)
    if role in ("system", "user"):
      found = [key for key in rest if key in ("tools", "functions")]
      self.tools += [turn[key] for key in found]
      rest = [key for key in rest if key not in found]
    self._rest(message, turn, rest, at, path)
    return message

  def _spelling(self, turn: Any, at: str, spelling: int) -> tuple[str, str]:
    """The names of its role and text."""
    pairs = (_SPELLINGS[spelling], _SPELLINGS[1 - spelling], *_OTHERS)
    if isinstance(turn, dict):
      for pair in pairs:
        # A turn that is a tool call may go without a text.
        if pair[0] in turn and (pair[1] in turn or "tool_calls" in turn or "function_call" in turn):
          return pair
    names = " and ".join(map(repr, pairs[0]))
    raise UserError(f"{at} must be an object with {names}{_what_it_has(turn)}")

  def _content(self, value: Any, role: str, key: str, at: str, path: str) -> tuple[str, str | None]:
    """(text, reasoning or None) of a content: a string, null, a list of parts; a tool's result may be any JSON."""
    if value is None:
      return "", None
    if isinstance(value, str):
      return clean(value), None
    if role == "tool" and not _has_parts(value):
      return clean(json.dumps(value, ensure_ascii=False)), None
    if isinstance(value, dict) and "type" in value and "text" in value:
      value = [value]
    if not isinstance(value, list):
      raise UserError(f"{at}: {key!r} must be a string but is {type_name(value)}")
    texts, thoughts = [], []
    for i, part in enumerate(value):
      text, thought = self._part(part, f"{at}: part {i} of {key!r}", f"{path}.{key}[]")
      if thought and texts:
        raise UserError(
          f"{at}: part {i} of {key!r} is reasoning behind a text; templates write it in front: put it first"
        )
      texts += [text] if text else []
      thoughts += [thought] if thought else []
    return clean("\n".join(texts)), clean("\n".join(thoughts)) or None

  def _part(self, part: Any, at: str, path: str) -> tuple[str, str]:
    """(text, reasoning) of one part."""
    if isinstance(part, str):
      return part, ""
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(kind, str):
      raise UserError(f"{at} must be a text or an object with 'type' but is {type_name(part)}")
    key = "text" if kind in _TEXT_PARTS else kind
    if kind not in (*_TEXT_PARTS, "thinking", "reasoning"):
      is_medium = any(word in kind.lower() for word in _MEDIA_PARTS)
      what = "images, audio, video and files cannot be read" if is_medium else "only text and thinking can be read"
      raise UserError(f"{at} is of type {kind!r}: {what}; remove such records, or the part")
    used = key if key in part else "text"
    value = part.get(used)
    if isinstance(value, list) and key != "text":  # Mistral's thinking holds parts of its own
      value = "\n".join(self._part(inner, f"{at}: part {i}", path)[0] for i, inner in enumerate(value))
    if not isinstance(value, str):
      raise UserError(f"{at} must have a string {key!r}, which is {type_name(value)}")
    for name, item in part.items():
      if name not in ("type", used, "signature", "closed") and not is_empty(item):
        media.refuse_key(name, item, where=at, none_known=False)
        self._tell(path, name, item)
    return (value, "") if key == "text" else ("", value)

  def _of_assistant(self, message: Message, turn: dict, rest: list[str], thought: str | None, at: str, path: str):
    """Reasoning, tool calls and the place in the loss; returns the keys that are left."""
    if message["role"] != "assistant":
      if thought is not None:
        raise UserError(f"{at}: reasoning in a turn of {message['role']}; only the assistant thinks")
      return rest
    rest = self._reasoning(message, turn, rest, thought, at)
    calls = [key for key in rest if key in ("tool_calls", "function_call")]
    found = [self._calls(turn[key], at, path) for key in calls]
    if len(found) > 1 or (found and "tool_calls" in message):
      raise UserError(f"{at} has its tool calls twice; keep 'tool_calls'")
    if found:
      message["tool_calls"] = found[0]
    learnt, flags = record_keys.turn_flag(turn, [key for key in rest if key not in calls], at)
    if learnt is False:
      message["train"] = False
    return [key for key in rest if key not in (*calls, *flags)]

  @staticmethod
  def _reasoning(message: Message, turn: dict, rest: list[str], thought: str | None, at: str) -> list[str]:
    """The reasoning of an answer, by all of its names; returns the keys that are left."""
    thoughts = {"its parts": thought} if thought is not None else {}
    for key in (key for key in rest if key in REASONING and not record_keys.is_switch(turn[key])):
      if not isinstance(turn[key], str):
        raise UserError(f"{at}: {key!r} must be a string but is {type_name(turn[key])}")
      thoughts[key] = clean(_without_tags(turn[key]))
    if len(set(thoughts.values())) > 1:
      raise UserError(f"{at} has reasoning in {' and in '.join(thoughts)}, and they differ; keep one")
    if thoughts and message["content"].lstrip().startswith("<think>"):
      raise UserError(f"{at} has reasoning in its text, <think>, and in {next(iter(thoughts))}; keep one")
    if thoughts:
      message["reasoning_content"] = next(iter(thoughts.values()))
      return [key for key in rest if key not in (*thoughts, "reasoning_details")]
    if "reasoning_details" in rest:
      raise UserError(f"{at} has 'reasoning_details' alone; write the reasoning as a text under 'reasoning_content'")
    return rest

  @staticmethod
  def _names(message: Message, turn: dict, rest: list[str], at: str) -> list[str]:
    """The name of who speaks and the call that is answered; returns the keys that are left."""
    for key in ("name", "tool_call_id"):
      if key in rest and (key == "name" or message["role"] == "tool"):
        if isinstance(turn[key], bool) or not isinstance(turn[key], str | int):
          raise UserError(f"{at}: {key!r} must be a string but is {type_name(turn[key])}")
        message[key] = clean(str(turn[key]))
        rest = [other for other in rest if other != key]
    return rest

  def _rest(self, message: Message, turn: dict, rest: list[str], at: str, path: str) -> None:
    """Refuses or tells what is left."""
    rest = [key for key in rest if not record_keys.settles_turn(key, turn[key], message["role"], at)]
    if message["role"] != "assistant":  # never learnt, and a flag that says so is no news
      learnt, flags = record_keys.turn_flag(turn, rest, at)
      rest = [key for key in rest if key not in flags]
      self.unread += [f"{path}.{key} of {message['role']} turns" for key in flags if learnt]
    for key in rest:
      calls = meant(key) in ("tool_calls", "function_call") and isinstance(turn[key], str | list | dict)
      if key == "refusal" or calls:
        raise UserError(f"{at}: {key!r} in a turn of {message['role']} cannot be rendered; remove such records")
      media.refuse_key(key, turn[key], where=at, none_known=not record_keys.has_no_meaning(key, turn[key]))
      self._tell(path, key, turn[key])

  def _tell(self, path: str, key: str, value: Any) -> None:
    if not record_keys.has_no_meaning(key, value):
      self.unread.append(f"{path}.{key}")

  def _calls(self, value: Any, at: str, path: str) -> list[dict[str, Any]]:
    """Tool calls as {"id"?, "type": "function", "function": {"name", "arguments"}}."""
    value = _from_text(value, f"{at} is a tool call, which")
    calls = [self._call(call, at, path) for call in (value if isinstance(value, list) else [value])]
    if not calls:
      raise UserError(f"{at} is a tool call, but names no function")
    return calls

  def _call(self, call: Any, at: str, path: str) -> dict[str, Any]:
    call = _from_text(call, f"{at}: a tool call")
    if not isinstance(call, dict) or call.get("type", "function") not in ("function", None):
      raise UserError(f"{at}: a tool call must be an object of type 'function' but is {shown(call)}")
    function = _from_text(call.get("function", call), f"{at}: the function of a tool call")
    if not isinstance(function, dict):
      raise UserError(f"{at}: the function of a tool call must be an object but is {type_name(function)}")
    arguments = next((key for key in ("arguments", "parameters", "args", "input") if key in function), "arguments")
    name, given = function.get("name"), _arguments(function.get(arguments))
    if not isinstance(name, str) or not name.strip():
      raise UserError(f"{at}: a tool call has no 'name' of a function: {shown(call)}")
    if not isinstance(given, str | dict):
      raise UserError(f"{at}: {arguments!r} of a tool call must be an object but is {type_name(given)}")
    made = {"type": "function", "function": {"name": clean(name), "arguments": clean(given)}}
    read = {"id", "type", "function", "name", arguments, "index"}
    for holder in (call, function) if function is not call else (call,):
      known = read if holder is function else {"id", "type", "function", "index"}
      for key in holder:
        if key not in known and not is_empty(holder[key]) and (holder is function or holder[key] != function.get(key)):
          self._tell(f"{path}.tool_calls[]", key, holder[key])
    if not is_empty(call.get("id")):
      made = {"id": clean(str(call["id"]))} | made
    return made


def _by_known_names(turn: Any) -> Any:
  return by_known_names(turn, _KNOWN)[0] if isinstance(turn, dict) and not turn.keys() <= _KNOWN else turn


def _what_it_has(turn: Any) -> str:
  return f"; it has {', '.join(map(repr, turn))}" if isinstance(turn, dict) and turn else ""


def _role(value: Any, key: str, at: str) -> str:
  role = value if isinstance(value, str) else None
  if role is not None and role not in _ROLES:  # most are written as they are known
    role = re.sub(r"[\s-]+", "_", value.strip().rstrip(":").lower())
  if role not in _ROLES:
    raise UserError(f"{at} has {key}={value!r}; known: {', '.join(_ROLES)}")
  return _ROLES[role]


def listed(value: Any, key: str) -> Any:
  """A list that stands as JSON in a text, as tables of texts have it; anything else as it is.

  Raises:
    UserError: a text that begins as a list and is none.
  """
  if not isinstance(value, str) or value.lstrip()[:1] != "[":
    return value
  try:
    return Decoder().whole(value)
  except Refused as error:
    raise UserError(f"{key!r} is a text, but not a list in JSON ({error})") from error


def _without_tags(text: str) -> str:
  """Reasoning without <think> and </think> around it, which templates write themselves."""
  bare = text.strip()
  wrapped = bare.startswith("<think>") and bare.endswith("</think>") and bare.count("think>") == 2
  return bare.removeprefix("<think>").removesuffix("</think>").strip("\n") if wrapped else text


def _no_calls(key: str, value: Any) -> bool:
  """Whether a text says that there are no tool calls, as tables of texts have it."""
  return key in ("tool_calls", "function_call") and value in ("[]", "{}", "null", "None")


def _has_parts(value: Any) -> bool:
  """Whether a tool's result is made of parts; else it is whatever JSON the tool gave, which may have a `type` too."""
  parts = [value] if isinstance(value, dict) and "text" in value and "type" in value else value
  return isinstance(parts, list) and all(isinstance(part, str) or _is_part(part) for part in parts)


def _is_part(value: Any) -> bool:
  if not isinstance(value, dict):
    return False
  kind = value.get("type")
  return set(value) == {"text"} or kind in _TEXT_PARTS or any(word in str(kind).lower() for word in _MEDIA_PARTS)


def _from_text(value: Any, what: str) -> Any:
  """The value that a text holds in JSON; anything but a text as it is."""
  if not isinstance(value, str):
    if not isinstance(value, list | dict):
      raise UserError(f"{what} must be JSON with a name and arguments, but is {type_name(value)}")
    return value
  try:
    found = Decoder().whole(value)
  except Refused as error:
    raise UserError(f"{what} must be JSON with a name and arguments, but is {shown(value)} ({error})") from error
  if not isinstance(found, list | dict):
    raise UserError(f"{what} must be JSON with a name and arguments, but is {shown(value)}")
  return found


def _arguments(value: Any) -> Any:
  """Arguments as an object where they are one; a text that is no JSON object stays a text."""
  if not isinstance(value, str):
    return {} if value is None else value
  try:
    found = Decoder().whole(value) if value.strip() else {}
    # NaN would become null, and 1e999 an infinity: such a text is rendered as it stands.
    json.dumps(found, allow_nan=False)
  except ValueError:  # Refused is one
    return value
  return found if isinstance(found, dict) and not _NAN.search(value) else value


def read_tools(value: Any, key: str) -> list[dict[str, Any]]:
  """Definitions of tools: a list of them, or its JSON text, each with or without {"type": "function"} around it.

  Raises:
    UserError: anything else.
  """
  tools = _tool_json(value, key)
  found = []
  for i, tool in enumerate(tools if isinstance(tools, list) else [tools]):
    tool = _tool_json(tool, f"{key}[{i}]")
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
      raise UserError(f"{key!r}: tool {i} must be the definition of a function, with its 'name', but is {shown(tool)}")
    found.append(clean(tool if function is not tool else {"type": "function", "function": _bare(tool)}))
  return found


def _bare(tool: dict[str, Any]) -> dict[str, Any]:
  """A function's definition without the object around it, which other providers spell in their own ways."""
  names = {"input_schema": "parameters", "inputSchema": "parameters"}
  return {names.get(key, key): value for key, value in tool.items() if key != "type"}


def _tool_json(value: Any, key: str) -> Any:
  if not isinstance(value, str):
    return value
  try:
    return Decoder().whole(value)
  except Refused as error:
    raise UserError(f"{key!r} must be a list of tools, or its JSON text, but is {shown(value)} ({error})") from error
