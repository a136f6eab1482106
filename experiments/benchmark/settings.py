"""The settings of `benchmark`."""

import dataclasses
import functools
from typing import ClassVar

from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.ranges import COUNT, Each, Range
from in2core_jax.pipeline.settings import Settings

_benchmark = functools.partial(setting, "benchmark")


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings(Settings):
  """`benchmark`: seconds, memory, compilation."""

  shown: ClassVar = ("benchmark", "data", "model", "select", "run")
  run_dir: str = changed(Settings, "run_dir", "runs/benchmark")
  measure: str = _benchmark("times,compile,memory", "What to measure.")
  scaling: bool = _benchmark(
    False, "Instead: the score pass over --device_counts.", more="On a CPU the devices are simulated."
  )
  rounds: int = _benchmark(5, "Times that every pass is measured; medians count.", within=Range(1, 10**4))
  score_layers: str = _benchmark("last:8,last:4,all", "Words of --layers of the score passes.", counts=True)
  memory_examples: str = _benchmark(
    "256,2048", "Training examples whose score passes' memory is compared.", each=Each(int, COUNT)
  )
  device_counts: str = _benchmark("1,2,4,8", "Devices of --scaling.", each=Each(int, Range(1, 2**20)))
  synthetic_length: int = _benchmark(
    0,
    "Above 0: random examples of so many tokens.",
    within=Range(0, 2**20),
    more="In place of data; the second half is the response.",
  )
  shapes: str = _benchmark(
    "",
    "Instead: index and score passes of these models.",
    added=True,
    more="By commas, as --model. Each in processes of its own; what is finished is kept.",
  )
  alone: str = _benchmark(
    "",
    "One measurement in this very process.",
    choices=("", "select", "score", "shape"),
    advanced=True,
    more="The benchmark starts these itself.",
  )
