"""What lies in a folder: files below it, links; a folder that is made, or the cause why not."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

from etils import epath

from in2core_jax.errors import UserError
from in2core_jax.runs import files

CHECKPOINT = "checkpoint"  # the folder of a training's checkpoints: they carry their own checksums


def files_below(folder: epath.Path, names: Iterable[str], prefix: str = "") -> Iterator[str]:
  """Files under some names of a folder, as paths below it, but for links and what carries a checksum of its own."""
  for name in names:
    path = folder / name
    if is_link(path) or name == CHECKPOINT or name.endswith((files.SHARD, files.TEMPORARY)) or not path.exists():
      continue
    if path.is_dir():
      yield from files_below(path, sorted(item.name for item in path.iterdir()), f"{prefix}{name}/")
    else:
      yield prefix + name


def is_link(path: epath.Path) -> bool:
  """Whether a local path is a symbolic link."""
  return not files.is_remote(path) and os.path.islink(path)


def make_folder(path: epath.Path) -> None:
  """Makes a folder and those above it.

  Raises:
    UserError: it cannot be made.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    known = (
      errno.EACCES,
      errno.EPERM,
      errno.EROFS,
      errno.ENOENT,
      errno.ENOTDIR,
      errno.EEXIST,
      errno.ENAMETOOLONG,
      errno.ELOOP,
    )
    if error.errno in known:
      raise UserError(f"{path}: cannot be made ({error.strerror}); choose another --run_dir") from error
    raise


def nearest_of(path: epath.Path) -> epath.Path:
  """The path itself, or the nearest one above it that is there."""
  while not path.exists() and path != path.parent:
    path = path.parent
  return path


def is_writable(path: os.PathLike) -> bool:
  """Whether a local path is a folder in which files can be made."""
  return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def check_place(path: epath.Path) -> None:
  """Refuses a folder that cannot be made; makes none.

  Raises:
    UserError: what is to be above it is no folder, or may not be written.
  """
  nearest = nearest_of(path)
  if files.is_remote(path) or nearest == path:  # what is there may be a finished run, which is read alone
    return
  if not is_writable(nearest):
    why = "may not be written" if nearest.is_dir() else "is no folder"
    raise UserError(f"{path}: cannot be made ({nearest} {why}); choose another --run_dir")


def folder_path(path: epath.PathLike) -> epath.Path:
  """The path of a run folder.

  Raises:
    UserError: it cannot be one.
  """
  if not os.fspath(path):
    raise UserError("the run folder's name is empty; give --run_dir=FOLDER")
  path = epath.Path(path)
  if not files.is_remote(path):
    path = path.expanduser()
  try:
    _check_name(path)
    if path.exists() and not path.is_dir():
      raise UserError(f"{path}: a file, not a folder; choose another --run_dir")
    if is_link(path) and not path.exists():
      raise UserError(f"{path}: a symbolic link to nothing; choose another --run_dir")
  except ImportError as error:  # etils asks for the file system's package on first use
    raise UserError(f"{path}: {error}; install it into the environment: pip install gcsfs") from error
  return path


def _check_name(path: epath.Path) -> None:
  """Refuses a local name that the file system knows no folder for: too long, or links in a circle."""
  try:
    if not files.is_remote(path):
      os.stat(path)
  except (FileNotFoundError, NotADirectoryError, PermissionError):
    return
  except OSError as error:
    shown = str(path)[:100]
    raise UserError(f"{shown}: no folder can have this name ({error.strerror}); choose another --run_dir") from error
