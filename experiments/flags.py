"""The absl flags of a command, made of its settings class; and `Settings` made of what was given.

A command has the flags of its own class, in order of use. Those of other commands are known too, hidden from --help:
one flagfile drives the whole chain. Old names are read, told, and become the new ones before anything is made of them.
"""

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from absl import flags

from experiments import settings as commands
from experiments.ablate_layers.settings import AblateLayersSettings
from experiments.benchmark.settings import BenchmarkSettings
from experiments.coverage.settings import CoverageSettings
from experiments.fidelity.settings import FidelitySettings
from experiments.help_text import HIDDEN, SHOWN
from experiments.paper.settings import PaperSettings
from experiments.recommend.settings import CalibrationSettings, RecommendFlags
from experiments.solvers.settings import SolversSettings
from experiments.study.settings import StudySettings
from experiments.targets.settings import TargetsSettings
from experiments.transfer.settings import TransferSettings
from in2core_jax.errors import UserError
from in2core_jax.pipeline import ranges, settings
from in2core_jax.pipeline.fields import in_flags
from in2core_jax.pipeline.settings import OLD_BUDGETS, OLD_WRITES, Settings
from in2core_jax.selection.inputs import Budget

log = logging.getLogger(__name__)

GROUPS = settings.GROUPS | {
  "recommend": "rules tried on your data",
  "check": "self-check before a long run",
  "index": "index of a large pool",
  "large_pools": "rules on a million rows",
  "solvers": "comparison of the solvers",
  "study": "rules of selection, retrained",
  "targets": "what rules find in a mixed pool",
  "paper": "all experiments in one command",
  "fidelity": "whether scores predict what retraining gives",
  "transfer": "one model selects, another one is trained",
  "benchmark": "seconds, memory, compilation",
  "ablate_layers": "how many layers are enough",
  "coverage": "which test points the training set does not cover",
  "kill_test": "runs, killed and started again",
  "export": "a model for other programs",
}
OTHERS = (
  *(commands.CheckFlags, commands.IndexFlags, commands.LargePoolsFlags, commands.KillTestFlags, SolversSettings),
  *(StudySettings, TargetsSettings, PaperSettings),
  *(FidelitySettings, TransferSettings, BenchmarkSettings, AblateLayersSettings, CoverageSettings),
  *(commands.ExportFlags, RecommendFlags, CalibrationSettings),
)
_HOME = ("run_dir", "checkpoint", "select_runs", "choices_of")  # paths: what the shell leaves of ~ after a comma or =

S = TypeVar("S", bound=Settings)


def every_field() -> list[dataclasses.Field]:
  """The flags of all commands, each once, by group in the order of `GROUPS`."""
  found = {field.name: field for kind in (Settings, *OTHERS) for field in dataclasses.fields(kind)}
  found |= {field.name: field for field in dataclasses.fields(Settings)}  # with the defaults of their stages
  return sorted(found.values(), key=lambda field: list(GROUPS).index(field.metadata["group"]))


def names() -> list[str]:
  """The names of all flags, old ones too."""
  return [*(field.name for field in every_field()), *OLD_BUDGETS, *OLD_WRITES.values(), "drop_copies"]


# ---- definition ------------------------------------------------------------------------------------------------------


def define(kind: type[Settings] = Settings, into: flags.FlagValues = flags.FLAGS) -> None:
  """Makes absl flags of a settings class, under the titles that --help shows; then those of other commands.

  Args:
    kind: the settings class.
    into: where they are kept; those of the process unless told.
  """
  own = {field.name: field for field in dataclasses.fields(kind)}
  for title, fields in _sections(kind):
    for field in fields:
      _define(field, title, into)
      del own[field.name]
  known = {field.name for field in dataclasses.fields(kind)}
  foreign = {field.name: field for field in every_field() if field.name not in known}
  for field in sorted((own | foreign).values(), key=lambda field: list(GROUPS).index(field.metadata["group"])):
    group = field.metadata["group"]
    _define(field, f"{HIDDEN}{GROUPS[group] if group in settings.GROUPS else f'{group}, {GROUPS[group]}'}", into)
  title = f"{HIDDEN}old names"
  for name, default in OLD_BUDGETS.items():
    make = flags.DEFINE_float if isinstance(default, float) else flags.DEFINE_integer
    make(name, None, "Now --budget.", flag_values=into, module_name=title)
  for word, name in OLD_WRITES.items():
    flags.DEFINE_bool(name, None, f"Now --write={word}.", flag_values=into, module_name=title)
  flags.DEFINE_bool("drop_copies", None, "Now --dedup.", flag_values=into, module_name=title)


def _sections(kind: type[Settings]) -> Iterator[tuple[str, list[dataclasses.Field]]]:
  """Titles and flags that --help shows: what the class says in `shown`, groups or names; advanced ones last.

  A class that does not say has its own group first, and all stages.
  """
  fields = dataclasses.fields(kind)
  groups = {field.metadata["group"] for field in fields}
  own = [group for group in GROUPS if group in groups and group not in settings.GROUPS]
  shown = getattr(kind, "shown", (*own, *settings.GROUPS))
  members: dict[str, list[dataclasses.Field]] = {}
  advanced: list[dataclasses.Field] = []
  for word in shown:
    for field in (field for field in fields if word == (field.metadata["group"] if word in groups else field.name)):
      if any(field in section for section in (*members.values(), advanced)):
        continue
      if field.metadata["advanced"] and word != field.name:
        advanced.append(field)
      else:
        members.setdefault(field.metadata["group"], []).append(field)
  yield from ((f"{SHOWN}{GROUPS[group]}", fields) for group, fields in members.items())
  if advanced:
    yield f"{SHOWN}advanced", advanced


class _Words(flags.EnumParser):
  """The words that a flag may be; says which one is like a wrong one, and what to use in place of one that is gone."""

  def __init__(self, words: list[str], gone: Mapping[str, str]):
    super().__init__(words)
    self._gone = gone

  def parse(self, argument: str) -> str:
    """The word; ValueError for any other."""
    if argument in self._gone:
      raise ValueError(f"it is gone: use {self._gone[argument]}")
    near = difflib.get_close_matches(argument, self.enum_values, 1, 0.65)
    if near and argument not in self.enum_values:
      raise ValueError(f"did you mean {near[0]}? It is one of {', '.join(self.enum_values)}")
    return super().parse(argument)


def _define(field: dataclasses.Field, title: str, into: flags.FlagValues) -> None:
  meta = field.metadata
  text = f"{meta['help']}\n{meta['more']}".strip()
  if meta["choices"]:
    flags.DEFINE_enum(field.name, field.default, list(meta["choices"]), text, flag_values=into, module_name=title)
    into[field.name].parser = _Words(list(meta["choices"]), meta["gone"])
    return
  make = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: _define_float, str: flags.DEFINE_string}
  default = str(field.default) if meta["kind"] is str else field.default
  make[meta["kind"]](field.name, default, text, flag_values=into, module_name=title)


class _FloatParser(flags.FloatParser):
  """Reads numbers, but none that becomes another one: 1e-400 is 0 for a computer."""

  def convert(self, argument: Any) -> float:
    """The number; ValueError, which absl tells with the flag's name, where there is none."""
    value = super().convert(argument)
    if value == 0 and re.search("[1-9]", str(argument).lower().partition("e")[0]):
      raise ValueError("is too small for a number of this computer; give 0 or a larger one")
    return value


def _define_float(name: str, default: float, text: str, flag_values: flags.FlagValues, module_name: str) -> None:
  flags.DEFINE_float(name, default, text, flag_values=flag_values, module_name=module_name)
  flag_values[name].parser = _FloatParser()


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(kind: type[S] = Settings, tells_costs: bool = False, given: flags.FlagValues = flags.FLAGS) -> S:
  """The parsed flags as settings, which check themselves.

  Args:
    kind: the settings class that the flags were made of.
    tells_costs: whether the command knows --dry_run.
    given: the parsed flags; those of the process unless told.

  Raises:
    UserError: a value that is none, old and new names that disagree, or --dry_run of a command that would do its work
      nevertheless. It names flags.
  """
  values = {field.name: given[field.name].value for field in dataclasses.fields(kind)}
  values |= _budget(given) | _write(given) | _dedup(given)
  for name in set(_HOME) & set(values):
    values[name] = ",".join(os.path.expanduser(path.strip()) for path in values[name].split(","))
  if values["dry_run"] and not tells_costs:
    known = "finetune, index, select, evaluate, demo and recommend"
    raise UserError(f"--dry_run: {known} can estimate their cost, this command cannot")
  try:
    return kind(**values)
  except UserError as error:
    raise UserError(in_flags(str(error), list(values))) from error


class Parser:
  """Reads command lines apart from the flags of this process, as often as it is called."""

  def __init__(self, kind: type[Settings] = Settings, tells_costs: bool = False):
    """Makes the flags of a command with that settings class; arguments as in `read`."""
    self._kind, self._tells_costs, self.flags = kind, tells_costs, flags.FlagValues()
    define(kind, self.flags)
    flags.DEFINE_string("flagfile", "", "absl's own", flag_values=self.flags, module_name="absl.flags")

  def __call__(self, *line: str) -> Settings:
    """The settings that a command line gives.

    Raises:
      UserError: as `read` does.
      absl.flags.Error: a flag that there is not, or no value of its kind.
    """
    self.flags.unparse_flags()
    for name in self.flags:
      self.flags[name].unparse()
    rest = self.flags(["command", *line])[1:]
    if rest:
      raise UserError(f"{rest[0]!r} is no flag")
    return read(self._kind, self._tells_costs, self.flags)


# ---- old names -------------------------------------------------------------------------------------------------------

_OLD_RANGES = {"fraction": ranges.SHARE, "num_examples": ranges.LIMIT, "token_budget": ranges.Range(0, 2**53)}


def _given(parsed: flags.FlagValues, *names: str) -> dict[str, Any]:
  """Those of the flags that were given, with their values."""
  return {name: parsed[name].value for name in names if parsed[name].present}


def _tell(old: str, new: str) -> None:
  log.info("--%s is now %s; the old name works for one more release", old, new)


def _refuse_two(old: str, new: str) -> None:
  raise UserError(f"{old} and {new} disagree: give {new.partition('=')[0]} alone")


def _budget(parsed: flags.FlagValues) -> dict[str, str]:
  """--budget from the three flags that it was: a number of examples or tokens goes before a share."""
  old, new = _given(parsed, *OLD_BUDGETS), _given(parsed, "budget")
  for name, value in old.items():
    if not _OLD_RANGES[name].holds(value):
      raise UserError(f"--{name}={value} must be a number that is {_OLD_RANGES[name]}; it is now --budget")
  counts = {name: value for name, value in old.items() if name != "fraction" and value}
  if len(counts) > 1:
    raise UserError(f"{' and '.join(f'--{name}={value}' for name, value in counts.items())}: give one --budget")
  meant = counts or {name: value for name, value in old.items() if name == "fraction"}
  if not meant:
    return {}
  ((name, value),) = meant.items()
  budget = str(Budget(**meant))
  if new and str(Budget.read(new["budget"])) != budget:
    _refuse_two(f"--{name}={value}", f"--budget={new['budget']}")
  _tell(name, f"--budget={budget}")
  return {"budget": budget}


def _write(parsed: flags.FlagValues) -> dict[str, str]:
  """--write from the four flags that it was."""
  old, new = _given(parsed, *OLD_WRITES.values()), _given(parsed, "write")
  words = settings.listed(new.get("write", ""))
  for word, name in OLD_WRITES.items():
    if name in old and new and old[name] != (word in words):
      _refuse_two(f"--{name}={str(old[name]).lower()}", f"--write={new['write']}")
    if name in old:
      _tell(name, f"--write={word}")
  return {} if new else {"write": ",".join(word for word in OLD_WRITES if old.get(OLD_WRITES[word]))}


def _dedup(parsed: flags.FlagValues) -> dict[str, bool]:
  """--dedup from its old name."""
  old, new = _given(parsed, "drop_copies"), _given(parsed, "dedup")
  if not old:
    return {}
  (value,) = old.values()
  if new and new["dedup"] != value:
    _refuse_two(f"--drop_copies={str(value).lower()}", f"--dedup={str(new['dedup']).lower()}")
  _tell("drop_copies", "--dedup")
  return {"dedup": value}
