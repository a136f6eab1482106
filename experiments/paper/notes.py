"""The note beside each step's run folder."""

import logging
import pathlib

from experiments.paper.settings import PaperSettings
from in2core_jax.errors import UserError
from in2core_jax.runs import files, run_folder

log = logging.getLogger(__name__)


def folder_of(s: PaperSettings, name: str) -> pathlib.Path:
  """The run folder of a step."""
  return pathlib.Path(s.run_dir) / name


def read_note(s: PaperSettings, name: str) -> dict:
  """What is known of a step's run; nothing of one that was never started.

  Entries: command (`facts_of`), shown (`shown_command`), seconds over all starts, finished, date, commit, machine,
  devices.
  """
  path = folder_of(s, f"{name}.json")
  if not path.exists():
    return {}
  try:
    return files.unsealed(run_folder.read_json(path), str(path))[0]
  except UserError as error:
    log.warning("%s; %s counts as not finished and goes on", error, name)
    return {}


def write_note(s: PaperSettings, name: str, note: dict) -> None:
  """Keeps what is known of a step's run, with a checksum."""
  run_folder.write_json(folder_of(s, f"{name}.json"), files.sealed(note))
