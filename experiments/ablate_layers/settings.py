"""The settings of `ablate_layers`."""

import dataclasses
import functools

from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.ranges import COUNT, Each, Range
from in2core_jax.pipeline.settings import Settings

_ablate = functools.partial(setting, "ablate_layers")


@dataclasses.dataclass(frozen=True)
class AblateLayersSettings(Settings):
  """`ablate_layers`: how many layers are enough."""

  run_dir: str = changed(Settings, "run_dir", "runs/ablate_layers")
  ablate_counts: str = _ablate(
    "1,2,4,8,16", "Numbers of layers; all layers are always there.", each=Each(int, Range(1, 10**4))
  )
  ablate_positions: str = _ablate("last,first,middle,spread", "Where they are; spread: evenly.")
  ablate_modules: str = _ablate("all,attention,mlp", "Words of --modules, each alone.")
  ablate_solvers: str = _ablate(
    "identity,datainf", "Solvers.", more="Choices of these two share one pass, any other is run for each choice."
  )
  ablate_retrain: str = _ablate(
    "last:1,last:8",
    "Choices to retrain, as last:8 or spread:4/attention; empty: none.",
    counts=True,
    more="Besides all layers and the cheapest choices that agree, up to the first that is enough.",
  )
  ablate_measure: str = _ablate(
    "last:8",
    "Choices whose score pass is measured; empty: none.",
    counts=True,
    more="In a separate process, besides all layers and the choice that is enough.",
  )
  ablate_examples: int = _ablate(64, "Training examples of a measured score pass.", within=COUNT)
