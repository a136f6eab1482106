"""Lists in a text: words, shares, whole numbers."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from in2core_jax.errors import UserError


def listed(text: str, separator: str = ",") -> list[str]:
  """The parts of a list."""
  return [part.strip() for part in text.split(separator) if part.strip()]


def in_order(text: str, name: str, separator: str = ",") -> list[str]:
  """The parts of a list in which the place of a part counts; only the last one may be empty.

  Raises:
    UserError: one between others is empty: whatever follows would move up.
  """
  parts = [part.strip() for part in text.split(separator)]
  parts = parts if parts[-1] else parts[:-1]
  if not all(parts):
    raise UserError(f"--{name}={text}: entry {parts.index('') + 1} of this list is empty; write one for each")
  return parts


def words(
  text: str,
  name: str,
  known: Collection[str] = (),
  separator: str = ",",
  gone: Mapping[str, str] | None = None,
) -> list[str]:
  """Reads a list of different words.

  Args:
    text: the list.
    name: of the flag, for messages.
    known: the words that there are, if they are few.
    separator: between two words.
    gone: words of older versions -> what to use instead.

  Raises:
    UserError: one that is unknown, or given twice.
  """
  found = listed(text, separator)
  old = [word for word in found if word in (gone or {})]
  if old:
    raise UserError(f"--{name}={text}: {old[0]} is gone: use {gone[old[0]]}")
  wrong = [word for word in found if known and word not in known]
  if wrong:
    raise UserError(f"--{name}={text}: {_unknown(wrong[0], known)}; use some of {f'{separator} '.join(known)}")
  if len(set(found)) < len(found):
    raise UserError(f"--{name}={text}: a word is given twice")
  return found


def _unknown(word: str, known: Collection[str]) -> str:
  """Says of a word that there is none such, and which is most like it."""
  near = difflib.get_close_matches(word, [*known], 1, 0.65)
  return f"unknown {word!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def shares(text: str, name: str) -> tuple[float, ...]:
  """Reads a list of different shares in (0, 1], in growing order.

  Raises:
    UserError: names the flag and the text.
  """
  try:
    found = tuple(float(word) for word in listed(text))
  except ValueError:
    found = (0.0,)
  if not all(0 < share <= 1 for share in found) or len(set(found)) < len(found):
    raise UserError(f"--{name}={text} is not a list of different shares in (0, 1], such as 0.05,0.25,0.5")
  return tuple(sorted(found))


def integers(text: str, name: str) -> tuple[int, ...]:
  """Reads a comma-separated list of integers.

  Raises:
    UserError: names the flag and the text.
  """
  try:
    return tuple(int(part) for part in listed(text))
  except ValueError:
    raise UserError(f"--{name}={text} is not a list of whole numbers such as 0,1,2") from None


def some_of(allowed: tuple[str, ...], name: str, value: Any, always: tuple[str, ...] = ()) -> str:
  """Words of a list, each once and in one order, joined by commas.

  Args:
    allowed: the words.
    name: of the setting, for the message.
    value: a text or a list of words.
    always: words that are there whether or not they were given.

  Raises:
    UserError: another word.
  """
  given = listed(value) if isinstance(value, str) else list(value)
  unknown = [word for word in given if word not in allowed]
  if unknown:
    raise UserError(f"{name}={','.join(given)}: {_unknown(unknown[0], allowed)}; use some of {', '.join(allowed)}")
  return ",".join(word for word in allowed if word in (*given, *always))
