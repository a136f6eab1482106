"""What one setting may be: beyond it something overflows, never ends, or means nothing."""

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

from in2core_jax.errors import UserError, printable

_INT32 = 2**31 - 1
_SMALLEST = 1.2e-38  # of the numbers that float32 does not write as 0, or nearly so
_MOST_DIGITS = 9  # of a number in words such as last:8: what reads them knows their limits, but not such numbers


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`.

  Attributes:
    low: the smallest.
    high: the largest.
    open_low: whether `low` itself is not among them.
    open_high: whether `high` itself is not among them.
    may_be_unset: whether not-a-number stands for "not set".
  """

  low: float
  high: float
  open_low: bool = False
  open_high: bool = False
  may_be_unset: bool = False

  def holds(self, value: float) -> bool:
    """Whether a number is in the range; not-a-number is not, unless it means "not set"."""
    if value != value:
      return self.may_be_unset
    low = value > self.low if self.open_low else value >= self.low
    return low and (value < self.high if self.open_high else value <= self.high)

  def __str__(self) -> str:
    """In words."""
    low = f"above {self.low:.17g}" if self.open_low else f"at least {self.low:.17g}"
    return f"{low} and {'below' if self.open_high else 'at most'} {self.high:.17g}"


@dataclasses.dataclass(frozen=True)
class Each:
  """A list of numbers in a text.

  Attributes:
    kind: int or float.
    allowed: the range of each.
    separator: what stands between them.
    distinct: whether none may be given twice.
  """

  kind: type
  allowed: Range
  separator: str = ","
  distinct: bool = False

  def check(self, name: str, text: str) -> None:
    """Raises UserError where a part is no such number."""
    parts = [part.strip() for part in text.split(self.separator) if part.strip()]
    wrong = next((part for part in parts if not self._holds(part)), None)
    if wrong is not None:
      what = "whole numbers" if self.kind is int else "numbers"
      raise UserError(f"{name}={_cut(text)}: {_cut(wrong)!r} is wrong in this list of {what}, each {self.allowed}")
    if self.distinct and len(set(map(self.kind, parts))) < len(parts):
      raise UserError(f"{name}={_cut(text)}: a number is given twice")

  def _holds(self, text: str) -> bool:
    try:
      value = self.kind(text)
    except ValueError:  # int() also refuses thousands of digits
      return False
    return self.allowed.holds(value) and math.isfinite(value)


COUNT, LIMIT = Range(1, _INT32), Range(0, _INT32)
SHARE, STEPS = Range(0, 1, open_low=True), Range(1, 10**6)
POSITIVE = Range(0, 1e9, open_low=True)
SEED = Range(0, 2**32 - 1)  # JAX's keys take 32 bits: a larger seed would be another name for a smaller one's numbers
SEEDS = Each(int, SEED, distinct=True)


def check(name: str, value: Any, meta: Mapping[str, Any]) -> None:
  """Refuses a value of another type, or out of its range.

  Args:
    name: of the setting.
    value: its value.
    meta: what its field says of it (`fields.setting`).

  Raises:
    UserError: names the setting, its value and what it may be.
  """
  kind, within = meta["kind"], meta["within"]
  words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
  types = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str}[kind]
  if not meta["read"] and (not isinstance(value, types) or isinstance(value, bool) and kind is not bool):
    raise UserError(f"{name}={value!r} must be {words}")
  if isinstance(value, str):
    _check_text(name, value, meta)
  elif within and not within.holds(value):
    raise UserError(f"{name}={value} must be a number that is {within}")
  elif kind is float and 0 < abs(value) < _SMALLEST:
    raise UserError(f"{name}={value} is 0 in float32, in which all is computed; give 0 or at least {_SMALLEST}")


def _check_text(name: str, value: str, meta: Mapping[str, Any]) -> None:
  """Of `check`, what texts may be."""
  if "\0" in value:
    raise UserError(f"{name}={printable(value)} holds a NUL character, which no path and no text has")
  if meta["choices"] and value not in meta["choices"]:
    raise UserError(f"{name}={_cut(value)} is unknown; use one of {', '.join(filter(None, meta['choices']))}")
  if meta["each"]:
    meta["each"].check(name, value)
  if meta["counts"] and re.search(rf"\d{{{_MOST_DIGITS + 1}}}", value):
    raise UserError(f"{name}={_cut(value)} holds a number of more than {_MOST_DIGITS} digits")


def _cut(text: str, most: int = 80) -> str:
  return text if len(text) <= most else f"{text[:most]}..."
