"""Conversations of marks: the turns and tools of a conversation with marks in place of their texts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from in2core_jax.data.template_program import Message

MARK = re.compile("\ue000([0-9]+)([cr])\ue001")  # in place of content or reasoning; pieces: template, k, key, template
WORD = "zq{}qz"  # in place of names and arguments, which a template may write as JSON: plain ASCII


def conversation(*roles: str) -> tuple[Message, ...]:
  """A conversation of these roles, each of whose texts is the role's name."""
  return tuple({"role": role, "content": role} for role in roles)


def shape(message: Message) -> tuple:
  """What a structure keeps of a turn."""
  calls = message.get("tool_calls", ())
  return message["role"], tuple(sorted(message.keys() - {"train"})), bool(message["content"] or not calls), len(calls)


def clean(message: Message, as_text: bool) -> Message:
  """A turn as it is given to the template: no `train`, arguments of calls as objects (or all as JSON text)."""
  message = {key: value for key, value in message.items() if key != "train"}
  if "reasoning_content" in message:
    message["thinking"] = message["reasoning_content"]  # as transformers does, for templates that know it by this name
  if "tool_calls" in message:
    message["tool_calls"] = [
      {**call, "function": {**call["function"], "arguments": _arguments(call["function"].get("arguments"), as_text)}}
      for call in message["tool_calls"]
    ]
  return message


def _arguments(value: Any, as_text: bool) -> Any:
  if as_text:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  if isinstance(value, str):
    try:
      parsed = json.loads(value)
    except (ValueError, RecursionError):
      return value
    return parsed if isinstance(parsed, dict) else value
  return value


def marked_turns(messages: Sequence[Message], as_text: bool) -> tuple[list[Message], dict[tuple[int, str], str]]:
  """The same turns with marks in place of texts, and the words that must be found in their rendering."""
  words, marked = {}, []
  for k, message in enumerate(messages):
    calls = []
    for j, call in enumerate(message.get("tool_calls", ())):
      name, key, value = (WORD.format(f"{k}{letter}{j}") for letter in "fav")
      words |= {
        (k, f"call {j}, its name"): name,
        (k, f"call {j}, an argument"): key,
        (k, f"call {j}, its value"): value,
      }
      calls.append({**call, "function": {"name": name, "arguments": {key: value}}})
    own = {"role": message["role"], "content": f"\ue000{k}c\ue001" if message["content"] or not calls else ""}
    if "reasoning_content" in message:
      own["reasoning_content"] = f"\ue000{k}r\ue001"
    if calls:
      own["tool_calls"] = calls
    if "name" in message:
      own["name"] = words[k, "name"] = WORD.format(f"{k}n")
    if "tool_call_id" in message:
      own["tool_call_id"] = message["tool_call_id"]
    marked.append(clean(own, as_text))
  return marked, words


def marked_tools(tools: Sequence[dict]) -> tuple[list[dict], dict[tuple[int, str], str]]:
  """The same tool definitions with words in place of name, description and parameters; and these words."""
  marked, words = [], {}
  for i, tool in enumerate(tools):
    own = dict(tool.get("function", tool))
    for key in ("name", "description", "parameters"):
      if own.get(key):
        word = words[i, f"tool {key}"] = WORD.format(f"{i}{key}")
        kind = {"type": "string", "description": "a"}
        own[key] = word if key != "parameters" else {"type": "object", "properties": {word: kind}, "required": [word]}
    marked.append({**tool, "function": own} if "function" in tool else own)
  return marked, words
