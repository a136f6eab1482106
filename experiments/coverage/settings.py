"""The settings of `coverage`."""

import dataclasses
import functools

from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.ranges import Range
from in2core_jax.pipeline.settings import Settings

_coverage = functools.partial(setting, "coverage")


@dataclasses.dataclass(frozen=True)
class CoverageSettings(Settings):
  """`coverage`: which test points the training set does not cover."""

  run_dir: str = changed(Settings, "run_dir", "runs/coverage")
  layers: str = changed(Settings, "layers", "last:2")
  trainable_layers: str = changed(Settings, "trainable_layers", "last:2")
  solver: str = changed(Settings, "solver", "identity")
  hold_out_topics: str = _coverage(
    "3", "Topics that a fold removes: how many, or their names.", counts=True, more="Names make one fold."
  )
  folds: int = _coverage(3, "Sets of held-out topics.", within=Range(1, 10**4))
  coverage_signal: str = _coverage("maximum cosine, trained", "Signal by which test points are listed.")
