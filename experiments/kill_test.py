"""Kills runs at random moments, starts them again and compares their results with those of a run left alone.

./run.sh kill_test --kills=10 --flagfile=mine.flags --run_dir=runs/kill_test
./run.sh kill_test --kill_command=evaluate --kills=10 --flagfile=mine.flags --run_dir=runs/kill_test

Two runs are left alone: they must give the same bytes, and the second, which finds the programs compiled, says how long
a run takes. The moments of the kills are spread evenly over that time, at random within each stretch, in random order.
A killed run is started again and perhaps killed again; when it ends, its files must be those of the first run, byte by
byte. Only seconds, rates and peak memory may differ. Exit code 1 when more does.
"""

import dataclasses
import json
import logging
import pathlib
import subprocess
import time

import numpy as np

from experiments import cli, flags, subprocesses
from experiments.settings import KillTestFlags
from in2core_jax.errors import UserError
from in2core_jax.report import table_text
from in2core_jax.runs import files, locks, run_folder
from in2core_jax.runs.unfinished import FOLDER
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)

_MAY_DIFFER = ("seconds", "solver_seconds", "tokens_per_second", "peak_memory_gb")  # no results of a run


@dataclasses.dataclass(frozen=True)
class Kill:
  """One kill.

  Attributes:
    run: number of the run folder.
    seconds: after the start of the process.
    last_line: of the process's log.
    kept: what the next process finds, piece counts by name.
  """

  run: int
  seconds: float
  last_line: str
  kept: str


class Run:
  """A command with a folder of its own; caches beside the run folder are not shared between runs."""

  def __init__(self, settings: KillTestFlags, place: pathlib.Path):
    """Writes the flagfile into `place`; the run folder is made below it."""
    self.name = settings.kill_command
    self.folder, self._log = place / self.name, place / f"{self.name}.log"
    own = settings.replace(run_dir=str(self.folder))
    self._command = subprocesses.command(self.name, own, place / f"{self.name}.flags")

  def start(self, moment: float | None = None) -> float | None:
    """Runs the command to its end, or kills it after `moment` seconds.

    Returns:
      Seconds that it took, or None when it was killed.

    Raises:
      UserError: the command failed by itself.
    """
    began = time.perf_counter()
    with self._log.open("w") as sink:
      own = {"stdout": sink, "stderr": subprocess.STDOUT, "env": subprocesses.environment()}
      process = subprocess.Popen(self._command, **own)
      try:
        code = process.wait(moment)
      except subprocess.TimeoutExpired:
        return None
      finally:
        process.kill()
        process.wait()
    if code:
      raise UserError(
        f"the {self.name} command failed by itself (exit code {code}): {self.last_line()}; see {self._log}"
      )
    return time.perf_counter() - began

  def last_line(self) -> str:
    """The last line that the command has logged."""
    lines = self._log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")

  def results(self) -> dict[str, bytes]:
    """`results_of` the run folder, and of the fine-tuning that `study` keeps beside its own."""
    folders = (self.folder, self.folder.with_name(f"{self.name}-full"))
    every = {folder.name: results_of(folder) for folder in folders if folder.exists()}
    return {f"{name}/{file}": data for name, found in every.items() for file, data in found.items()}

  def kept(self) -> str:
    """Pieces of unfinished work, counted."""
    pieces = self.folder / FOLDER
    counts = {str(path.parent.relative_to(pieces)): 0 for path in sorted(pieces.rglob("*.shard"))}
    for path in pieces.rglob("*.shard"):
      counts[str(path.parent.relative_to(pieces))] += 1
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing"


def results_of(folder: pathlib.Path) -> dict[str, bytes]:
  """Name -> bytes of all files of a finished run folder, without what may differ: times, and the folder's own name.

  Of a checkpoint it is the note, which holds the hash of the weights: Orbax writes times and drawn names beside them.
  """
  paths = [path for path in folder.rglob("*") if path.is_file() and path.name != locks.NAME]
  found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
  found = {name: data for name, data in found.items() if "checkpoint" not in name.split("/") or _is_note(name)}
  return {name: _comparable(name.rpartition("/")[2], data) for name, data in found.items()}


def _is_note(name: str) -> bool:
  return name.endswith("/meta/metadata")


def _comparable(name: str, data: bytes) -> bytes:
  """A file's bytes without what may differ."""
  if name == "flags.txt":
    return b"\n".join(line for line in data.splitlines() if not line.startswith(b"--run_dir="))
  if name == train_loop.METRICS:
    lines = (json.loads(line) for line in data.splitlines())
    return json.dumps(
      [{key: value for key, value in line.items() if key not in _MAY_DIFFER} for line in lines]
    ).encode()
  values = json.loads(data) if name.endswith(".json") else None
  if not isinstance(values, dict):
    return data
  if name == run_folder.MANIFEST:  # the files themselves are compared
    values |= {"checksums": list(values["checksums"]), files.SEAL: ""}
  return json.dumps({key: value for key, value in values.items() if key not in _MAY_DIFFER}).encode()


def differences(wanted: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
  """Names of files that are missing, too many, or not equal."""
  return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def moments(kills: int, seconds: float, seed: int) -> list[float]:
  """A moment in each of `kills` equal stretches of the run's time, in random order."""
  rng = np.random.default_rng((seed, 17))
  return list((rng.permutation(kills) + rng.random(kills)) * seconds / kills)


def run(s: KillTestFlags) -> bool:
  """Runs, kills, compares; whether every run ended in the same bytes."""
  identity = {"stage": "kill_test", "flags": s.identity("run", "data", "model", "select", "kill_test")}
  root = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite or _is_kill_test(s.run_dir))
  make = lambda name: Run(s, pathlib.Path(root.folder(name)))  # noqa: E731
  alone, again = make("alone"), make("alone_again")
  alone.start()
  seconds = again.start()
  wanted = alone.results()
  wrong = {"alone_again": differences(wanted, again.results())}
  log.info("a run left alone takes %.1f s; two of them: %s", seconds, _verdict(wrong["alone_again"]))
  left, kills, number = moments(s.kills, seconds, s.seed), [], 0
  while left:
    number += 1
    each, before = make(f"run-{number:02d}"), len(kills)
    while (took := each.start(left[0] if left else None)) is None:
      kills.append(Kill(number, left.pop(0), each.last_line(), each.kept()))
      log.info("run %d: killed after %.1f s, kept: %s", number, kills[-1].seconds, kills[-1].kept)
    if len(kills) == before:  # faster than the one that was measured: over before its moment
      left[0] = 0.9 * took
    wrong[f"run-{number:02d}"] = differences(wanted, each.results())
    log.info("run %d: %s", number, _verdict(wrong[f"run-{number:02d}"]))
  rows = [dataclasses.asdict(kill) | {"result": _verdict(wrong[f"run-{kill.run:02d}"])} for kill in kills]
  print(table_text.markdown_table(rows), end="")
  same = sum(not wrong[f"run-{kill.run:02d}"] for kill in kills)
  print(f"two runs left alone: {_verdict(wrong['alone_again'])}; killed and resumed: {same} of {len(kills)} identical")
  return not any(wrong.values())


def _is_kill_test(folder: str) -> bool:
  """Whether an earlier test is there: it is no use, a test starts anew. Results of anything else are not touched."""
  file = files.absolute(folder) / run_folder.MANIFEST
  return file.exists() and run_folder.RunDir.load(folder).identity.get("stage") == "kill_test"


def _verdict(names: list[str]) -> str:
  return f"other bytes in {', '.join(names)}" if names else "same bytes"


def main(_) -> int:
  """Entry point; exit code 1 when a byte differs."""
  return 0 if run(flags.read(KillTestFlags)) else 1


if __name__ == "__main__":
  flags.define(KillTestFlags)
  cli.run(main)
