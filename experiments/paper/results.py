"""What is published of finished experiments."""

import logging
import pathlib
import re

from experiments.paper.job import ROOT, Job, read_note, without_folders
from in2core_jax.report import table_text
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

_MOST_BYTES = 1_000_000  # of a published file
_FACTS = "run.json"  # beside a published table: what the index says of it


def target_of(job: Job) -> pathlib.Path:
  """The folder that a job's results are published in."""
  return pathlib.Path(job.settings.results_dir) / job.settings.preset / job.step.name


def published_facts(job: Job) -> dict:
  """What the index says of a published table; nothing of none."""
  path = target_of(job) / _FACTS
  return run_folder.read_json(path) if path.exists() else {}


def publish(job: Job) -> None:
  """Copies a finished step's tables and pictures; the Markdown gets command, machine, date and commit at its end."""
  table = job.step.table
  if not table:
    return
  folder, target, note = job.folder, target_of(job), read_note(job.folder)
  where = ", ".join(filter(None, [note["devices"], note["machine"]]))
  facts = {name: note[name] for name in ("date", "commit", "seconds")} | {"machine": where, "command": note["shown"]}
  text = (folder / f"{table}.md").read_text(encoding="utf-8")
  text = re.sub(r"\]\((plots/[\w.-]+)\.png\)", r"](\1.svg)", text)
  text += f"\n---\n\n`{note['shown']}`, {where}, {note['date']}, commit {note['commit']}, "
  contents = {f"{table}.md": f"{text}{note['seconds']:,.0f} seconds.\n"}
  tables = [path for kind in ("csv", "tex") for path in sorted(folder.glob(f"*.{kind}"))]
  for path in [*tables, *sorted((folder / "plots").glob("*.svg"))]:
    size = path.stat().st_size
    if size <= _MOST_BYTES:
      contents[path.relative_to(folder).as_posix()] = path.read_text(encoding="utf-8")
    else:
      log.warning("%s is not published: %s bytes, more than %s", path, f"{size:,}", f"{_MOST_BYTES:,}")
  for name in set(published_facts(job).get("files", ())) - set(contents):  # of an earlier run with other tables
    (target / name).unlink(missing_ok=True)
  for name, content in contents.items():
    run_folder.write_text(target / name, _without_places(content, job, note))
  run_folder.write_json(target / _FACTS, facts | {"files": sorted(contents)})


def _without_places(text: str, job: Job, note: dict) -> str:
  """Replaces the paths of this machine that the experiments know of."""
  model = job.settings.model
  alpaca = note.get("alpaca") or note.get("command", {}).get("--alpaca", "")  # the latter of an older version
  places = {str(job.folder.parent): "runs/paper", alpaca: "ALPACA.json", f"{ROOT}/": ""}
  places |= {model if "/" in model else "": without_folders(model)}
  for place in sorted(filter(None, places), key=len, reverse=True):
    text = text.replace(place, places[place])
  return text


def write_index(jobs: list[Job]) -> None:
  """README.md of the results of all steps: what there is, of when, from where, and what it took."""
  rows, older, total, plain = [], [], 0.0, 0.0
  for job in jobs:
    step, note = job.step, read_note(job.folder)
    facts = published_facts(job) if step.table else note
    seconds = facts.get("seconds") or 0.0
    total, plain = total + seconds, plain + (0.0 if step.needs_alpaca else seconds)
    if not step.table or not (target_of(job) / step.marker).exists():
      continue
    page = f"{step.name}/{step.table}.md"
    row = {"experiment": step.name, "shows": step.about, "table": table_text.Link(page, page)}
    row |= {name: facts.get(name, "") for name in ("date", "commit")}
    rows.append(row | {"seconds": f"{seconds:,.0f}" if seconds else "", "machine": facts.get("machine", "")})
    older += [step.name] if note and not note["finished"] else []
  columns = ("experiment", "shows", "table", "date", "commit", "seconds", "machine")
  preset = jobs[0].settings.preset
  lines = [f"# Results, preset {preset}", "", table_text.markdown_table(rows, columns).rstrip(), ""]
  lines += [f"{total:,.0f} seconds in all, {plain:,.0f} of them without --alpaca.", ""]
  if older:
    lines += [f"Of an earlier run, the last one is not finished or failed: {', '.join(older)}.", ""]
  lines += ["Made by `./run.sh paper`; the command, machine, date and commit stand at the end of each page."]
  run_folder.write_text(pathlib.Path(jobs[0].settings.results_dir) / preset / "README.md", "\n".join(lines) + "\n")
