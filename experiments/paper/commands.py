"""The command of each step: its flags, how it is shown, what its results depend on."""

import functools
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Collection

from experiments.paper.settings import HOW_FAST, PASSED, PaperSettings
from experiments.paper.steps import Step
from in2core_jax.model import weights
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import run_folder

ROOT = pathlib.Path(__file__).resolve().parents[2]


FLAGS = ROOT / "experiments" / "flags"


MODEL = "content of --model"


_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def flagfiles(step: Step, s: PaperSettings) -> list[pathlib.Path]:
  """The flagfiles of the step's command."""
  return [FLAGS / step.flagfile, *([FLAGS / "paper-full.flags"] if s.preset == "full" else [])]


def given(step: Step, s: PaperSettings, named: Collection[str] = ()) -> list[str]:
  """Flags of this command that the step gets: which have another value than the default, or undo its flagfile's.

  Args:
    step: the step.
    s: the flags of this command.
    named: flags that were given to this command, with whatever value.
  """
  files = "\n".join(path.read_text(encoding="utf-8") for path in flagfiles(step, s))
  set_there = re.findall(r"^\s*--(\w+)", "\n".join([files, *step.changes, *step.full]), re.MULTILINE)
  value = lambda name: getattr(s, name)  # noqa: E731
  wanted = [name for name in PASSED if value(name) != getattr(Settings, name) or name in named and name in set_there]
  return [f"--{name}={value(name)}" for name in wanted]


def arguments(step: Step, s: PaperSettings, named: Collection[str] = ()) -> list[str]:
  """The step's flags, later ones win: its flagfile's, its changes, the full preset's, what was given to this command.

  {alpaca} and {runs} are not filled in. `--num_processes=1`: a job of several processes must not be waited for.
  """
  first, *full = [f"--flagfile={path}" for path in flagfiles(step, s)]
  last = [*given(step, s, named), "--num_processes=1", f"--run_dir={{runs}}/{step.name}"]
  return [first, *step.changes, *full, *(step.full if full else ()), *last]


def command(step: Step, s: PaperSettings, named: Collection[str] = ()) -> list[str]:
  """The step's command line."""
  alpaca, runs = os.path.abspath(s.alpaca), pathlib.Path(s.run_dir).absolute()
  filled = [_filled(argument, alpaca, runs) for argument in arguments(step, s, named)]
  return [sys.executable, "-P", "-m", f"experiments.{step.module}", *filled]


def shown_command(step: Step, s: PaperSettings, named: Collection[str] = ()) -> str:
  """The same for readers elsewhere: no path of this machine."""
  shown = []
  for argument in arguments(step, s, named):
    argument = argument.replace(f"--flagfile={FLAGS}/", "--flagfile=experiments/flags/")
    shown.append(without_folders(_filled(argument, "ALPACA.json", "runs/paper")))
  return f"python -m experiments.{step.module} {shlex.join(shown)}"


def _filled(argument: str, alpaca: object, runs: object) -> str:
  return argument.replace("{alpaca}", str(alpaca)).replace("{runs}", str(runs))


def without_folders(argument: str) -> str:
  """Absolute paths in a flag's value cut down to their last names."""
  return re.sub(r"(?<=[=:;,+])~?/(?:[^/:;,+]+/)*([^/:;,+]*)/?", r"\1", argument)


def model_content(spec: str) -> str:
  """A hash of the files of a model, which may be others tomorrow under the same name; empty where there are none.

  Of hf:DIR what names its weights in run folders (`weights.hf_hash`) and its tokenizer's files; of gguf:FILE all bytes.
  Not times of files: a copy is the same model.
  """
  while spec.startswith("truncated:"):
    spec = spec.removeprefix("truncated:").rpartition(":")[0]
  spec = weights.full_spec(spec)  # of a bare path
  kind, _, place = spec.partition(":")
  path = pathlib.Path(place).expanduser()
  if kind == "gguf" and path.is_file():
    return _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)
  if kind == "hf" and (path / "config.json").is_file():
    words = [file for pattern in _TOKENIZER for file in sorted(path.glob(pattern))]
    there = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.iterdir()))
    return run_folder.hash_of([_hf_hash(path, there), {file.name: run_folder.file_sha256(file) for file in words}])
  return ""  # embedded or random; or the experiment says what is missing


@functools.cache
def _hf_hash(path: pathlib.Path, there: tuple) -> str:
  """Of a folder, read once in a call while its files (names, sizes, times) are the same."""
  return weights.hf_hash(path)


@functools.cache
def _sha256(path: pathlib.Path, size: int, changed: int) -> str:
  """Of a large file, read once in a call although every step asks for it."""
  return run_folder.file_sha256(path)


def changes_of(
  before: dict[str, str], now: dict[str, str], finished: bool, also_ignored: Collection[str] = ()
) -> list[str]:
  """What is different, in words; nothing when both are the same.

  Of a finished step the place of --alpaca does not count, its content does; that of --model where both know it. One
  that is to go on may do so at another speed, but only with the same paths, which its run folder was made for.
  """
  if not before:
    return ["what was there was being removed"]
  ignored = (*(f"--{name}" for name in HOW_FAST), *(("--alpaca",) if finished else ()), *also_ignored)
  ignored += (MODEL,) if MODEL not in before or MODEL not in now else ()  # an older note, or the model is gone
  names = [name for name in (before | now) if before.get(name) != now.get(name) and name not in ignored]
  told = lambda name, facts: repr(facts[name]) if name in facts else "not given"  # noqa: E731
  return [
    f"{name} was {told(name, before)} and is {told(name, now)} now"
    if name.startswith("--") or name == "module"
    else f"the {name} changed"
    for name in names
  ]
