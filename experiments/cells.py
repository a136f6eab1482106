"""Finished cells of a long table, so that a killed experiment goes on where it was."""

import logging
import time

from in2core_jax import artifacts

log = logging.getLogger(__name__)


class Cells:
  """Results that are kept in the run folder, each under a hash of what it depends on."""

  def __init__(self, run_dir: artifacts.RunDir):
    self.folder, self.identity = run_dir.folder("cells"), run_dir.identity_sha256

  def path(self, *name) -> tuple:
    """(JSON file, NumPy file) of a cell; `get` writes the first, its caller the second if there is an array to keep."""
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
