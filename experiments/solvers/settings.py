"""The settings of `solvers`."""

import dataclasses
import functools

from in2core_jax.pipeline.fields import Checked, changed, setting
from in2core_jax.pipeline.ranges import POSITIVE, STEPS, Each, Range
from in2core_jax.pipeline.settings import Settings

_solvers = functools.partial(setting, "solvers")


@dataclasses.dataclass(frozen=True)
class IterationSettings(Checked):
  """How long solvers iterate where several are compared."""

  cg_steps: int = _solvers(30, "Most CG steps.", within=STEPS)
  krylov: int = _solvers(16, "Vectors that low_rank keeps.", within=STEPS)


@dataclasses.dataclass(frozen=True)
class SolversSettings(IterationSettings, Settings):
  """`solvers`: comparison of the solvers."""

  run_dir: str = changed(Settings, "run_dir", "runs/solvers")
  dense: int = _solvers(
    0,
    "Instead: LiSSA steps of a comparison with dense inverses.",
    within=Range(0, STEPS.high),
    added=True,
    more="All solvers, in float64, on a small model and data of their own; docs/oracle.md has 400. 0: not.",
  )
  compare_ratios: str = _solvers("0.1,0.01,0.001", "Damping ratios of the residuals.", each=Each(float, POSITIVE))
  agreement_ratios: str = _solvers(
    "0.1,0.01", "Those of them at which scores are compared.", each=Each(float, POSITIVE)
  )
  curve_every: int = _solvers(5, "LiSSA steps between two residuals.", within=STEPS)
  compare_bfloat16: bool = _solvers(True, "Also score with bfloat16 weights.")
  mislabelled: float = _solvers(
    0.1, "Share of the training examples with shuffled answers.", within=Range(0, 1, open_high=True)
  )
  mislabelled_layers: str = _solvers("last:1", "Layers to train and to search for mislabelled examples.", counts=True)
