"""The settings of `paper`."""

import dataclasses
import functools
from typing import ClassVar

from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.settings import Settings

_paper = functools.partial(setting, "paper")
# Passed on to the experiments; the first ones change no number of a result.
HOW_FAST = ("mesh", "boundary_cache", "boundary_cache_gb", "batch_tokens", "microbatch", "shard_batches")
PASSED = (*HOW_FAST, "seed", "model", "dtype")


@dataclasses.dataclass(frozen=True)
class PaperSettings(Settings):
  """`paper`: all experiments in one command."""

  shown: ClassVar = ("paper", "run_dir", "overwrite", *PASSED)
  run_dir: str = changed(Settings, "run_dir", "runs/paper")
  preset: str = _paper("quick", "For two cores, or for an accelerator.", choices=("quick", "full"))
  alpaca: str = _paper("", "Alpaca JSON file; empty: no experiments on it.")
  only: str = _paper(
    "",
    "Names of experiments, separated by commas; empty: all.",
    more="Those whose results they read are run too, where not finished.",
  )
  results_dir: str = _paper("docs/results", "Folder of the tables and pictures.")
