"""The settings of `study`."""

import dataclasses

from in2core_jax.pipeline.fields import Checked, changed, setting
from in2core_jax.pipeline.settings import Settings


@dataclasses.dataclass(frozen=True)
class RuleSettings(Checked):
  """Which rules of selection are compared."""

  variants: str = setting("study", "", "Rules to compare, separated by semicolons; empty: all.")


@dataclasses.dataclass(frozen=True)
class StudySettings(RuleSettings, Settings):
  """`study`: rules of selection, retrained."""

  run_dir: str = changed(Settings, "run_dir", "runs/study")
  seeds: str = changed(Settings, "seeds", "0,1,2,3,4")
  fixed_seeds: str = changed(Settings, "fixed_seeds", "0,1,2")
