"""Anthropic's content blocks: tool calls and their results that stand among the parts of a content.

user: [tool_result a, text]  ->  tool: result of a; user: text
assistant: [text, tool_use b]  ->  assistant: text with the call b
"""

from __future__ import annotations

import itertools
from typing import Any

from in2core_jax.data.key_names import is_empty
from in2core_jax.errors import UserError

_CALL, _RESULT = "tool_use", "tool_result"


def expand(turn: Any, at: str) -> list[Any]:
  """The turns that a turn with such blocks stands for, in the order of its blocks; any other turn by itself.

  Args:
    turn: as it was read, of any type.
    at: where it stands, for messages.

  Raises:
    UserError: a text behind a call, whose order no chat template keeps, or calls beside `tool_calls`.
  """
  key = next((key for key in ("content", "value") if isinstance(turn, dict) and isinstance(turn.get(key), list)), None)
  kinds = [_kind(part) for part in turn[key]] if key else []
  if _CALL in kinds:
    return [_with_calls(turn, key, kinds, at)]
  if _RESULT not in kinds:
    return [turn]
  found = []
  for is_result, parts in itertools.groupby(turn[key], lambda part: _kind(part) == _RESULT):
    parts = list(parts)
    found += [_result(part, turn) for part in parts] if is_result else [turn | {key: parts}]
  return found


def _kind(part: Any) -> Any:
  return part.get("type") if isinstance(part, dict) else None


def _with_calls(turn: dict[str, Any], key: str, kinds: list[Any], at: str) -> dict[str, Any]:
  first = kinds.index(_CALL)
  if set(kinds[first:]) != {_CALL}:
    raise UserError(f"{at}: part {first} of {key!r} is a tool call, and other parts follow it; put the call last")
  if not is_empty(turn.get("tool_calls")) or not is_empty(turn.get("function_call")):
    raise UserError(f"{at} has its tool calls twice; keep 'tool_calls'")
  calls = [{name: value for name, value in part.items() if name != "type"} for part in turn[key][first:]]
  return turn | {key: turn[key][:first], "tool_calls": calls}


def _result(part: dict[str, Any], turn: dict[str, Any]) -> dict[str, Any]:
  """The turn of one result; what else the part says goes with it, to be read or told."""
  role, text = ("role", "content") if "role" in turn else ("from", "value")
  more = {name: value for name, value in part.items() if name not in ("type", "tool_use_id", "content")}
  return {role: "tool", text: part.get("content"), "tool_call_id": part.get("tool_use_id"), **more}
