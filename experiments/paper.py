"""All experiments of the paper in one command, each from its flagfile; tables and pictures land in --results_dir.

./run.sh paper                                          2 cores, the embedded models and corpus
./run.sh paper --alpaca=alpaca.json                     also on Alpaca, and on a pool that mixes both
./run.sh paper --preset=full --mesh=data:8              an accelerator: all data, all layers

Every experiment is a run folder of its own in --run_dir and goes on where it was stopped; a finished one is not run
again. The next experiment starts when the one before has ended, however it ended; one that fails is told at the end.
"""

import dataclasses
import datetime
import logging
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

from experiments import children, cli, flags
from experiments.flags import Settings, listed
from in2core_jax import artifacts, report
from in2core_jax.errors import UserError

log = logging.getLogger(__name__)

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_FLAGS = _ROOT / "experiments" / "flags"
_MOST_BYTES = 1_000_000  # of a published file


@dataclasses.dataclass(frozen=True)
class Step:
  """One experiment.

  Attributes:
    name: of its folder, and in --only.
    module: in experiments/.
    table: name of its files without ending; the .md marks it as finished.
    flagfile: in experiments/flags/.
    about: what it shows, in a line.
    changes: flags that come after the flagfile's; {alpaca} stands for the path of --alpaca, {runs} for --run_dir.
  """

  name: str
  module: str
  table: str
  flagfile: str
  about: str
  changes: tuple[str, ...] = ()

  @property
  def needs_alpaca(self) -> bool:
    """Whether it reads the file of --alpaca."""
    return any("{alpaca}" in change for change in self.changes)


STEPS = (
  Step("scores", "select", "report", "sweep.flags", "scores of the training examples, who is kept"),
  Step(
    "sweep",
    "evaluate",
    "evaluation",
    "sweep.flags",
    "how much data is enough, by policy, at equal steps and at equal epochs",
    ("--select_runs={runs}/scores",),
  ),
  Step("study-chatterbot", "study", "study", "study.flags", "rules of selection on a redundant corpus"),
  Step("layers", "ablate_layers", "ablate_layers", "ablate_layers.flags", "how many layers are enough"),
  Step("fidelity", "fidelity", "fidelity", "fidelity.flags", "do scores foretell what retraining gives (LDS)"),
  Step("coverage", "coverage", "coverage", "coverage.flags", "which test points the training set does not cover"),
  Step(
    "transfer",
    "transfer",
    "transfer",
    "transfer.flags",
    "one model selects, another one is trained",
    ("--score_models=smollm2;truncated:smollm2:15;gemma3",),
  ),
  Step(
    "study-alpaca",
    "study",
    "study",
    "study.flags",
    "the same on Alpaca",
    ("--train_data=jsonl:{alpaca}", "--max_length=128"),
  ),
  Step(
    "study-mixed",
    "study",
    "study",
    "study.flags",
    "the same on a mixed pool with an evaluation set of one topic",
    ("--train_data=chatterbot:trivia,ai,coding,psychology,emotion,literature+jsonl:{alpaca}", "--eval_topics=trivia"),
  ),
)


def steps_of(s: Settings) -> list[Step]:
  """The steps that the flags ask for, in order.

  Raises:
    UserError: --only names a step that there is not, or one that needs --alpaca.
  """
  known = {step.name: step for step in STEPS}
  wanted = listed(s.only) or [step.name for step in STEPS if s.alpaca or not step.needs_alpaca]
  for name in wanted:
    if name not in known:
      raise UserError(f"--only={s.only}: there is no {name!r}; use {', '.join(known)}")
    if known[name].needs_alpaca and not s.alpaca:
      raise UserError(f"--only={s.only}: {name} needs --alpaca, the path of an Alpaca JSON file")
  if s.alpaca and not pathlib.Path(s.alpaca).is_file():
    raise UserError(f"--alpaca={s.alpaca}: there is no such file; give a JSON file with instruction, input, output")
  return [known[name] for name in wanted]


def command(step: Step, s: Settings) -> list[str]:
  """The step's command line; what is given here (where, how fast, the model) wins over its flagfile."""
  full = [f"--flagfile={_FLAGS / 'paper-full.flags'}"] if s.preset == "full" else []
  runs = pathlib.Path(s.run_dir).absolute()
  changes = [change.format(alpaca=os.path.abspath(s.alpaca), runs=runs) for change in step.changes]
  given = [f"--{name}={getattr(s, name)}" for name in ("mesh", "dtype") if getattr(s, name) != getattr(Settings, name)]
  return [
    *(sys.executable, "-P", "-m", f"experiments.{step.module}", f"--flagfile={_FLAGS / step.flagfile}"),
    *(*full, *changes, *given, f"--run_dir={runs / step.name}"),
  ]


def run(s: Settings) -> int:
  """Runs the steps and publishes their results; returns the exit code, 1 when a step failed."""
  run_dir = artifacts.RunDir.open(s.run_dir, {"stage": "paper", "preset": s.preset}, overwrite=s.overwrite)
  failed = []
  for number, step in enumerate(steps_of(s)):
    folder = pathlib.Path(run_dir.folder(step.name))
    note = folder.parent / f"{step.name}.json"
    run_dir.file(note.name)
    before = artifacts.read_json(note) if note.exists() else {"seconds": 0.0, "finished": False}
    if not before["finished"]:
      log.info("=== %d of %d: %s, %s", number + 1, len(steps_of(s)), step.name, step.about)
      began = time.monotonic()
      code = subprocess.run(command(step, s), env=children.environment(), check=False).returncode
      before["seconds"] += time.monotonic() - began
      before |= {"finished": code == 0, "date": datetime.date.today().isoformat(), "commit": commit()}
      artifacts.write_json(note, before)
      if code:
        failed.append(f"{step.name} (exit code {code})")
        continue
    publish(step, s, folder, before)
  write_index(s)
  if failed:
    log.error("failed: %s; the same command goes on with them", ", ".join(failed))
  return 1 if failed else 0


def commit() -> str:
  """The commit that the code is of, or "unknown" outside a repository."""
  found = subprocess.run(
    ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
  )
  return found.stdout.strip() or "unknown"


def machine() -> str:
  """Processor and cores, with no name of the machine."""
  info = pathlib.Path("/proc/cpuinfo")
  named = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
  return f"{os.cpu_count()} cores of {named[1] if named else platform.machine()}"


def publish(step: Step, s: Settings, folder: pathlib.Path, note: dict) -> None:
  """Copies tables and pictures, the Markdown with the command, machine, date and commit at its end."""
  target = pathlib.Path(s.results_dir) / s.preset / step.name
  shown = " ".join(["python -m", f"experiments.{step.module}", f"--flagfile=experiments/flags/{step.flagfile}"])
  shown += "".join(f" {change.format(alpaca='ALPACA.json', runs='runs/paper')}" for change in step.changes)
  text = (folder / f"{step.table}.md").read_text(encoding="utf-8")
  text = re.sub(r"\]\((plots/[\w.-]+)\.png\)", r"](\1.svg)", text)
  facts = f"`{shown}`, {machine()}, {note['date']}, commit {note['commit']}, {note['seconds']:,.0f} seconds."
  artifacts.write_text(target / f"{step.table}.md", f"{text}\n---\n\n{facts}\n")
  tables = [path for kind in ("csv", "tex") for path in sorted(folder.glob(f"*.{kind}"))]
  for path in [*tables, *sorted((folder / "plots").glob("*.svg"))]:
    if path.stat().st_size <= _MOST_BYTES:
      artifacts.write_bytes(target / path.relative_to(folder), path.read_bytes())


def write_index(s: Settings) -> None:
  """README.md of the results: what there is."""
  rows = []
  for step in STEPS:
    page = pathlib.Path(s.results_dir) / s.preset / step.name / f"{step.table}.md"
    if page.exists():
      rows.append({"experiment": step.name, "shows": step.about, "table": f"{step.name}/{step.table}.md"})
  lines = [f"# Results, preset {s.preset}", "", report.markdown_table(rows).rstrip(), ""]
  lines += ["Made by `./run.sh paper`; the command, machine, date and commit stand at the end of each page."]
  artifacts.write_text(pathlib.Path(s.results_dir) / s.preset / "README.md", "\n".join(lines) + "\n")


def main(_) -> int:
  """Entry point."""
  return run(flags.read())


if __name__ == "__main__":
  flags.define(run_dir="runs/paper")
  cli.run(main)
