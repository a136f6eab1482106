"""One experiment of `paper`: its command, its process, and the note beside its run folder."""

import dataclasses
import datetime
import logging
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

from experiments import subprocesses
from experiments.paper.settings import HOW_FAST, PASSED, PaperSettings
from experiments.paper.steps import Step
from in2core_jax.costs import hardware
from in2core_jax.errors import UserError, how_many
from in2core_jax.model import weights
from in2core_jax.pipeline.settings import listed
from in2core_jax.runs import files, run_folder

log = logging.getLogger(__name__)

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = ROOT / "experiments" / "flags"
_NOTE_SECONDS = 30.0  # between two notes of how long a running experiment has taken
_PATIENCE = 60.0  # seconds that a stopped experiment has to save its work


@dataclasses.dataclass(frozen=True)
class Job:
  """A step with the flags of this call.

  Attributes:
    step: the experiment.
    settings: the flags.
    named: the flags that were given on the command line.
  """

  step: Step
  settings: PaperSettings
  named: tuple[str, ...] = ()

  @property
  def folder(self) -> pathlib.Path:
    """The experiment's run folder."""
    return pathlib.Path(self.settings.run_dir).absolute() / self.step.name

  @property
  def is_named(self) -> bool:
    """Whether the flags ask for the step itself, not only for one that reads it."""
    return not self.settings.only or self.step.name in listed(self.settings.only)

  def _arguments(self, flags: str, alpaca: str, runs: str) -> list[str]:
    """Flags, later ones win; with places. `--num_processes=1`: a job of several processes must not be waited for."""
    step = self.step
    full = ["--flagfile={flags}/paper-full.flags", *step.full] if self.settings.preset == "full" else []
    given = [self.settings.as_flag(name) for name in PASSED if name in self.named]
    last = ["--num_processes=1", f"--run_dir={{runs}}/{step.name}"]
    words = [f"--flagfile={{flags}}/{step.flagfile}", *step.changes, *full, *given, *last]
    return [each.replace("{flags}", flags).replace("{alpaca}", alpaca).replace("{runs}", runs) for each in words]

  def command(self, anew: bool = False) -> list[str]:
    """The command line; `anew`: what is in the folder is removed first."""
    own = self._arguments(str(FLAGS), os.path.abspath(self.settings.alpaca), str(self.folder.parent))
    return [sys.executable, "-P", "-m", f"experiments.{self.step.module}", *own, *(["--overwrite"] if anew else [])]

  def shown(self) -> str:
    """The same for readers elsewhere: no path of this machine."""
    own = map(without_folders, self._arguments("experiments/flags", "ALPACA.json", "runs/paper"))
    return f"python -m experiments.{self.step.module} {shlex.join(own)}"

  def fingerprint(self) -> str:
    """Changes when the results may: then the experiment is started, and its run folder says whether it goes on.

    The folder's identity would need data and model to be read. This reads flags, flagfiles, --alpaca, names, sizes and
    times of --model's files, and the same of the steps that the step reads.
    """
    own = [
      each for each in self._arguments("", "", "") if not each.startswith(tuple(f"--{name}=" for name in HOW_FAST))
    ]
    texts = [(FLAGS / name).read_text("utf-8") for name in re.findall(r"--flagfile=/(\S+)", " ".join(own))]
    alpaca = run_folder.file_sha256(self.settings.alpaca) if self.step.needs_alpaca and self.settings.alpaca else ""
    read = [read_note(self.folder.with_name(name)).get("fingerprint") for name in self.step.reads]
    return run_folder.hash_of([self.step.module, own, texts, alpaca, _files_of(self.settings.model), read])

  def is_finished(self) -> bool:
    """Whether it has run to its end with these flags, and all that it wrote is there."""
    note = read_note(self.folder)
    if not note.get("finished") or note.get("fingerprint") != self.fingerprint() or not _manifest(self.folder):
      return False
    return run_folder.RunDir.load(self.folder).is_whole(self.step.marker)

  def run(self) -> int:
    """Runs the command to its end and notes where and for how long, also when it is stopped; its exit code."""
    anew = self.settings.overwrite and self.is_named
    earlier, before = {} if anew else read_note(self.folder), _manifest(self.folder)
    alpaca = os.path.abspath(self.settings.alpaca) if self.step.needs_alpaca else ""
    note = earlier | {"finished": False, "shown": self.shown(), "fingerprint": self.fingerprint(), "alpaca": alpaca}
    note |= {"commit": _then(earlier.get("commit"), commit()), "machine": _then(earlier.get("machine"), machine())}
    began, code = time.monotonic() - earlier.get("seconds", 0.0), None
    process = subprocess.Popen(self.command(anew), env=subprocesses.environment())
    try:
      while code is None:
        code = _ended(process, _NOTE_SECONDS)
        write_note(self.folder, note | {"seconds": time.monotonic() - began})
    finally:
      _stop(process)  # after Ctrl-C or SIGTERM it still runs
      note["seconds"] = time.monotonic() - began
      write_note(self.folder, note)
    if earlier.get("finished") and _manifest(self.folder) == before:  # refused, or there already: it is of when it was
      write_note(self.folder, earlier | ({} if code else {"fingerprint": note["fingerprint"]}))
    elif code == 0:
      done = {"finished": True, "date": datetime.date.today().isoformat(), "devices": devices(self.folder)}
      write_note(self.folder, note | done)
    return code


def without_folders(argument: str) -> str:
  """Absolute paths in a flag's value cut down to their last names."""
  return re.sub(r"(?<=[=:;,+])~?/(?:[^/:;,+]+/)*([^/:;,+]*)/?", r"\1", argument)


def _files_of(model: str) -> list:
  """Names, sizes and times of the files of a model; none of an embedded one."""
  while model.startswith("truncated:"):
    model = model.removeprefix("truncated:").rpartition(":")[0]
  name = weights.full_spec(model).partition(":")[2]
  place = pathlib.Path(name).expanduser()
  found = sorted(place.iterdir()) if name and place.is_dir() else [place] if place.is_file() else []
  return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]


def _manifest(folder: pathlib.Path) -> bytes:
  """A run folder's manifest, which has the checksums of its files; empty where there is none."""
  path = folder / run_folder.MANIFEST
  return path.read_bytes() if path.exists() else b""


def _ended(process: subprocess.Popen, seconds: float = math.inf) -> int | None:
  """The exit code of a process that ends within so many seconds.

  `Popen.wait` is no use where a signal's handler may raise: it can leave a lock taken that the next call waits for.
  """
  stop = time.monotonic() + seconds
  while process.returncode is None and time.monotonic() < stop:
    try:
      pid, status = os.waitpid(process.pid, os.WNOHANG)
    except ChildProcessError:  # it was waited for, and a handler raised before its code was kept
      pid, status = process.pid, signal.SIGKILL
    if pid:
      process.returncode = os.waitstatus_to_exitcode(status)
    else:
      time.sleep(min(0.05, seconds))
  return process.returncode


def _stop(process: subprocess.Popen) -> None:
  """Ends an experiment, which saves what it can; a second signal in the meantime ends it at once."""
  try:
    process.terminate()
    _ended(process, _PATIENCE)
  finally:
    process.kill()
    _ended(process)


# ---- notes ---------------------------------------------------------------------------


def read_note(folder: pathlib.Path) -> dict:
  """What `Job.run` keeps beside a run folder; nothing of one that was never started."""
  path = folder.with_name(f"{folder.name}.json")
  try:
    return files.unsealed(run_folder.read_json(path), str(path))[0] if path.exists() else {}
  except UserError as error:
    log.warning("%s; %s counts as not finished and continues", error, folder.name)
    return {}


def write_note(folder: pathlib.Path, note: dict) -> None:
  """Keeps what is known of a run, with a checksum."""
  run_folder.write_json(folder.with_name(f"{folder.name}.json"), files.sealed(note))


def commit() -> str:
  """The commit that the code is of, or "unknown" outside a repository."""
  line = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
  return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine() -> str:
  """Processor and cores, with no name of the machine."""
  return f"{how_many(os.cpu_count() or 1, 'core')} of {hardware.processor()}"


def devices(folder: pathlib.Path) -> str:
  """The accelerators that a run tells of, as "8 x TPU v5 lite"; empty: the processor. To look would take them."""
  told = [run_folder.read_json(path) for path in sorted(folder.glob("*.json"))]
  found = [facts["devices"] for facts in told if isinstance(facts, dict) and isinstance(facts.get("devices"), dict)]
  on = found[0] if found else {}
  return f"{on['num_devices']} x {on['device_kind']}" if on.get("platform", "cpu") != "cpu" else ""


def _then(before: str | None, now: str) -> str:
  """A fact of a run that was started several times, perhaps with different ones."""
  return now if not before else before if now in before.split(", then ") else f"{before}, then {now}"
