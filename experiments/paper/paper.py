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
import functools
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence

from absl import flags as command_line

from experiments import flags, subprocesses
from experiments.paper.settings import HOW_FAST, PASSED, PaperSettings
from experiments.paper.steps import STEPS, Step
from in2core_jax.data import sources, tokenizing
from in2core_jax.data.subsets import PARTS
from in2core_jax.errors import UserError
from in2core_jax.model import weights
from in2core_jax.pipeline.settings import Settings, listed
from in2core_jax.report import table_text
from in2core_jax.runs import files, run_folder

log = logging.getLogger(__name__)

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FLAGS = _ROOT / "experiments" / "flags"
_MOST_BYTES = 1_000_000  # of a published file
# Flags of which an experiment's run folder takes other values: what it has is kept, what is missing is done.
_LONGER = {"study": ("--variants", "--seeds", "--fixed_seeds", "--equal")}
_MODEL = "content of --model"
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_FACTS = "run.json"  # beside a published table: what the index says of it
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


def flagfiles(step: Step, s: PaperSettings) -> list[pathlib.Path]:
  """The flagfiles of the step's command."""
  return [_FLAGS / step.flagfile, *([_FLAGS / "paper-full.flags"] if s.preset == "full" else [])]


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
    argument = argument.replace(f"--flagfile={_FLAGS}/", "--flagfile=experiments/flags/")
    shown.append(_without_folders(_filled(argument, "ALPACA.json", "runs/paper")))
  return f"python -m experiments.{step.module} {shlex.join(shown)}"


def _filled(argument: str, alpaca: object, runs: object) -> str:
  return argument.replace("{alpaca}", str(alpaca)).replace("{runs}", str(runs))


def _without_folders(argument: str) -> str:
  """Absolute paths in a flag's value cut down to their last names."""
  return re.sub(r"(?<=[=:;,+])~?/(?:[^/:;,+]+/)*([^/:;,+]*)/?", r"\1", argument)


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
  facts |= {_MODEL: content} if content else {}
  wanted = {other.name: other for other in steps_of(s)}
  for name in step.reads:
    theirs = facts_of(wanted[name], s, named) if name in wanted else read_note(s, name).get("command", {})
    apart = (*(f"--{flag}" for flag in HOW_FAST), _MODEL)  # the model is a fact of this step too
    facts[f"command of {name}"] = run_folder.hash_of({k: v for k, v in theirs.items() if k not in apart})
  return facts


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
  ignored += (_MODEL,) if _MODEL not in before or _MODEL not in now else ()  # an older note, or the model is gone
  names = [name for name in (before | now) if before.get(name) != now.get(name) and name not in ignored]
  told = lambda name, facts: repr(facts[name]) if name in facts else "not given"  # noqa: E731
  return [
    f"{name} was {told(name, before)} and is {told(name, now)} now"
    if name.startswith("--") or name == "module"
    else f"the {name} changed"
    for name in names
  ]


# ---- one step ------------------------------------------------------------------------


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


def devices(folder: pathlib.Path) -> str:
  """The accelerators that a finished step has told of in its run folder, as "8 x TPU v5 lite"; empty: the processor.

  Most experiments write them; those that do not have had the devices that a process started now has. This process must
  not look by itself: it would take the devices from the next experiment.
  """
  told = [run_folder.read_json(path) for path in sorted(folder.glob("*.json"))]
  found = [facts["devices"] for facts in told if isinstance(facts, dict) and isinstance(facts.get("devices"), dict)]
  summary = found[0] if found else _devices_here()
  accelerated = summary.get("platform", "cpu") != "cpu"
  return f"{summary['num_devices']} x {summary['device_kind']}" if accelerated else ""


@functools.cache
def _devices_here() -> dict:
  """`run_folder.device_summary` of a process of its own; empty when that one fails."""
  code = "import json; from in2core_jax.runs import run_folder; print(json.dumps(run_folder.device_summary()))"
  here = {"env": subprocesses.environment(), "capture_output": True, "text": True, "check": False}
  done = subprocess.run([sys.executable, "-P", "-c", code], **here)
  return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


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
    parts = dict(
      zip(PARTS, tokenizing.split_records(sources.load_records(f"jsonl:{os.path.abspath(s.alpaca)}")), strict=True)
    )
    for step in steps:
      _check_block(step, s, {part: len(records) for part, records in parts.items()})


def _check_block(step: Step, s: PaperSettings, sizes: dict[str, int]) -> None:
  """Raises UserError when a step takes examples that come after all of --alpaca's; sizes: of its parts."""
  given = []
  for argument in arguments(step, s):
    name, _, value = argument.partition("=")
    given += pathlib.Path(value).read_text(encoding="utf-8").splitlines() if name == "--flagfile" else [argument]
  numbers = {
    name: int(value) for line in given for name, value in re.findall(r"^--(\w+_limit|limit_block)=(\d+)", line)
  }
  for part, size in sizes.items():
    before = numbers.get("limit_block", 0) * numbers.get(f"{part}_limit", 0)
    if before and size <= before:
      raise UserError(
        f"--alpaca={s.alpaca}: {step.name} leaves out the first {before:,} examples of the {part} part, which has "
        f"{size:,}: give a larger file, or leave the step out by naming the others in --only"
      )


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
  known = [_published(s, task.step).get("seconds") for task in waiting if task.step.table]
  took = f" (last time {_duration(sum(known))})" if None not in known else ""
  return ", ".join(task.step.name for task in waiting) + took


def _duration(seconds: float) -> str:
  """Hours, minutes, seconds."""
  return str(datetime.timedelta(seconds=round(seconds)))


# ---- results -------------------------------------------------------------------------


def target_of(s: PaperSettings, step: Step) -> pathlib.Path:
  """The folder that a step's results are published in."""
  return pathlib.Path(s.results_dir) / s.preset / step.name


def _published(s: PaperSettings, step: Step) -> dict:
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
  for name in set(_published(s, step).get("files", ())) - set(contents):  # of an earlier run with other tables
    (target / name).unlink(missing_ok=True)
  for name, content in contents.items():
    run_folder.write_text(target / name, _without_places(content, s, note))
  run_folder.write_json(target / _FACTS, facts | {"files": sorted(contents)})


def _without_places(text: str, s: PaperSettings, note: dict) -> str:
  """Replaces the paths of this machine that the experiments know of."""
  places = {
    str(pathlib.Path(s.run_dir).absolute()): "runs/paper",
    note["command"].get("--alpaca", ""): "ALPACA.json",
    f"{_ROOT}/": "",
    s.model if "/" in s.model else "": _without_folders(s.model),
  }
  for place in sorted(filter(None, places), key=len, reverse=True):
    text = text.replace(place, places[place])
  return text


def write_index(s: PaperSettings) -> None:
  """README.md of the results: what there is, of when, from where, and what it took."""
  rows, older, total, plain = [], [], 0.0, 0.0
  for step in STEPS:
    if not step.table:
      fixed = read_note(s, step.name).get("seconds", 0.0)
      total, plain = total + fixed, plain + fixed
    if not (target_of(s, step) / step.marker).exists():
      continue
    facts, note = _published(s, step), read_note(s, step.name)
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
