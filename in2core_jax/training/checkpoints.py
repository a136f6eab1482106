"""A training's checkpoints: Orbax keeps the arrays, a note beside them says what they are of and what they hash to.

  FOLDER/STEP/state   Orbax's own files: {"sub": trained parameters, "optimizer": state}
  FOLDER/STEP/meta    the note: what the training depends on, its losses so far, sha256 of both trees; sealed
  FOLDER/STEP/files.sha256   of all files of a local checkpoint, as `sha256sum -c` reads it

Weights are hashed as arrays, value by value: whatever has changed on the disk shows when they are read, and the same
weights have the same name on any mesh. The files are hashed too, because readers of damaged ones print tracebacks from
threads of their own. Notes of older versions have no hashes: their weights are taken as they are, with a warning.
"""

import dataclasses
import functools
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from in2core_jax.errors import UserError
from in2core_jax.parallel import processes
from in2core_jax.runs import files, resumable, run_folder

log = logging.getLogger(__name__)

_FILES = "files.sha256"
_AGAIN = "run that finetune command again, which mends the last checkpoint (for an older step, with --overwrite)"


@dataclasses.dataclass(frozen=True)
class Note:
  """What is known of a checkpoint.

  Attributes:
    meta: what the training depends on and how to use it.
    losses: of the steps so far.
    sha256: hashes of the trees "sub" and "optimizer"; empty in notes of older versions.
  """

  meta: dict[str, Any]
  losses: list[float]
  sha256: dict[str, str]


def steps(folder: epath.PathLike) -> list[int]:
  """Steps of the checkpoints in a folder, in order."""
  with ocp.CheckpointManager(files.absolute(folder)) as manager:
    return sorted(manager.all_steps())


def save(manager: ocp.CheckpointManager, step: int, trees: dict[str, Any], meta: dict, losses: list[float]) -> None:
  """Writes a checkpoint, each process its own part; Orbax puts it into place when it is whole. Collective.

  Args:
    manager: of the folder.
    step: how many steps are done.
    trees: "sub" and "optimizer".
    meta: JSON object, what the training depends on.
    losses: of the steps so far.
  """
  hashes = {name: resumable.tree_sha256(tree) for name, tree in trees.items()}
  note = files.sealed({"meta": meta, "losses": list(losses), "sha256": hashes})
  manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(trees), meta=ocp.args.JsonSave(note)))
  manager.wait_until_finished()
  folder = manager.directory / str(step)
  if processes.is_writer() and not files.is_remote(folder):
    files.write_text(
      folder / _FILES, "".join(f"{files.file_sha256(folder / name)}  {name}\n" for name in _names(folder))
    )


def _names(folder: epath.Path) -> list[str]:
  """All files of a local checkpoint but the list of them."""
  paths = (path for path in pathlib.Path(folder).rglob("*") if path.is_file() and path.name != _FILES)
  return sorted(path.relative_to(folder).as_posix() for path in paths)


def _damaged_file(folder: epath.Path) -> str | None:
  """The first file of a checkpoint that is not as it was written; None where all are, or where there is no list."""
  if files.is_remote(folder) or not (folder / _FILES).exists():
    return None
  for line in (folder / _FILES).read_bytes().decode(errors="replace").splitlines():
    sha256, _, name = line.partition("  ")
    path = folder / name
    if not path.is_file() or files.file_sha256(path) != sha256:
      return name
  return None


def read_note(folder: epath.PathLike, step: int) -> Note:
  """The note of a checkpoint.

  Raises:
    UserError: it is missing, damaged, or none of ours.
  """
  folder = files.absolute(folder)
  place = f"--checkpoint={folder}: the note of step {step}"
  try:
    with ocp.CheckpointManager(folder) as manager:
      found = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
  except Exception as error:  # of what is missing or damaged Orbax raises errors of many classes
    raise UserError(
      f"--checkpoint={folder}: {step} is no checkpoint of a finetune run, or a damaged one ({_short(error)}); {_AGAIN}"
    ) from error
  try:
    note, is_sealed = files.unsealed(found, place)
  except UserError as error:
    raise UserError(f"{error}; {_AGAIN}") from error
  if not isinstance(note.get("meta"), dict) or not isinstance(note.get("losses"), list):
    raise UserError(f"{place} is not that of a finetune run: give its `checkpoint` folder")
  if not is_sealed:
    _tell_unchecked(str(folder))
  return Note(note["meta"], note["losses"], note.get("sha256", {}))


def newest(folder: epath.PathLike) -> tuple[int, Note]:
  """(step, note) of the newest checkpoint in a folder.

  Raises:
    UserError: no such folder, no checkpoint there, or one of another training than its run folder's.
  """
  folder = files.absolute(folder)
  if not folder.is_dir():
    raise UserError(f"--checkpoint={folder}: there is no such folder; give the `checkpoint` folder of a finetune run")
  there = steps(folder)
  if not there:
    raise UserError(
      f"--checkpoint={folder}: no checkpoint in this folder; give the `checkpoint` folder of a finetune run"
    )
  step, note = there[-1], read_note(folder, there[-1])
  if (folder.parent / run_folder.MANIFEST).exists():
    run = run_folder.RunDir.load(folder.parent)
    if run.identity.get("stage") == "finetune" and note.meta.get("identity") != run.identity_sha256:
      raise UserError(
        f"--checkpoint={folder}: step {step} is of another training than {run_folder.MANIFEST} in the same folder: "
        "fine-tune again with --overwrite"
      )
  return step, note


def restore(folder: epath.PathLike, step: int, like: dict[str, Any], note: Note) -> dict[str, Any]:
  """Trees of a checkpoint, checked against their hashes; the other trees stay on disk.

  Args:
    folder: of checkpoints.
    step: which of them.
    like: "sub" or "optimizer" or both, with the dtypes that were saved; gives shapes and places too.
    note: of the checkpoint.

  Raises:
    UserError: other shapes, or damaged.
  """
  folder = files.absolute(folder)
  wrong = _damaged_file(folder / str(step))
  if wrong is not None:
    raise UserError(f"--checkpoint={folder}: step {step} is damaged ({wrong} is missing or has changed); {_AGAIN}")
  target = jax.tree.map(jnp.asarray, like)
  how = ocp.checkpoint_utils.construct_restore_args(target)
  try:
    with ocp.PyTreeCheckpointer() as reader:
      found = reader.restore(
        folder / str(step) / "state", args=ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
      )
  except Exception as error:  # as in `read_note`; of other shapes too
    raise UserError(
      f"--checkpoint={folder}: its subtree does not fit this model, or step {step} is damaged ({_short(error)}): "
      f"if so, {_AGAIN}"
    ) from error
  check(folder, step, found, note)
  return found


def check(folder: epath.PathLike, step: int, trees: dict[str, Any], note: Note) -> None:
  """Refuses weights that are not those that were saved.

  Raises:
    UserError: a hash does not fit.
  """
  for name, tree in trees.items():
    if note.sha256 and resumable.tree_sha256(tree) != note.sha256.get(name):
      what = "weights" if name == "sub" else "optimiser's state"
      raise UserError(
        f"--checkpoint={folder}: the {what} of step {step} are damaged (their SHA-256 is not the one that was saved); "
        f"{_AGAIN}"
      )


def _short(error: Exception) -> str:
  """The first line of an error, not longer than a line should be."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@functools.cache
def _tell_unchecked(folder: str) -> None:
  """Once for a folder, however often it is read."""
  log.warning("%s: checkpoints of an older version, without checksums: their weights are taken as they are", folder)
