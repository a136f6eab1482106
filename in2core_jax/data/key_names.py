"""Keys by the names that we read: other case (`System`, `toolCalls`), other words for the same (`chat_history`)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

# Other words for earlier rounds, system prompts, tools, reasoning and tool calls, in lower case with underscores.
_ROUNDS = ("chat_history", "conversation_history", "dialog_history", "dialogue_history", "message_history")
_ROUNDS += ("messages_history", "history_messages", "history_turns", "previous_messages", "previous_turns")
_ROUNDS += ("previous_rounds", "past_messages", "past_turns", "prior_messages", "prior_turns", "earlier_rounds")
_TOOLS = ("available_tools", "tool_definitions", "tool_defs", "tool_schemas", "tools_schema", "tool_list", "tool_specs")
_TOOLS += ("function_definitions", "function_schemas", "available_functions", "function_list", "apis", "api_list")
_CALLS = ("tool_call", "function_calls", "tool_uses", "tool_use")
_REASONING = ("cot", "chain_of_thought", "think", "reasoning_text", "reasoning_trace", "thinking_content")
OTHER_WORDS = {
  **dict.fromkeys(_ROUNDS, "history"),
  **dict.fromkeys(("sys", "sys_prompt", "system_msg", "system_instruction", "system_instructions"), "system"),
  **dict.fromkeys(_TOOLS, "tools"),
  **dict.fromkeys(_CALLS, "tool_calls"),
  **dict.fromkeys(_REASONING, "reasoning_content"),
}


@functools.lru_cache(1024)  # records of a source have the same keys
def snake(key: str) -> str:
  """`conversationId`, `Conversation ID` and `conversation-id` as conversation_id."""
  return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()).strip("_")


def is_empty(value: Any) -> bool:
  """Whether a value says nothing: null, a blank text, a list or an object of nothing else."""
  if isinstance(value, str):
    return not value.strip()
  if isinstance(value, dict):
    return all(is_empty(item) for item in value.values())
  return value is None or (isinstance(value, list) and all(is_empty(item) for item in value))


def meant(key: str) -> str:
  """The name that we read for a key of another spelling; the key in lower case with underscores where there is none."""
  name = snake(key)
  return OTHER_WORDS.get(name, name)


def by_known_names(value: Mapping[str, Any], known: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
  """An object whose keys have the names that we read, where they are only spelled otherwise.

  A key keeps its own name where the known one is filled already, and where other words (`apis`, `tool_list`) hold
  something of another form.

  Args:
    value: the object.
    known: names that are read.

  Returns:
    (the object, {known name: key that it stands under}).
  """
  known = frozenset(known)
  view, stood = dict(value), {}
  for key in value:
    name = meant(key) if key not in known and isinstance(key, str) else key
    taken = name in stood or not is_empty(value.get(name))
    if name == key or name not in known or taken or is_empty(value[key]):
      continue
    if snake(key) == name or _has_form(name, value[key]):
      view.pop(name, None)
      stood[name] = key
      view[name] = view.pop(key)
  return view, stood


def _has_form(name: str, value: Any) -> bool:
  """Whether a value under another word is what the known name would hold."""
  listed = isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{"))
  if name == "tools":
    parts = value if isinstance(value, list) else [value]
    return listed and all(isinstance(part, dict) or (isinstance(part, str) and "{" in part) for part in parts)
  return listed if name in ("history", "tool_calls") else isinstance(value, str | list)
