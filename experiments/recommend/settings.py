"""The settings of `recommend` and of its calibration, as commands."""

import dataclasses

from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.ranges import COUNT
from in2core_jax.recommendation.settings import RecommendSettings


@dataclasses.dataclass(frozen=True)
class RecommendFlags(RecommendSettings):
  """`recommend`."""


@dataclasses.dataclass(frozen=True)
class CalibrationSettings(RecommendSettings):
  """`recommend.calibration`."""

  run_dir: str = changed(RecommendSettings, "run_dir", "runs/calibration")
  pools: str = setting("recommend", "", "Pools, each as --train_data, between semicolons; empty: --train_data.")
  task_examples: int = setting("recommend", 200, "Most evaluation, and test examples of a task.", within=COUNT)
  tasks: str = setting("recommend", "", "Sources or topics, between semicolons; empty: all that are large enough.")
