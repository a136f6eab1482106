"""What a `select` run keeps while it is unfinished: a killed one goes on from there, a finished one has removed it."""

from __future__ import annotations

import dataclasses
from typing import Any

from in2core_jax.parallel import processes
from in2core_jax.runs import resumable, run_folder, stopping

FOLDER = "unfinished"


@dataclasses.dataclass(frozen=True)
class Work:
  """The folder `unfinished/` of a run folder.

  Attributes:
    run_dir: the run folder; None keeps nothing.
    shard_batches: as in `resumable.Pieces`.
    folder: in the run folder; one of its own for each of several computations that would name their pieces alike.
  """

  run_dir: run_folder.RunDir | None
  shard_batches: int = 16
  folder: str = FOLDER

  def pieces(self, name: str, **depends_on: Any) -> resumable.Pieces | None:
    """Where a computation keeps its pieces; SIGTERM waits for the end of a piece.

    Args:
      name: of the computation, a folder's name.
      depends_on: what it depends on beyond the run's identity.
    """
    if self.run_dir is None:
      return None
    return resumable.Pieces(
      self.run_dir, f"{self.folder}/{name}", depends_on, self.shard_batches, stopping.finish_on_sigterm
    )

  def remove(self, name: str = "") -> None:
    """Removes the pieces of a computation, or all of them; collective."""
    processes.barrier(f"remove {name}")
    if self.run_dir.writer:
      path = self.run_dir.path / self.folder / name
      if path.exists():
        path.rmtree()


NOTHING_KEPT = Work(None)
