"""What is published of a finished step."""

import logging
import pathlib
import re

from experiments.paper.commands import (
  ROOT,
  without_folders,
)
from experiments.paper.notes import folder_of, read_note
from experiments.paper.settings import PaperSettings
from experiments.paper.steps import Step
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)


_MOST_BYTES = 1_000_000  # of a published file


_FACTS = "run.json"  # beside a published table: what the index says of it


def target_of(s: PaperSettings, step: Step) -> pathlib.Path:
  """The folder that a step's results are published in."""
  return pathlib.Path(s.results_dir) / s.preset / step.name


def published_facts(s: PaperSettings, step: Step) -> dict:
  path = target_of(s, step) / _FACTS
  return run_folder.read_json(path) if path.exists() else {}


def publish(step: Step, s: PaperSettings) -> None:
  """Copies a finished step's tables and pictures; the Markdown gets command, machine, date and commit at its end."""
  if not step.table:
    return
  folder, target, note = folder_of(s, step.name), target_of(s, step), read_note(s, step.name)
  where = ", ".join(filter(None, [note["devices"], note["machine"]]))
  facts = {name: note[name] for name in ("date", "commit", "seconds")} | {"machine": where, "command": note["shown"]}
  text = (folder / f"{step.table}.md").read_text(encoding="utf-8")
  text = re.sub(r"\]\((plots/[\w.-]+)\.png\)", r"](\1.svg)", text)
  text += f"\n---\n\n`{note['shown']}`, {where}, {note['date']}, commit {note['commit']}, "
  contents = {f"{step.table}.md": f"{text}{note['seconds']:,.0f} seconds.\n"}
  tables = [path for kind in ("csv", "tex") for path in sorted(folder.glob(f"*.{kind}"))]
  for path in [*tables, *sorted((folder / "plots").glob("*.svg"))]:
    size = path.stat().st_size
    if size <= _MOST_BYTES:
      contents[path.relative_to(folder).as_posix()] = path.read_text(encoding="utf-8")
    else:
      log.warning("%s is not published: %s bytes, more than %s", path, f"{size:,}", f"{_MOST_BYTES:,}")
  for name in set(published_facts(s, step).get("files", ())) - set(contents):  # of an earlier run with other tables
    (target / name).unlink(missing_ok=True)
  for name, content in contents.items():
    run_folder.write_text(target / name, _without_places(content, s, note))
  run_folder.write_json(target / _FACTS, facts | {"files": sorted(contents)})


def _without_places(text: str, s: PaperSettings, note: dict) -> str:
  """Replaces the paths of this machine that the experiments know of."""
  places = {
    str(pathlib.Path(s.run_dir).absolute()): "runs/paper",
    note["command"].get("--alpaca", ""): "ALPACA.json",
    f"{ROOT}/": "",
    s.model if "/" in s.model else "": without_folders(s.model),
  }
  for place in sorted(filter(None, places), key=len, reverse=True):
    text = text.replace(place, places[place])
  return text
