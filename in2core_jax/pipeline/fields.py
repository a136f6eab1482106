"""What all settings share: fields that say what they are, checked values, identity, lines of a flagfile."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

from in2core_jax.errors import UserError
from in2core_jax.pipeline import ranges
from in2core_jax.pipeline.lists import listed


def setting(
  group: str,
  default: Any,
  text: str,
  *,
  choices: tuple[str, ...] | None = None,
  within: ranges.Range | None = None,
  each: ranges.Each | None = None,
  counts: bool = False,
  read: Callable[[str, Any], Any] | None = None,
  advanced: bool = False,
  repeats: bool = True,
  added: bool = False,
  gone: Mapping[str, str] | None = None,
  more: str = "",
):
  """A field of a settings class, with all that is known of it; a flag is made of it.

  Args:
    group: the stage or experiment that it belongs to.
    default: its value where none is given.
    text: one short sentence for readers.
    choices: the words that it may be.
    within: the range of a number.
    each: what the numbers of a list may be.
    counts: whether it is a word with a number in it, such as last:8.
    read: (name, value) -> the one spelling of the value; refuses what it cannot read.
    advanced: whether most users never set it.
    repeats: whether it is part of a flagfile that repeats the run.
    added: whether older run folders did not know it: it is no part of the identity while it has its default.
    gone: words of older versions -> what to use instead.
    more: what else there is to say, for those who ask.
  """
  kind = str if read else type(default)
  about = {"group": group, "help": text, "choices": choices, "kind": kind, "within": within, "each": each}
  more_about = {"counts": counts, "read": read, "advanced": advanced, "repeats": repeats, "added": added, "more": more}
  more_about["gone"] = gone or {}
  return dataclasses.field(default=default, metadata=about | more_about)


def changed(kind: type, name: str, default: Any):
  """The field of that name, with another default: for a command's own settings class."""
  return dataclasses.field(default=default, metadata=kind.__dataclass_fields__[name].metadata)


@functools.cache
def _defaults(kind: type) -> Mapping[str, Any]:
  """Name -> default in the class that defines it, whatever the classes of commands made of it."""
  found = {}
  for base in reversed(kind.__mro__):
    for field in dataclasses.fields(base) if dataclasses.is_dataclass(base) else ():
      found.setdefault(field.name, field.default)
  return found


@dataclasses.dataclass(frozen=True)
class Checked:
  """Base of settings: values are checked, and written in one spelling, when they are made."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      read = field.metadata["read"]
      if read:
        object.__setattr__(self, field.name, read(field.name, getattr(self, field.name)))
      value = getattr(self, field.name)
      if value in field.metadata["gone"]:
        raise UserError(f"{field.name}={value} is gone: use {field.metadata['gone'][value]}")
      ranges.check(field.name, value, field.metadata)
    self.check()

  def check(self) -> None:
    """Refuses values that contradict each other; raises UserError in the words of parameters."""

  @classmethod
  def of(cls, other: "Checked", *groups: str, **changes) -> Self:
    """These settings with the values that `other` has too, of some groups or of all, and changes."""
    shared = {field.name for field in dataclasses.fields(other) if not groups or field.metadata["group"] in groups}
    values = {field.name: getattr(other, field.name) for field in dataclasses.fields(cls) if field.name in shared}
    return cls(**(values | changes))

  def replace(self, **changes) -> Self:
    """A copy with other values."""
    return dataclasses.replace(self, **changes)

  def is_set(self, name: str) -> bool:
    """Whether a setting has another value than the default of its stage."""
    value, default = getattr(self, name), _defaults(type(self))[name]
    return value != default and not _is_nan(value, default)

  def has_own_default(self, name: str) -> bool:
    """Whether this command's default is another one than the stage's."""
    own, default = type(self).__dataclass_fields__[name].default, _defaults(type(self))[name]
    return own != default and not _is_nan(own, default)

  def as_flag(self, name: str) -> str:
    """A setting as a line of a flagfile."""
    value = getattr(self, name)
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"

  def as_flags(self) -> list[str]:
    """Lines of a flagfile: values other than the stage's, and those of which the command has a default of its own.

    A flagfile repeats a run: it removes none, is the same in every process, and does the work.
    """
    names = [field.name for field in dataclasses.fields(self) if field.metadata["repeats"]]
    return [self.as_flag(name) for name in names if self.is_set(name) or self.has_own_default(name)]

  def identity(self, *groups: str) -> dict[str, Any]:
    """The values of some groups, for the identity of a run folder (NaN as null).

    Settings that older run folders did not know are left out while they have their defaults, and those that have got a
    new name go by the old ones: such folders go on.
    """
    values = {
      field.name: None if _is_nan(value := getattr(self, field.name)) else value
      for field in dataclasses.fields(self)
      if field.metadata["group"] in groups and field.metadata["repeats"] and field.name != "run_dir"
      if not field.metadata["added"] or self.is_set(field.name)
    }
    return self.by_old_names(values)

  def by_old_names(self, values: dict[str, Any]) -> dict[str, Any]:
    """The same values under the names that older run folders have them by."""
    return values


def _is_nan(*values: Any) -> bool:
  return all(isinstance(value, float) and math.isnan(value) for value in values)


def refuse(s: Checked, names: Collection[str], does: str) -> None:
  """Refuses flags that a command would pass over, although they ask for other numbers or other files than it makes.

  Flagfiles are shared between stages: name only flags that contradict what the command does, not those that are merely
  of no use to it (a budget where nothing is selected, layers where there is a list of them).

  Args:
    s: the flags.
    names: of flags that must have the default of their stage; `name=word` refuses this word alone.
    does: what the command does instead, for the message.

  Raises:
    UserError: one of them is set.
  """
  for name in names:
    name, _, only = name.partition("=")
    if only in listed(str(getattr(s, name))) if only else s.is_set(name):
      raise UserError(f"{f'--{name}={only}' if only else s.as_flag(name)}: {does}; leave it out")


# ---- in whose words a message speaks ---------------------------------------------------------------------------------


def in_flags(message: str, names: Collection[str]) -> str:
  """A message of `Checked` as the command line says it: damping=2 becomes --damping=2."""
  return re.sub(rf"(?<![\w\-./])({'|'.join(names)})(?==)", r"--\1", message) if names else message


def in_parameters(message: str, kind: type[Checked]) -> str:
  """A message of the pipeline as Python says it: --damping=2 becomes damping=2, and --dedup becomes dedup=True."""
  fields = {field.name: field.metadata["kind"] for field in dataclasses.fields(kind)}

  def said(match: re.Match) -> str:
    flag, value = match[1], match[2]  # "--dedup is False there" has its value
    return f"{flag}=True" if fields[flag] is bool and not value else f"{flag}{value}"

  return re.sub(rf"(?<![\w\-])--({'|'.join(fields)})\b(=| is |)", said, message)
