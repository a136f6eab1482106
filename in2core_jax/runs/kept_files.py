"""A local folder of large files that can be made again: which of them are in use, and which go to make room.

A file that is mapped has a shared `flock`, which ends with the mapping. On Linux a mapping outlives its file's name; on
network file systems it may not, so that no file is removed which another process maps.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from in2core_jax.runs.locks import NO_FLOCK

SUFFIX, CHECKSUM = ".bin", ".sha256"
_LONG_UNUSED = 24 * 3600  # seconds, where nobody can tell whether a file is in use


def checksum_file(file: Path) -> Path:
  """Where the checksum of a file lies."""
  return file.with_name(f"{file.name}{CHECKSUM}")


def mapped(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
  """A file as an array that cannot be written; while that is there, `make_room` lets the file be."""
  with file.open("rb") as content:
    try:
      fcntl.flock(content, fcntl.LOCK_SH)
    except OSError as error:
      if error.errno not in NO_FLOCK:
        raise
    return np.memmap(content, dtype, "r", shape=shape)  # has its own copy of the descriptor, and so the lock


def is_in_use(file: Path) -> bool:
  """Whether a process maps a file, as far as can be told."""
  try:
    with file.open("rb+") as content:  # NFS locks exclusively only what can be written
      fcntl.flock(content, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except (BlockingIOError, PermissionError):
    return True
  except OSError as error:
    if error.errno not in NO_FLOCK:
      raise
    return time.time() - _last_used(file) < _LONG_UNUSED
  return False


def held_bytes(folder: Path) -> int:
  """What the files of a folder take."""
  return sum(_size(file) for file in _files(folder))


def make_room(folder: Path, size: int, room: float, must: bool = False) -> list[tuple[Path, int]]:
  """Removes the files that were not used for longest, until `size` bytes more are within the room for all.

  Args:
    folder: that may be missing.
    size: bytes that are to come.
    room: bytes that the folder may take.
    must: whether the file comes in any case: all others go then, where it has no room beside them.

  Returns:
    (file, bytes) of those that went; none where that would not do, for what is in use stays.
  """
  found = sorted(_files(folder), key=_last_used)
  held, removed = sum(map(_size, found)), []
  if held + size <= room:
    return []
  idle = [file for file in found if not is_in_use(file)]
  if not must and held - sum(map(_size, idle)) + size > room:
    return []
  for file in idle:
    if held + size <= room:
      break
    held -= _size(file)
    removed += remove([file])
  return removed


def remove(found: Iterable[Path]) -> list[tuple[Path, int]]:
  """Removes files that nobody uses, and their checksums; returns (file, bytes) of each that went."""
  removed = []
  for file in found:
    if is_in_use(file):
      continue
    removed.append((file, _size(file)))
    for path in (checksum_file(file), file):
      path.unlink(missing_ok=True)
  return removed


def _files(folder: Path) -> list[Path]:
  return sorted(folder.glob(f"[!.]*{SUFFIX}"))


def _size(file: Path) -> int:
  try:
    return file.stat().st_size
  except FileNotFoundError:  # another process has removed it
    return 0


def _last_used(file: Path) -> float:
  """Seconds since the epoch; file systems that note no reading know the writing alone."""
  try:
    known = file.stat()
  except FileNotFoundError:
    return 0.0
  return max(known.st_atime, known.st_mtime)
