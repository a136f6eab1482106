"""One writer for a folder: refusals, left-over locks, kills; in plain processes, which need no JAX."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry as fsspec_registry

from in2core_jax.errors import UserError
from in2core_jax.runs import files, locks
from in2core_jax.runs.run_folder import RunDir

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from in2core_jax.runs import locks
from in2core_jax.errors import UserError
locks.PATIENCE = 0.0
try:
  lock = locks.take(sys.argv[1])
except UserError as error:
  print("refused", error, flush=True)
  sys.exit(2)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
lock.release()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
  monkeypatch.setattr(locks, "PATIENCE", 0.0)


def start(folder: Path, seconds: float = 30) -> subprocess.Popen:
  """A process that takes a folder, and tells what came of it."""
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def hold(folder: Path, seconds: float = 30) -> tuple[subprocess.Popen, str]:
  """The same, with what it says."""
  process = start(folder, seconds)
  return process, process.stdout.readline()


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
  process.send_signal(number)
  process.communicate()


def test_a_second_writer_is_refused_with_the_first_ones_name_and_a_killed_one_blocks_nobody(tmp_path):
  RunDir.open(tmp_path, {"a": 1}).write_json("result.json", 1)
  first, said = hold(tmp_path)
  assert said == "held\n"
  for taken in (locks.take, locks.refuse_held, lambda path: RunDir.open(path, {"a": 1}, overwrite=True)):
    with pytest.raises(UserError, match=rf"process {first.pid} on {os.uname().nodename}.*remove .*{locks.NAME}"):
      taken(tmp_path)
  second, said = hold(tmp_path)
  assert said.startswith("refused") and second.wait() == 2
  second.stdout.close()
  assert RunDir.load(tmp_path).read_json("result.json") == 1  # readers do not ask
  end(first)
  assert (tmp_path / locks.NAME).exists()  # a killed process leaves the file, and no lock
  locks.refuse_held(tmp_path)
  third, said = hold(tmp_path, 0)
  assert said == "held\n" and third.wait() == 0
  third.stdout.close()
  assert not (tmp_path / locks.NAME).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_writer_blocks_nobody(tmp_path, number):
  process, _ = hold(tmp_path)
  end(process, number)
  locks.take(tmp_path).release()


def test_of_many_that_start_at_once_one_writes(tmp_path):
  (tmp_path / locks.NAME).write_text(json.dumps(locks._identity() | {"boot": "an earlier one"}))
  found = [start(tmp_path) for _ in range(4)]
  assert sorted(process.stdout.readline().split()[0] for process in found) == ["held", *["refused"] * 3]
  for process in found:
    end(process)


def test_one_process_takes_a_folder_as_often_as_it_likes(tmp_path):
  others = locks.folders()  # of runs that other tests have not let go yet
  first, second = locks.take(tmp_path), locks.take(tmp_path / "." / "")
  first.release()
  first.release()
  assert (tmp_path / locks.NAME).exists() and len(locks.folders()) == len(others) + 1
  second.release()
  assert not (tmp_path / locks.NAME).exists() and locks.folders() == others


US = {"host": "us", "boot": "now", "pids": "pid:[1]", "pid": 7, "started": "99"}


@pytest.mark.parametrize(
  ("changes", "exact", "seconds", "lives"),
  [
    ({}, True, 0, False),  # the kernel would know
    ({}, False, 9999, True),  # file system without flock: the process is there
    ({"pid": 8}, False, 0, False),  # no such process
    ({"started": "100"}, False, 0, False),  # its number is another's by now
    ({"pids": "pid:[2]"}, True, 0, False),  # another container on this kernel
    ({"pids": "pid:[2]"}, False, 0, True),
    ({"pids": "pid:[2]"}, False, 9999, False),
    ({"boot": "before"}, True, 0, False),  # this machine has been started again
    ({"boot": "theirs", "host": "other"}, True, 30, True),  # another machine, heard of lately
    ({"boot": "theirs", "host": "other"}, True, 9999, False),
    ({"boot": "theirs", "host": "other"}, False, 30, True),
  ],
)
def test_when_a_lock_is_left_over(monkeypatch, changes, exact, seconds, lives):
  monkeypatch.setattr(locks, "_identity", lambda: US)
  monkeypatch.setattr(locks, "_started", lambda pid: "99" if pid == 7 else None)
  assert locks._may_live(US | changes, exact, time.time() - seconds) is lives


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00", b'{"pid": "x"}' + b" " * 5000])
def test_a_lock_file_that_says_nothing_is_taken(tmp_path, content):
  (tmp_path / locks.NAME).write_bytes(content)
  locks.take(tmp_path).release()


def test_a_file_system_without_flock_still_tells_two_jobs_apart(tmp_path, monkeypatch):
  def none(descriptor, how):
    raise OSError(errno.ENOLCK, "no locks")

  monkeypatch.setattr(locks.fcntl, "flock", none)
  lock = locks.take(tmp_path)
  monkeypatch.setattr(locks, "_held", {})  # as another process sees it
  with pytest.raises(UserError, match=f"process {os.getpid()} on"):
    locks.take(tmp_path)
  monkeypatch.undo()
  lock.release()


def test_a_folder_that_was_removed_or_taken_does_not_come_back_in_part(tmp_path):
  run = RunDir.open(tmp_path / "run", {"a": 1})
  lock_file = tmp_path / "run" / locks.NAME
  lock_file.unlink()
  lock_file.write_text(json.dumps({"pid": 5, "host": "other"}))
  with pytest.raises(locks.Lost, match="taken by process 5 on other"):
    run.write_json("a.json", 1)
  for path in (lock_file, tmp_path / "run" / "manifest.json"):
    path.unlink()
  (tmp_path / "run").rmdir()
  with pytest.raises(locks.Lost, match="was removed"):
    files.write_text(tmp_path / "run" / "deep" / "b.txt", "b")
  assert not (tmp_path / "run").exists() and "was removed" in locks.lost()
  del run
  assert locks.lost() is None


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(locks.os, "open", refuse)
  locks.take(tmp_path).release()


def test_an_object_store_has_a_lock_too(monkeypatch):
  memory = fsspec.get_filesystem_class("memory")
  for scheme in ("gs", "gcs"):
    monkeypatch.setitem(fsspec_registry, scheme, memory)
  monkeypatch.setattr(locks, "_REMOTE_SETTLES", 0.0)
  memory.store.clear()
  lock = locks.take("gs://bucket/run")
  held = dict(locks._held)
  locks._held.clear()  # as another process sees it
  for taken in (locks.take, locks.refuse_held):
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
      taken("gs://bucket/run")
  locks._held.update(held)
  lock.release()
  assert not memory.store


def test_space_is_taken_before_it_is_used(tmp_path, monkeypatch):
  files.reserve(tmp_path / "a", 1 << 20)
  assert (tmp_path / "a").stat().st_blocks * 512 >= 1 << 20
  monkeypatch.delattr(os, "posix_fallocate", raising=False)
  files.reserve(tmp_path / "b", 1000)
  assert (tmp_path / "b").read_bytes() == bytes(1000)


def test_no_space_leaves_no_file(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
  with pytest.raises(OSError, match="1,000 bytes are needed") as error:
    files.reserve(tmp_path / "a", 1000)
  assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
