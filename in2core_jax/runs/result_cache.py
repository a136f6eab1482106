"""Finished cells of a long table, so that a killed experiment goes on where it was."""

import io
import logging
import time

import numpy as np

from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

_FOLDER = "cells"


class ResultCache:
  """Results that are kept in the run folder, each under a hash of what it depends on.

  A cell whose file is not as it was written is named and made again. For one process: each would ask for the file by
  itself. Commands that use it say `cli.run(main, alone=True)`.
  """

  def __init__(self, run_dir: run_folder.RunDir, *about, told: bool = True):
    """Of a run folder.

    Args:
      run_dir: keeps the cells.
      about: what all cells depend on beyond its identity.
      told: whether a line says how long each took; False where many short ones are made.
    """
    self._run_dir, self._about, self._level = run_dir, about, logging.INFO if told else logging.DEBUG
    run_dir.folder(_FOLDER)

  def _files(self, *name) -> tuple[str, str]:
    """(JSON file, NumPy file) of a cell, names in the run folder; `get` writes the first, `write_array` the second."""
    stem = f"{_FOLDER}/{run_folder.hash_of([self._run_dir.identity_sha256, *self._about, *name])[:16]}"
    return f"{stem}.json", f"{stem}.npy"

  def get(self, make, *name, with_array: bool = False) -> dict:
    """The stored cell, or make()'s, stored with the seconds that it took unless make() tells its own.

    Args:
      make: gives the cell.
      name: of the cell: what it depends on beyond the run's identity.
      with_array: whether make() writes an array, which is needed too: without it the cell is made again.
    """
    file, array = self._files(*name)
    if not (self._run_dir.holds(file) and (not with_array or self._run_dir.holds(array))):
      began = time.perf_counter()
      cell = make() | {"name": list(name)}
      self._run_dir.write_json(file, {"seconds": round(time.perf_counter() - began, 2)} | cell)
      shown = ", ".join(word for word in map(str, name) if 0 < len(word) < 60)  # the rest are lists and settings
      log.log(self._level, "%s: %.0f s", shown, time.perf_counter() - began)
    return self._run_dir.load_json(file)

  def write_array(self, array: np.ndarray, *name) -> None:
    """Keeps an array beside a cell; called while the cell is made."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    self._run_dir.write_bytes(self._files(*name)[1], buffer.getvalue())

  def read_array(self, *name) -> np.ndarray:
    """The array beside a cell.

    Raises:
      UserError: it is not there any more, or not as it was written.
    """
    return np.load(io.BytesIO(self._run_dir.read_bytes(self._files(*name)[1])), allow_pickle=False)

  def remove_array(self, *name) -> None:
    """Removes the array beside a cell, when nobody needs it any more."""
    self._run_dir.remove(self._files(*name)[1])
