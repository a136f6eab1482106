"""Finished cells of a long table, so that a killed experiment goes on where it was."""

import io
import logging
import time

import numpy as np

from in2core_jax import artifacts
from in2core_jax.errors import UserError

log = logging.getLogger(__name__)


class Cells:
  """Results that are kept in the run folder, each under a hash of what it depends on.

  For one process: each would ask for the file by itself. Commands that use it say `cli.run(main, alone=True)`.
  """

  def __init__(self, run_dir: artifacts.RunDir):
    self.folder, self.identity = run_dir.folder("cells"), run_dir.identity_sha256

  def path(self, *name) -> tuple:
    """(JSON file, NumPy file) of a cell; `get` writes the first, `write_array` the second."""
    stem = artifacts.hash_of([self.identity, *name])[:16]
    return self.folder / f"{stem}.json", self.folder / f"{stem}.npy"

  def get(self, make, *name) -> dict:
    """The stored cell, or make()'s, stored with the seconds that it took unless make() tells its own."""
    file, _ = self.path(*name)
    if not file.exists():
      began = time.perf_counter()
      cell = make() | {"name": list(name)}
      artifacts.write_json(file, {"seconds": round(time.perf_counter() - began, 2)} | cell)
      shown = ", ".join(word for word in map(str, name) if len(word) < 60)  # the rest are lists and settings
      log.info("%s: %.0f s", shown, time.perf_counter() - began)
    return artifacts.read_json(file)

  def write_array(self, array: np.ndarray, *name) -> None:
    """Keeps an array beside a cell; called while the cell is made."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    artifacts.write_bytes(self.path(*name)[1], buffer.getvalue())

  def read_array(self, *name) -> np.ndarray:
    """The array beside a cell.

    Raises:
      UserError: it is not there any more.
    """
    file = self.path(*name)[1]
    if not file.exists():
      shown = ", ".join(map(str, name))
      raise UserError(f"{file} is gone, so {shown} is only known in part: start again with --overwrite")
    return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
