"""The run folder: who wrote it from what.

A run folder is a folder with a `manifest.json`. The manifest holds the run's *identity*, all that its results depend on
(flags, hashes of data and weights), the names of what was written, and a checksum of each file. A folder is continued
only by a run of the same identity, so results of two settings never mix; a file that is not as it was written is named
and never used.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from in2core_jax.errors import UserError, how_many
from in2core_jax.parallel import processes
from in2core_jax.runs import files, locks

# The words of files and of the record, so that callers need one import.
from in2core_jax.runs.files import canonical_json as canonical_json
from in2core_jax.runs.files import file_sha256 as file_sha256
from in2core_jax.runs.files import hash_of as hash_of
from in2core_jax.runs.files import is_remote as is_remote
from in2core_jax.runs.files import read_json as read_json
from in2core_jax.runs.files import read_parquet as read_parquet
from in2core_jax.runs.files import read_scores as read_scores
from in2core_jax.runs.files import write_bytes as write_bytes
from in2core_jax.runs.files import write_json as write_json
from in2core_jax.runs.files import write_parquet as write_parquet
from in2core_jax.runs.files import write_text as write_text
from in2core_jax.runs.folder_files import CHECKPOINT as CHECKPOINT
from in2core_jax.runs.folder_files import check_place, files_below, folder_path, is_link, make_folder
from in2core_jax.runs.identities import common, difference
from in2core_jax.runs.record import device_summary as device_summary
from in2core_jax.runs.record import flags_bytes
from in2core_jax.runs.record import package_versions as package_versions
from in2core_jax.runs.record import write_flags as write_flags

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOST_LOG = "log_lost.txt"  # what a job had to say when nobody could read it any more; in no manifest
_FORMAT = "in2core_jax run folder 1"


# --- the run folder ---------------------------------------------------------------------------------------------------

_AGAIN = "start the command that wrote it once more, with the same flags: it computes again what is missing or damaged"


@dataclasses.dataclass
class RunDir:
  """An open run folder. Make one with `RunDir.open` (to write) or `RunDir.load` (to read another run's results).

  Attributes:
    path: the folder.
    identity: JSON object: all that the results depend on.
    entries: names in the folder that this project wrote, in the manifest so that `overwrite` removes these, no others.
    checksums: file -> sha256 of what was written last; None for a folder of an older version, which has none. Shards
      and checkpoints carry their own.
    writer: whether this process writes shared files; process 0 of a job does (shards are written by all).
    resumed: whether the folder was there already, of the same identity.
  """

  path: epath.Path
  identity: dict[str, Any]
  entries: list[str] = dataclasses.field(default_factory=list)
  checksums: dict[str, str] | None = dataclasses.field(default_factory=dict)
  writer: bool = True
  resumed: bool = False

  @classmethod
  def open(
    cls, path: epath.PathLike, identity: Mapping[str, Any], overwrite: bool = False, shared: bool = False
  ) -> RunDir:
    """Makes the folder, or continues one of the same identity; collective: the writer of a job comes first.

    Args:
      path: the folder, local or gs://; the processes of a job must all see it.
      identity: JSON object: flags and hashes that the results depend on; not what only says where or how fast.
      overwrite: start anew where another run's results are; removes the files that the manifest names, never others.
      shared: several jobs may write here at once: only for what is the same whoever writes it, each file whole.

    Raises:
      UserError: the folder belongs to a run of another identity, or to no run at all, or another job writes there, or
        a process does not see it. Raised in all processes, so that none waits for one that has stopped.
    """
    opened: list[RunDir] = []
    processes.checked_by_writer(lambda: opened.append(cls._open_locked(path, identity, overwrite, shared)))
    if not processes.all_true(processes.is_writer() or cls._read(folder_path(path)) is not None):
      raise UserError(
        f"{path}: not all processes see the folder that process 0 has made there: give --run_dir a place that all "
        "machines share, gs:// or a shared file system"
      )
    return opened[0] if opened else cls._open(path, identity, False, writer=False)

  @staticmethod
  def refuse_held(path: epath.PathLike) -> None:
    """Refuses a folder that another job writes into, or nobody can make: before the work before `open`. Collective.

    Raises:
      UserError: names the other job, or what is wrong with the place.
    """

    def check() -> None:
      check_place(folder_path(path))
      locks.refuse_held(folder_path(path))

    processes.checked_by_writer(check)

  @classmethod
  def refuse_other(cls, path: epath.PathLike, known: Mapping[str, Any]) -> None:
    """Refuses a folder of another identity by what is known of ours: before the work that the rest takes. Collective.

    Args:
      path: the folder.
      known: a part of the identity; what the folder's has no entry for is left to `open`.

    Raises:
      UserError: which entries differ.
    """

    def check() -> None:
      old = cls._read(folder_path(path))
      if old is not None:
        there, now = common(old.identity, json.loads(canonical_json(known)))
        if there != now:
          raise UserError(difference(path, there, now))

    processes.checked_by_writer(check)

  @classmethod
  def _open_locked(cls, path: epath.PathLike, identity: Mapping[str, Any], overwrite: bool, shared: bool) -> RunDir:
    """`open` in the writer, which alone may write into the folder as long as the opened `RunDir` lives."""
    if shared and not overwrite:
      return cls._open(path, identity, overwrite, writer=True)
    path = folder_path(path)
    if cls._read(path) is None:
      _refuse_foreign(path)
    make_folder(path)
    lock = locks.take(path)
    try:
      opened = cls._open(path, identity, overwrite, writer=True)
    except BaseException:
      lock.release()
      raise
    weakref.finalize(opened, lock.release)
    return opened

  @classmethod
  def _open(cls, path: epath.PathLike, identity: Mapping[str, Any], overwrite: bool, writer: bool) -> RunDir:
    """`open` in one process; the others open the folder after the writer did."""
    path = folder_path(path)
    identity = json.loads(canonical_json(identity))
    old = cls._read(path)
    if old is None:
      _refuse_foreign(path)
    elif overwrite and writer:
      old._remove_entries()
      old = None
    elif old.identity != identity:
      raise UserError(difference(path, old.identity, identity))
    run_dir = cls(path, identity, writer=writer, resumed=old is not None)
    if old is not None:
      run_dir.entries, run_dir.checksums = old.entries, old.checksums
    if writer:
      make_folder(path)
      for folder in (path, *(path / name for name in run_dir.entries)):
        if folder.is_dir() and not is_link(folder):
          files.remove_leftovers(folder)
      if old is None:
        run_dir._write_manifest()
      elif old.checksums is None:
        run_dir._adopt()
    return run_dir

  @classmethod
  def load(cls, path: epath.PathLike) -> RunDir:
    """Opens a finished or running run's folder to read from it.

    Raises:
      UserError: there is no run folder.
    """
    path = folder_path(path)
    old = cls._read(path)
    if old is None:
      raise UserError(f"{path}: not a run folder (no {MANIFEST}); give the --run_dir of an earlier run")
    if old.checksums is None:
      _tell_unchecked(path)
    return old

  @classmethod
  def _read(cls, path: epath.Path) -> RunDir | None:
    if not (path / MANIFEST).exists():
      return None
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
      raise UserError(f"{path / MANIFEST}: not the manifest of a run folder; choose another --run_dir")
    try:
      manifest, is_sealed = files.unsealed(manifest, str(path / MANIFEST))
    except UserError as error:
      raise UserError(f"{error}: remove that folder, or choose another --run_dir") from error
    identity, entries, checksums = (manifest.get(name) for name in ("identity", "entries", "checksums"))
    old = not is_sealed and checksums is None
    fits = hash_of(identity) == manifest.get("identity_sha256")
    if not fits or not isinstance(entries, list) or not (old or is_sealed and isinstance(checksums, dict)):
      raise UserError(
        f"{path / MANIFEST}: damaged or changed by hand (its checksums do not fit): remove that folder, or choose "
        "another --run_dir"
      )
    return cls(path, identity, entries, checksums, writer=False, resumed=True)

  @property
  def identity_sha256(self) -> str:
    """Hash that names everything computed in this folder."""
    return hash_of(self.identity)

  def _write_manifest(self) -> None:
    manifest = {
      "format": _FORMAT,
      "identity_sha256": self.identity_sha256,
      "identity": self.identity,
      "entries": self.entries,
      "checksums": dict(sorted((self.checksums or {}).items())),
    }
    write_json(self.path / MANIFEST, files.sealed(manifest))

  def _adopt(self) -> None:
    """Takes the files of a folder from before there were checksums as they are, and notes theirs from now on."""
    names = list(files_below(self.path, self.entries))
    self.checksums = {name: file_sha256(self.path / name) for name in names}
    self._write_manifest()
    log.warning(
      "%s: of an older version, without checksums: taken as they are: %s", self.path, how_many(len(names), "file")
    )

  def _remove_entries(self) -> None:
    """Removes what the manifest names, but not the manifest: a kill in between leaves a run folder."""
    for name in [*self.entries, LOST_LOG]:
      if "/" in name or name in ("", ".", ".."):
        raise UserError(f"{self.path / MANIFEST}: the entry {name!r} is not a name; choose another --run_dir")
      entry = self.path / name
      if entry.is_dir() and not is_link(entry):
        entry.rmtree()
      else:
        entry.unlink(missing_ok=True)

  def file(self, name: str, sha256: str | None = None) -> epath.Path:
    """The path of a file or folder in the run folder, noted in the manifest as ours before it exists.

    Writers that do not go through this class and have checksums of their own (Orbax, shards) ask here for their path.
    `name` may hold folders: `plots/curve.svg`. A checksum is noted before its file is written: what a kill leaves in
    between is a file that is missing or does not fit, never one that is trusted too early.
    """
    top = name.split("/")[0]
    assert top not in ("", ".", "..", MANIFEST), name
    noted = (list(self.entries), dict(self.checksums or {}))
    if top not in self.entries:
      self.entries = sorted([*self.entries, top])
    if sha256 is not None:
      self.checksums = (self.checksums or {}) | {name: sha256}
    if self.writer and noted != (self.entries, self.checksums or {}):
      self._write_manifest()
    return self.path / name

  def wrote(self, name: str) -> bool:
    """Whether a file is a part of the run, which may be damaged or gone by now."""
    return (self.path / name).exists() if self.checksums is None else name in self.checksums

  def remove(self, name: str) -> None:
    """Removes a file that is not needed any more, where there is one; it is no longer a part of the run."""
    if self.writer:
      (self.path / name).unlink(missing_ok=True)
      if (self.checksums or {}).pop(name, None) is not None:
        self._write_manifest()

  def distrust(self, name: str, data: bytes | None = None) -> str | None:
    """Why a file is not to be used, in words, or None where it is as it was written.

    Args:
      name: of the file.
      data: its bytes; read when None.

    Raises:
      UserError: a folder has its place, which nothing can be written over.
    """
    path = self.path / name
    if data is None and not path.exists():
      return "missing"
    if data is None and name in (self.checksums or {}) and path.is_dir():
      raise UserError(f"{path}: a folder where a file of this run belongs; move it away")
    if self.checksums is None:
      return None
    if name not in self.checksums:
      return f"not written by this run ({MANIFEST} has no checksum of it)"
    found = file_sha256(path) if data is None else files.bytes_sha256(data)
    if found != self.checksums[name]:
      return f"damaged or changed since it was written (its SHA-256 is not that of {MANIFEST})"
    return None

  def holds(self, name: str) -> bool:
    """Whether a file is there and as it was written, for all processes as the writer sees it; collective.

    One that is not to be used is named in a warning: the caller computes it again.
    """
    reason = self.distrust(name) if processes.is_writer() else None
    if reason and ((self.path / name).exists() or name in (self.checksums or {})):
      log.warning("%s: %s; it is computed again", self.path / name, reason)
    return processes.from_writer(reason is None)

  def is_whole(self, mark: str) -> bool:
    """Whether a run is finished: its last file is there, and all files of the manifest are as they were written.

    What is not is named in a warning: the caller computes it again. Collective.

    Args:
      mark: the file that was written last.
    """
    if not self.holds(mark):
      return False
    wrong = self.damaged() if processes.is_writer() else {}
    for name, reason in wrong.items():
      log.warning("%s: %s; it is computed again", self.path / name, reason)
    return processes.from_writer(not wrong)

  def damaged(self) -> dict[str, str]:
    """Files of the manifest that are missing or not as they were written, each with the reason. Reads all of them."""
    reasons = {name: self.distrust(name) for name in sorted(self.checksums or {})}
    return {name: reason for name, reason in reasons.items() if reason is not None}

  def folder(self, name: str) -> epath.Path:
    """Like `file`, and makes the folder."""
    path = self.file(name)
    path.mkdir(parents=True, exist_ok=True)
    return path

  def write_bytes(self, name: str, data: bytes) -> None:
    """`write_bytes` into the run folder; does nothing on a process that is not the writer. So do the four below."""
    if self.writer:
      write_bytes(self.file(name, files.bytes_sha256(data)), data)

  def write_text(self, name: str, text: str) -> None:
    """`write_text` into the run folder."""
    self.write_bytes(name, files.text_bytes(text))

  def write_json(self, name: str, obj: Any) -> None:
    """`write_json` into the run folder."""
    if self.writer:
      self.write_bytes(name, files.json_bytes(obj))

  def write_parquet(self, name: str, columns: Mapping[str, Any]) -> None:
    """`write_parquet` into the run folder."""
    if self.writer:
      self.write_bytes(name, files.parquet_bytes(columns))

  def write_streamed(self, name: str, write: Callable[[BinaryIO], None]) -> None:
    """`write_streamed` into the run folder."""
    if self.writer:
      files.write_streamed(self.path / name, write, lambda sha256: self.file(name, sha256))

  def write_flags(self, name: str, flags: Iterable[str], header: Iterable[str] = ()) -> None:
    """`write_flags` into the run folder."""
    self.write_bytes(name, flags_bytes(flags, header))

  def read_bytes(self, name: str) -> bytes:
    """A file of the folder, checked against its checksum. So do the three below.

    Raises:
      UserError: it is missing, or not as it was written.
    """
    path = self.path / name
    try:
      data = path.read_bytes()
    except FileNotFoundError as error:
      raise UserError(f"{path}: no such file; {_AGAIN}") from error
    reason = self.distrust(name, data)
    if reason is not None:
      raise UserError(f"{path}: {reason}; {_AGAIN}")
    return data

  def load_json(self, name: str) -> Any:
    """A JSON file of the folder, read by this process."""
    return files.parse_json(self.read_bytes(name), self.path / name)

  def read_parquet(
    self, name: str, required: Sequence[str] = (), only: Sequence[str] | None = None, repeated: Sequence[str] = ()
  ) -> dict[str, np.ndarray]:
    """`read_parquet` of a table of the folder."""
    return files.parse_parquet(self.read_bytes(name), self.path / name, required, only, repeated)

  def read_scores(self, name: str) -> dict[str, np.ndarray]:
    """`read_scores` of a table of the folder."""
    return files.checked_scores(self.read_parquet(name, required=files.SCORE_COLUMNS), self.path / name)

  def read_json(self, name: str) -> Any:
    """`load_json` in every process, as the writer reads it; collective."""
    return processes.from_writer(self.load_json(name) if processes.is_writer() else None)


def hold(folder: epath.PathLike) -> locks.Lock:
  """Makes a folder that several run folders lie in, and takes it for this job; collective.

  Raises:
    UserError: another job has it, or it cannot be made; in all processes.
  """
  taken = []

  def take() -> None:
    make_folder(folder_path(folder))
    taken.append(locks.take(folder_path(folder)))

  processes.checked_by_writer(take)
  return taken[0] if taken else locks.Lock(None)


def beside(run_dir: epath.PathLike, name: str) -> epath.Path:
  """A folder beside a run folder, for what several runs use: local or gs://, as the run folder is."""
  return files.absolute(run_dir).parent / name


@functools.cache
def _tell_unchecked(path: epath.Path) -> None:
  """Once for a folder, however often it is read."""
  log.warning("%s: of an older version, without checksums: its files are taken as they are", path)


def _refuse_foreign(path: epath.Path) -> None:
  """A folder with files and no manifest is somebody else's."""
  names = (
    sorted(item.name for item in path.iterdir() if not item.name.endswith((files.TEMPORARY, locks.NAME)))
    if path.exists()
    else []
  )
  if names:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise UserError(
      f"{path}: holds {how_many(len(names), 'file')} ({shown}) and no {MANIFEST}, so it is not a run folder; "
      "choose an empty or new --run_dir"
    )
