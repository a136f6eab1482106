"""Every flag of every stage, in one table: one flagfile drives the whole chain (absl refuses flags it does not know).

A flag is a field of `Settings`; `define()` makes absl flags of them, grouped by stage in `--help`, and `read()` gives a
frozen `Settings` back. Stages take `Settings`, so that one script can run a stage twice with different ones.
"""

import dataclasses
import datetime
import os
import re
from typing import Any

from absl import flags

from in2core_jax.errors import UserError, printable
from in2core_jax.pipeline import ranges
from in2core_jax.pipeline.settings import GROUPS, Settings


def define(**defaults: Any) -> None:
  """Makes absl flags of `Settings`; `defaults` override those of the table for one entry point."""
  for field in dataclasses.fields(Settings):
    meta = field.metadata
    default = defaults.get(field.name, field.default)
    module = f"{meta['group']}: {GROUPS[meta['group']]}"
    if meta["choices"]:
      flags.DEFINE_enum(field.name, default, list(meta["choices"]), meta["help"], module_name=module)
    else:
      make = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
      default = str(default) if meta["kind"] is str else default
      make[meta["kind"]](field.name, default, meta["help"], module_name=module)


class _Read(Settings):
  """Settings that were read from flags."""

  def has_own_default(self, name: str) -> bool:
    return name in flags.FLAGS and str(flags.FLAGS[name].default) != str(getattr(Settings, name))


def _batch_tokens(text: str) -> int | str:
  """Reads --batch_tokens: "auto" or a whole number."""
  if text == "auto":
    return text
  if not re.fullmatch(r"\s*\d{1,18}\s*", text) or int(text) < 1:
    raise UserError(f"--batch_tokens={text} is neither auto nor a whole number of at least 1, such as 2048")
  return int(text)


def _check_date(text: str) -> None:
  try:
    datetime.date.fromisoformat(text)
  except ValueError:
    raise UserError(f"--template_date={text} is no day, such as 2024-07-26") from None


def read(tells_costs: bool = False) -> Settings:
  """The parsed flags.

  Args:
    tells_costs: whether the command knows --dry_run.

  Raises:
    UserError: a value out of its range, or --dry_run of a command that would do its work nevertheless.
  """
  settings = _Read(**{field.name: getattr(flags.FLAGS, field.name) for field in dataclasses.fields(Settings)})
  at_home = {name: os.path.expanduser(getattr(settings, name)) for name in ("run_dir", "checkpoint")}
  folders = [os.path.expanduser(folder.strip()) for folder in settings.select_runs.split(",")]
  settings = settings.replace(select_runs=",".join(folders), **at_home)  # what the shell leaves of ~ after a comma or =
  settings = settings.replace(batch_tokens=_batch_tokens(settings.batch_tokens))
  for name, value in dataclasses.asdict(settings).items():
    if isinstance(value, str) and "\0" in value:
      raise UserError(f"--{name}={printable(value)} holds a NUL character, which no path and no text has")
  _check_date(settings.template_date)
  if settings.dry_run and not tells_costs:
    raise UserError("--dry_run: finetune, select, evaluate and demo can tell what they would take, this command cannot")
  if settings.hardware and not settings.dry_run:
    raise UserError(f"--hardware={settings.hardware} is for --dry_run: a run takes the devices that are here (--mesh)")
  if not settings.train_data.strip():
    raise UserError("--train_data is empty: give chatterbot, file:FILE.jsonl or another source (--help lists them)")
  ranges.check(dataclasses.asdict(settings))
  return settings
