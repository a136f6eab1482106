"""JSON as a strict reader reads it: what Python's own reader lets pass or cannot take becomes one sentence.

A key that stands twice in an object would lose the first value; a value nested without end would end in a
RecursionError here or in whatever reads it next. NaN is how tables write a missing value, so it is null.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 100  # lists and objects inside each other; a conversation with tool definitions has about 20
_MAX_DIGITS = 4000  # of a whole number: Python refuses to read more than 4300
_NESTED = f"lists or objects stand more than {MAX_DEPTH} deep in each other"


class Refused(ValueError):
  """Text that is JSON by its form, or nearly so, and is not read; the message says why.

  Attributes:
    position: of broken JSON.
    reason: the message without that place.
  """

  def __init__(self, message: str, position: int | None = None, reason: str | None = None):
    super().__init__(message)
    self.position = position
    self.reason = message if reason is None else reason


class Decoder:
  """Reads one JSON value after another."""

  def __init__(self):
    self._problems: list[str] = []
    self._decoder = json.JSONDecoder(
      object_pairs_hook=self._object, parse_int=self._whole_number, parse_constant=self._constant
    )

  def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      keys = [key for key, _ in pairs]
      twice = next(key for key in found if keys.count(key) > 1)
      self._problems.append(f"the key {twice!r} stands twice in one object, so that one of its values would be lost")
    return found

  def _whole_number(self, text: str) -> int | None:
    if len(text) <= _MAX_DIGITS:
      return int(text)
    self._problems.append(f"a whole number has {len(text):,} digits")
    return None

  @staticmethod
  def _constant(text: str) -> float | None:
    return {"NaN": None, "Infinity": math.inf}.get(text, -math.inf)

  def value_at(self, text: str, at: int) -> tuple[Any, int, str | None]:
    """Reads the value that starts at a character.

    Returns:
      (the value, the end of its text, why it must not be used or None).

    Raises:
      Refused: broken JSON, or a value that is nested too deeply for its end to be found.
    """
    self._problems = []
    try:
      value, end = self._decoder.raw_decode(text, at)
    except RecursionError:
      raise Refused(_NESTED, at) from None
    except json.JSONDecodeError as error:
      raise Refused(str(error), error.pos, error.msg) from None
    except StopIteration as error:  # raw_decode's way to say that there is no value
      raise Refused("Expecting value", error.value) from None
    if not self._problems and _may_be_deep(text, at, end) and depth(value) > MAX_DEPTH:
      self._problems.append(_NESTED)
    return value, end, self._problems[0] if self._problems else None

  def whole(self, text: str) -> Any:
    """Reads a text that is one value.

    Raises:
      Refused: it is not, or must not be used.
    """
    start = len(text) - len(text.lstrip(" \t\r\n"))
    value, end, problem = self.value_at(text, start)
    if text[end:].strip(" \t\r\n"):
      raise Refused(f"Extra data: line 1 column {end + 1} (char {end})", end)
    if problem:
      raise Refused(problem)
    return value


def _may_be_deep(text: str, start: int, end: int) -> bool:
  return text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH


def depth(value: Any) -> int:
  """How many lists and objects stand in each other, at most."""
  level, found = [value], 0
  while level := [item for item in level if isinstance(item, list | dict)]:
    level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
    found += 1
  return found
