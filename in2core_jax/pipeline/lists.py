"""Lists in a text: words, shares, whole numbers."""

from collections.abc import Collection
from typing import Any

from in2core_jax.errors import UserError


def listed(text: str, separator: str = ",") -> list[str]:
  """The parts of a list."""
  return [part.strip() for part in text.split(separator) if part.strip()]


def words(text: str, name: str, known: Collection[str] = (), separator: str = ",") -> list[str]:
  """Reads a list of different words; `known`: the ones that there are, if they are few.

  Raises:
    UserError: one that is unknown, or given twice.
  """
  found = listed(text, separator)
  wrong = [word for word in found if known and word not in known]
  if wrong:
    raise UserError(f"--{name}={text}: unknown {wrong[0]!r}; use some of {f'{separator} '.join(known)}")
  if len(set(found)) < len(found):
    raise UserError(f"--{name}={text}: a word is given twice")
  return found


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
    raise UserError(f"{name}={','.join(given)}: unknown {unknown[0]!r}; use some of {', '.join(allowed)}")
  return ",".join(word for word in allowed if word in (*given, *always))
