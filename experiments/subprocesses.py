"""Starting an experiment in a process of its own: its flagfile, its command, its environment."""

import os
import pathlib
import sys
from collections.abc import Mapping

from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import run_folder

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def command(name: str, settings: Settings, flagfile: pathlib.Path) -> list[str]:
  """Writes the flagfile and returns the command that runs the experiment with it, alone even inside a larger job.

  Args:
    name: of the module in experiments/.
    settings: its flags.
    flagfile: where they are written.
  """
  run_folder.write_flags(flagfile, settings.as_flags())
  # -P: a file named select.py in the current folder would shadow the standard library's.
  return [sys.executable, "-P", "-m", f"experiments.{name}", f"--flagfile={flagfile}", "--num_processes=1"]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
  """The variables of this process, with the project on PYTHONPATH.

  Args:
    changes: variables beside these; "" takes one away.
  """
  paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
  variables = os.environ | {"PYTHONPATH": paths} | (changes or {})
  return {name: value for name, value in variables.items() if value}
