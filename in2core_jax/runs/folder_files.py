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
    known = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
    if error.errno in known:
      raise UserError(f"{path}: cannot be made ({error.strerror}); choose another --run_dir") from error
    raise
