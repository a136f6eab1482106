"""All experiments of the paper in one command, each from its flagfile; tables and pictures land in --results_dir.

./run.sh paper                                          2 cores, the embedded models and corpus
./run.sh paper --alpaca=alpaca.json                     also on Alpaca, and on a pool that mixes both
./run.sh paper --preset=full --mesh=data:8              an accelerator: all data, all layers
./run.sh paper --only=sweep                             and, where they are not finished, the steps that it reads

Every experiment is a run folder of its own in --run_dir and goes on where it was stopped. A finished one is not run
again, unless its command, a flagfile, the file of --alpaca or the files of --model have changed: then what it left is
removed and it starts anew; a study with other rules, seeds or kinds of budget goes on with what is missing. The next
experiment starts when the one before has ended, however it ended; one that fails is told at the end. --overwrite starts
everything anew, with --only the experiments that it names.

The experiments' flags are in experiments/flags/. Passed on to all of them, where given: --seed --mesh --boundary_cache
--boundary_cache_gb --batch_tokens --microbatch --shard_batches --model --dtype. Other flags are refused. --model is the
model that is trained and, but in transfer, scored: there the models that select stay those named in the experiment, and
--model joins them. Each experiment is one process, which works alone on the devices of this machine.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence

from absl import flags as command_line

from experiments import flags, subprocesses
from experiments.paper.commands import (
  MODEL,
  arguments,
  changes_of,
  command,
  flagfiles,
  model_content,
  shown_command,
)
from experiments.paper.notes import folder_of, read_note, write_note
from experiments.paper.provenance import commit, devices, machine
from experiments.paper.results import publish, published_facts, target_of
from experiments.paper.settings import HOW_FAST, PASSED, PaperSettings
from experiments.paper.steps import STEPS, Step
from in2core_jax.data import sources
from in2core_jax.errors import UserError
from in2core_jax.pipeline.settings import listed
from in2core_jax.report import table_text
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

# Flags of which an experiment's run folder takes other values: what it has is kept, what is missing is done.
_LONGER = {"study": ("--variants", "--seeds", "--fixed_seeds", "--equal")}
_NOTE_SECONDS = 30.0  # between two notes of how long a running experiment has taken
_PATIENCE = 60.0  # seconds that a stopped experiment has to save its work

_OWN = ("run_dir", "overwrite", "coordinator", "process_id", "num_processes", "preset", "alpaca", "only", "results_dir")
# Made by the experiments beside their run folders; RUN-full, by study, is another.
_CACHES = ("boundary", "ekfac", "projected")


def steps_of(s: PaperSettings) -> list[Step]:
  """The steps that the flags ask for, each after those whose results it reads.

  With --only those are added which are not finished, or read one that is not. A finished step reads nothing.

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
  with_read: dict[str, Step] = {}

  def missing(name: str) -> bool:
    return not _is_finished(s, known[name]) or any(missing(other) for other in known[name].reads)

  def add(name: str, ready: bool = False) -> None:
    for other in known[name].reads:
      if other in wanted or not ready and missing(other):
        add(other)
    with_read.setdefault(name, known[name])

  for name in wanted:
    add(name, ready=_is_finished(s, known[name]) and not s.overwrite)
  return list(with_read.values())


def is_named(s: PaperSettings, step: Step) -> bool:
  """Whether the flags ask for the step itself, not only for one that reads it."""
  return not s.only or step.name in listed(s.only)


# ---- commands ------------------------------------------------------------------------


def facts_of(step: Step, s: PaperSettings, named: Collection[str] = ()) -> dict[str, str]:
  """What the step's results depend on, by name: its flags, the content of its flagfiles, of --alpaca and --model.

  Of a step whose results it reads, what that one was run with, or will be in this very call.
  """
  flags_ = [argument for argument in arguments(step, s, named) if not argument.startswith("--flagfile=")]
  facts = {"module": step.module} | {name: value for name, _, value in (flag.partition("=") for flag in flags_)}
  for path in flagfiles(step, s):
    facts[f"content of {path.name}"] = run_folder.file_sha256(path)
  if step.needs_alpaca:
    facts |= {"--alpaca": os.path.abspath(s.alpaca), "content of --alpaca": run_folder.file_sha256(s.alpaca)}
  content = model_content(s.model)
  facts |= {MODEL: content} if content else {}
  wanted = {other.name: other for other in steps_of(s)}
  for name in step.reads:
    theirs = facts_of(wanted[name], s, named) if name in wanted else read_note(s, name).get("command", {})
    apart = (*(f"--{flag}" for flag in HOW_FAST), MODEL)  # the model is a fact of this step too
    facts[f"command of {name}"] = run_folder.hash_of({k: v for k, v in theirs.items() if k not in apart})
  return facts


# ---- one step ------------------------------------------------------------------------


def _is_finished(s: PaperSettings, step: Step) -> bool:
  """Whether the step has run to its end, of whatever command, and what it made is there."""
  folder = folder_of(s, step.name)
  if not read_note(s, step.name).get("finished") or not (folder / step.marker).exists():
    return False
  if not (folder / run_folder.MANIFEST).exists():
    return True
  damaged = run_folder.RunDir.load(folder).damaged()
  for name, reason in damaged.items():
    log.warning("%s: %s; %s goes on and computes it again", folder / name, reason, step.name)
  return not damaged


@dataclasses.dataclass(frozen=True)
class Task:
  """A step and what is to be done of it.

  Attributes:
    step: the step.
    facts: `facts_of` it.
    done: whether its results are there, of these facts.
    anew: why what is there has to go; empty: nothing has to.
  """

  step: Step
  facts: dict[str, str]
  done: bool
  anew: str


def task_of(step: Step, s: PaperSettings, named: Collection[str] = ()) -> Task:
  """Looks at what is there of a step."""
  note, facts, finished = read_note(s, step.name), facts_of(step, s, named), _is_finished(s, step)
  if s.overwrite and is_named(s, step):
    return Task(step, facts, False, "--overwrite")
  # A note without a command is of an older version: the experiment itself goes on, or refuses.
  if "command" not in note:
    return Task(step, facts, False, "")
  changed = changes_of(note["command"], facts, finished)
  # What is started goes on with the paths that its run folder was made for, also where it was finished once.
  anew = changes_of(note["command"], facts, finished and not changed, _LONGER.get(step.module, ()))
  return Task(step, facts, finished and not changed, "; ".join(anew))


def clear(s: PaperSettings, step: Step) -> None:
  """Removes what this command has made of a step; a kill in between is told from a finished removal."""
  folders = (folder_of(s, step.name), folder_of(s, f"{step.name}-full"))
  for folder in folders:  # somebody may have started the experiment by itself
    run_folder.RunDir.refuse_held(folder)
  write_note(s, step.name, {"command": {}, "seconds": 0.0, "finished": False})
  for folder in folders:
    if folder.is_symlink():
      folder.unlink()
    elif folder.exists():
      shutil.rmtree(folder)


def run_step(task: Task, s: PaperSettings, named: Collection[str] = ()) -> int:
  """Runs the step's command to its end and notes where and for how long, also when it is stopped; its exit code."""
  step = task.step
  note = {"seconds": 0.0, "finished": False} | read_note(s, step.name)
  note |= {"command": task.facts, "shown": shown_command(step, s, named), "finished": False}
  note["commit"], note["machine"] = _then(note.get("commit"), commit()), _then(note.get("machine"), machine())
  before, began = note["seconds"], time.monotonic()

  def keep() -> None:
    note["seconds"] = before + time.monotonic() - began
    write_note(s, step.name, note)

  keep()
  code, process = None, subprocess.Popen(command(step, s, named), env=subprocesses.environment())
  try:
    while code is None:
      with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(_NOTE_SECONDS)
      keep()
  except BaseException:  # Ctrl-C and SIGTERM among them
    _stop(process)
    keep()
    raise
  if code == 0:
    folder = folder_of(s, step.name)
    note |= {"finished": True, "date": datetime.date.today().isoformat(), "devices": devices(folder)}
    write_note(s, step.name, note)
  return code


def _then(before: str | None, now: str) -> str:
  """A fact of a run that was started several times, perhaps with different ones."""
  return now if not before else before if now in before.split(", then ") else f"{before}, then {now}"


def _stop(process: subprocess.Popen) -> None:
  """Ends an experiment, which saves what it can; a second signal in the meantime ends it at once."""
  process.terminate()
  try:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(_PATIENCE)
  finally:
    process.kill()
    process.wait()


# ---- all steps -----------------------------------------------------------------------


def run(s: PaperSettings, named: Collection[str] = ()) -> int:
  """Runs the steps and publishes their results.

  Args:
    s: flags.
    named: names of the flags that were given on the command line.

  Returns:
    The exit code, 1 when a step failed.
  """
  steps = steps_of(s)
  check_settings(s, steps, named)
  run_dir, published = open_folder(s), run_folder.hold(pathlib.Path(s.results_dir) / s.preset)
  tasks = [task_of(step, s, named) for step in steps]
  announce(s, tasks)
  waiting, failed, began = [task for task in tasks if not task.done], [], time.monotonic()
  for task in tasks:
    if not task.done:
      step = task.step
      log.info("=== %d of %d: %s, %s", tasks.index(task) + 1, len(tasks), step.name, step.about)
      if task.anew:
        log.warning("%s starts anew, what is in %s is removed: %s", step.name, folder_of(s, step.name), task.anew)
        clear(s, step)
      code = run_step(task, s, named)
      waiting.remove(task)
      _tell_progress(s, task, code, waiting, time.monotonic() - began)
      if code:
        failed.append(f"{step.name} (exit code {code})")
        write_index(s)
        continue
    publish(task.step, s)
    write_index(s)
  if failed:
    log.error("failed: %s; the same command goes on with them", ", ".join(failed))
  published.release()
  del run_dir  # and its lock
  return 1 if failed else 0


def check_settings(s: PaperSettings, steps: Sequence[Step], named: Collection[str] = ()) -> None:
  """Tells before any work what could not go well.

  Raises:
    UserError: a flag that no experiment would get, a folder that is not local, or a file that cannot be read.
  """
  foreign = sorted(set(named) - {*PASSED, *_OWN})
  if foreign:
    raise UserError(
      f"--{foreign[0]} is not passed on to the experiments, which have their flags from experiments/flags/: leave it "
      f"out, or run the experiment alone with it; passed on are --{', --'.join(PASSED)}"
    )
  for name in ("run_dir", "results_dir"):
    place = pathlib.Path(getattr(s, name))
    if not getattr(s, name) or place.exists() and not place.is_dir():
      raise UserError(f"--{name}={getattr(s, name)}: give a folder, which is made where there is none")
    if run_folder.is_remote(getattr(s, name)):
      raise UserError(f"--{name}={getattr(s, name)}: paper works in local folders; give one, and copy it afterwards")
  if any(step.needs_alpaca for step in steps):
    if "+" in os.path.abspath(s.alpaca):
      raise UserError(f"--alpaca={s.alpaca}: sources are joined by +, so its path must have none: rename or move it")
    sources.load_records(f"jsonl:{os.path.abspath(s.alpaca)}")  # refuses what cannot be read


def open_folder(s: PaperSettings) -> run_folder.RunDir:
  """Makes the run folder or continues it, and notes as its own what the experiments will write into it.

  Raises:
    UserError: it belongs to another preset or to something else.
  """
  identity = {"stage": "paper", "preset": s.preset}
  try:
    run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite and not s.only)
  except UserError as error:
    more = " (without --only, with which it starts anew only the experiments that are named)"
    raise UserError(f"{error}{more if s.overwrite and s.only else ''}") from error
  for step in steps_of(s):
    for name in (step.name, f"{step.name}-full", f"{step.name}.json"):
      run_dir.file(name)
  for name in _CACHES:
    run_dir.file(name)
  return run_dir


def announce(s: PaperSettings, tasks: Sequence[Task]) -> None:
  """Tells what will be run, and why again."""
  done, waiting = ([task for task in tasks if task.done == wanted] for wanted in (True, False))
  if done:
    log.info("finished already: %s", ", ".join(task.step.name for task in done))
  read = [task.step.name for task in tasks if not is_named(s, task.step)]
  if read:
    log.info("for --only=%s the results of %s are read, not all there yet: first these", s.only, ", ".join(read))
  log.info("preset %s, to run: %s", s.preset, _left(s, waiting))
  for task in waiting:
    if task.anew:
      log.info("  %s once more: %s", task.step.name, task.anew)


def _tell_progress(s: PaperSettings, task: Task, code: int, waiting: Sequence[Task], elapsed: float) -> None:
  """After a step: how long it and all so far took, and what is left."""
  name, seconds = task.step.name, read_note(s, task.step.name)["seconds"]
  ended = f"failed with exit code {code}" if code else "finished"
  log.info("=== %s %s after %s; %s in all", name, ended, _duration(seconds), _duration(elapsed))
  log.info("left: %s", _left(s, waiting))


def _left(s: PaperSettings, waiting: Sequence[Task]) -> str:
  """Names of steps, with the time that they took when their published tables were made, if all of them tell."""
  if not waiting:
    return "nothing"
  known = [published_facts(s, task.step).get("seconds") for task in waiting if task.step.table]
  took = f" (last time {_duration(sum(known))})" if None not in known else ""
  return ", ".join(task.step.name for task in waiting) + took


def _duration(seconds: float) -> str:
  """Hours, minutes, seconds."""
  return str(datetime.timedelta(seconds=round(seconds)))


# ---- results -------------------------------------------------------------------------


def write_index(s: PaperSettings) -> None:
  """README.md of the results: what there is, of when, from where, and what it took."""
  rows, older, total, plain = [], [], 0.0, 0.0
  for step in STEPS:
    if not step.table:
      fixed = read_note(s, step.name).get("seconds", 0.0)
      total, plain = total + fixed, plain + fixed
    if not (target_of(s, step) / step.marker).exists():
      continue
    facts, note = published_facts(s, step), read_note(s, step.name)
    page = f"{step.name}/{step.table}.md"
    row = {"experiment": step.name, "shows": step.about, "table": table_text.Link(page, page)}
    row |= {name: facts.get(name, "") for name in ("date", "commit")}
    seconds = facts.get("seconds")
    rows.append(row | {"seconds": "" if seconds is None else f"{seconds:,.0f}", "machine": facts.get("machine", "")})
    total += seconds or 0.0
    plain += 0.0 if step.needs_alpaca else seconds or 0.0
    if note and not note["finished"]:
      older.append(step.name)
  columns = ("experiment", "shows", "table", "date", "commit", "seconds", "machine")
  lines = [f"# Results, preset {s.preset}", "", table_text.markdown_table(rows, columns).rstrip(), ""]
  lines += [f"{total:,.0f} seconds in all, {plain:,.0f} of them without --alpaca.", ""]
  if older:
    lines += [f"Of an earlier run, the last one is not finished or failed: {', '.join(older)}.", ""]
  lines += ["Made by `./run.sh paper`; the command, machine, date and commit stand at the end of each page."]
  run_folder.write_text(pathlib.Path(s.results_dir) / s.preset / "README.md", "\n".join(lines) + "\n")


def main(_) -> int:
  """Entry point."""
  settings = flags.read(PaperSettings)
  return run(settings, [name for name in flags.names() if command_line.FLAGS[name].present])
