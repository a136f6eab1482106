"""One writer for a folder: a lock file that says which process of which machine writes there; readers never ask.

The lock is a file in the folder itself, so that it means the same through links and mounts. On this machine the kernel
keeps it (`flock`): it ends with its process, however that ends, and a file that is left is no lock. On another machine
the holder touches the file every minute; one that was not touched for ten minutes is left over. Shared file systems
differ in how soon others see a file (NFS may take a minute) and in whether they keep `flock` at all; then the host,
the process number and its start time in the file decide. gs:// has no exclusive creation here and nobody touches the
file: what another machine has left there is refused until it is removed by hand.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

from etils import epath

from in2core_jax.errors import UserError

NAME = ".in2core-lock"
PATIENCE = 2.0  # seconds: a killed process gives its memory back before the kernel ends its locks
_BEAT = 60.0
_SILENCE = 600.0  # seconds without a beat after which another machine's lock is left over
_REMOTE_SETTLES = 1.0
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)

_held: dict[str, _Held] = {}
_guard = threading.RLock()


class Lost(RuntimeError):
  """The folder of a running job was removed, or another job has taken it over: the machine's fault, exit code 1."""


class Lock:
  """A share of a folder's lock; the last share of this process that is released frees the folder.

  lock = locks.take(folder)
  ...
  lock.release()
  """

  def __init__(self, key: str | None):
    self._key = key

  def release(self) -> None:
    """Gives the share back; a second call does nothing."""
    with _guard:
      key, self._key = self._key, None
      held = _held.get(key) if key else None
      if held is None:
        return
      held.shares -= 1
      if not held.shares:
        del _held[key]
        held.free()


class _Held:
  """A lock file that this process has."""

  def __init__(self, path: epath.Path, descriptor: int | None, token: str):
    self.path, self.descriptor, self.token, self.shares = path, descriptor, token, 1

  def is_ours(self) -> bool:
    """Whether the file is still there and still names this job."""
    if self.descriptor is None:
      return (_read(self.path) or {}).get("token") == self.token
    try:
      there, ours = os.stat(self.path), os.fstat(self.descriptor)
    except OSError:
      return False
    if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
      return False
    return _parsed(os.pread(self.descriptor, 4096, 0)).get("token") == self.token

  def free(self) -> None:
    """Removes the file, unless it is another's by now."""
    with contextlib.suppress(OSError):
      if self.is_ours():
        self.path.unlink()
    if self.descriptor is not None:
      os.close(self.descriptor)


# ---- taking --------------------------------------------------------------------------


def take(folder: epath.PathLike) -> Lock:
  """Takes a folder for this process, which may hold several shares of it.

  A folder that may not be written into needs no lock: nothing can be written there by this process.

  Args:
    folder: exists (gs:// always does).

  Raises:
    UserError: another job is writing there.
  """
  with _guard:
    key = _key(folder)
    held = _held.get(key)
    if held is not None and held.is_ours():
      held.shares += 1
      return Lock(key)
    path = epath.Path(folder) / NAME
    try:
      taken = _take_remote(path) if is_remote(folder) else _take_local(path)
    except OSError as error:
      if error.errno in _CANNOT_WRITE:
        return Lock(None)
      raise
    _held[key] = taken
    _start_beating()
    return Lock(key)


def _take_local(path: epath.Path) -> _Held:
  deadline = time.monotonic() + PATIENCE
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    kept = False
    try:
      free, exact = _flock(descriptor)
      if free and not _is_file_at(descriptor, path):  # whoever had it has just removed it
        continue
      found = _parsed(os.pread(descriptor, 4096, 0))
      if not free or _may_live(found, exact, os.fstat(descriptor).st_mtime):
        if not free and time.monotonic() < deadline:
          time.sleep(0.05)
          continue
        raise UserError(_refusal(path, found))
      token, text = _about_us()
      os.ftruncate(descriptor, 0)
      os.pwrite(descriptor, text, 0)
      if not exact:  # two may have found the same left-over lock: the last one to write has it
        time.sleep(0.2)
        if _parsed(os.pread(descriptor, 4096, 0)).get("token") != token:
          continue
      kept = True
      return _Held(path, descriptor, token)
    finally:
      if not kept:
        os.close(descriptor)


def _take_remote(path: epath.Path) -> _Held:
  found = _read(path)
  if found is not None and _may_live(found, False, time.time()):
    raise UserError(_refusal(path, found))
  token, text = _about_us()
  path.write_bytes(text)
  time.sleep(_REMOTE_SETTLES)  # another may write at the same time: the last one has it
  if (_read(path) or {}).get("token") != token:
    raise UserError(_refusal(path, _read(path) or {}))
  return _Held(path, None, token)


def refuse_held(folder: epath.PathLike) -> None:
  """Refuses, before any work, a folder that another job writes into; takes nothing.

  Raises:
    UserError: names host and process, and says what to do.
  """
  path = epath.Path(folder) / NAME
  if _key(folder) in _held or (found := _read(path)) is None:
    return
  exact, changed = False, time.time()
  if not is_remote(folder):
    try:
      with open(path, "rb+") as file:
        free, exact = _flock(file.fileno())
        changed = os.fstat(file.fileno()).st_mtime
    except OSError:  # removed meanwhile, or not to be written by this user: the job itself will tell
      return
    if not free:
      raise UserError(_refusal(path, found))
  if _may_live(found, exact, changed):
    raise UserError(_refusal(path, found))


def _flock(descriptor: int) -> tuple[bool, bool]:
  """(whether nobody else has it as far as the kernel knows, whether the kernel knows)."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False, True
  except OSError as error:
    if error.errno in NO_FLOCK:
      return True, False
    raise
  return True, True


def _is_file_at(descriptor: int, path: epath.Path) -> bool:
  try:
    there, ours = os.stat(path), os.fstat(descriptor)
  except FileNotFoundError:
    return False
  return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _may_live(found: dict[str, Any], exact: bool, changed: float) -> bool:
  """Whether the process that a lock file names may still be at work, after `_flock` has found it free.

  Args:
    found: what the file says.
    exact: whether the kernel keeps locks on this file system.
    changed: when the file was touched last, seconds since the epoch.
  """
  if not found.get("host"):  # killed before it had written
    return False
  us = _identity()
  if found.get("boot") == us["boot"]:
    # The same kernel: `flock` would have told, also of a process that another container runs.
    if exact:
      return False
    if found.get("pids") == us["pids"]:
      return found.get("started") is not None and _started(found.get("pid")) == found["started"]
  elif found.get("host") == us["host"]:
    return False  # this machine, started again since
  return time.time() - changed < _SILENCE


def _refusal(path: epath.Path, found: dict[str, Any]) -> str:
  who = f"process {found.get('pid', '?')} on {found.get('host', 'an unknown host')}"
  what = f"since {found.get('since', 'just now')} ({found.get('command', '?')})"
  advice = f"wait for it or end it, or choose another --run_dir; if that process is gone, remove {path}"
  return f"{path.parent}: another job writes there, {who}, {what}: {advice}"


# ---- what a lock file says -----------------------------------------------------------


def _identity() -> dict[str, Any]:
  """What names this process on this machine, since it was started; None where the system does not tell."""
  return {
    "host": platform.node(),
    "boot": _text("/proc/sys/kernel/random/boot_id"),
    "pids": process_namespace(),
    "pid": os.getpid(),
    "started": _started(os.getpid()),
  }


def program(path: str) -> str:
  """The name of a command by its argv[0]: of the module, or of the package whose __main__.py it is."""
  name = Path(path or "python")
  return name.parent.name if name.stem == "__main__" else name.stem


def _about_us() -> tuple[str, bytes]:
  token = secrets.token_hex(8)
  command = shlex.join([program(sys.argv[0]), *sys.argv[1:]])[:300]
  since = time.strftime("%Y-%m-%d %H:%M:%S %z")
  facts = {"format": "in2core_jax lock 1", **_identity(), "since": since, "command": command, "token": token}
  return token, (json.dumps(facts) + "\n").encode("utf-8", "backslashreplace")


def _started(pid: Any) -> str | None:
  """When a process was started, in ticks since the boot: a number that is used again has another start."""
  text = _text(f"/proc/{pid}/stat")
  fields = text.rpartition(")")[2].split() if text else []
  return None if len(fields) < 20 or fields[0] in "ZX" else fields[19]


def _text(path: str) -> str | None:
  try:
    return Path(path).read_text(errors="replace").strip()
  except OSError:
    return None


def process_namespace() -> str | None:
  """Names what process numbers are counted in: a container has its own."""
  try:
    return os.readlink("/proc/self/ns/pid")
  except OSError:
    return None


def _parsed(data: bytes) -> dict[str, Any]:
  try:
    found = json.loads(data)
  except (ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def _read(path: epath.Path) -> dict[str, Any] | None:
  """What a lock file says; None where there is none."""
  try:
    return _parsed(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError, PermissionError):
    return None


def is_remote(path: epath.PathLike) -> bool:
  """True for `gs://` and its kin."""
  return "://" in os.fspath(path)


def _key(folder: epath.PathLike) -> str:
  return os.fspath(folder) if is_remote(folder) else os.path.realpath(folder)


# ---- while it is held ----------------------------------------------------------------


def folders() -> list[epath.Path]:
  """The folders that this process holds, the first one first."""
  with _guard:
    return [held.path.parent for held in _held.values()]


def check(path: epath.PathLike) -> None:
  """Before a file is written: whether the folders that it lies in are still this job's, if they were.

  Raises:
    Lost: a folder was removed, or another job has taken it.
  """
  if not _held:
    return
  place = _key(path)
  for key, held in list(_held.items()):
    if place.startswith(key + "/") and not held.is_ours():
      raise Lost(_loss(held))


def lost() -> str | None:
  """What happened to a folder that this process holds: removed, or taken by another job; None: nothing."""
  for held in list(_held.values()):
    if not held.is_ours():
      return _loss(held)
  return None


def _loss(held: _Held) -> str:
  there = _read(held.path)
  if there is None:
    return f"{held.path.parent} was removed, or its {NAME}, while this job wrote there: start the command again"
  return f"{held.path.parent} was taken by process {there.get('pid', '?')} on {there.get('host', '?')} meanwhile"


def release_all() -> None:
  """Frees all folders: the process ends."""
  with _guard:
    while _held:
      _held.popitem()[1].free()


_beating: threading.Thread | None = None


def _start_beating() -> None:
  global _beating
  if _beating is None or not _beating.is_alive():
    _beating = threading.Thread(target=_beat, daemon=True, name="locks")
    _beating.start()


def _beat() -> None:
  while _held:
    time.sleep(_BEAT)
    for held in list(_held.values()):
      if held.descriptor is not None:
        with contextlib.suppress(OSError):  # closed meanwhile; the next write tells what is wrong
          os.utime(held.path)
