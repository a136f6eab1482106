"""The settings of the stage `index`."""

import dataclasses
import functools

from in2core_jax.errors import UserError
from in2core_jax.index.kinds import KINDS
from in2core_jax.index.kinds import NONZEROS as NONZEROS
from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.ranges import Range
from in2core_jax.pipeline.settings import Settings

_index = functools.partial(setting, "index")


@dataclasses.dataclass(frozen=True)
class IndexSettings(Settings):
  """What is kept of each example."""

  run_dir: str = changed(Settings, "run_dir", "runs/index")
  sketch_size: int = changed(Settings, "sketch_size", 0)  # it costs no place on the disk here
  index_size: int = _index(
    512,
    "Numbers kept of each example's gradient.",
    within=Range(1, 2**16),
    more="Two bytes each. generic: 2048 to 8192, a multiple of 4.",
  )
  index_hidden: int = _index(
    128,
    "Numbers kept of each of two views of its hidden states.",
    within=Range(0, 2**16),
    more="auto and hybrid look at them; 0 keeps none.",
  )
  index_basis: str = _index(
    "queries",
    "What the kept directions follow.",
    choices=KINDS,
    more="queries: the evaluation set and a sample of the pool. generic: a random projection, for evaluation sets that "
    "are not known yet.",
  )

  def check(self) -> None:
    """Refuses a size that a generic projection cannot have, before any pass."""
    super().check()
    if self.index_basis == "generic" and self.index_size % NONZEROS:
      raise UserError(f"index_size={self.index_size} of a generic index must be a multiple of {NONZEROS}")
