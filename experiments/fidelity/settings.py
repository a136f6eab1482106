"""The settings of `fidelity`."""

import dataclasses
import functools

from experiments.solvers.settings import IterationSettings
from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.ranges import POSITIVE, SHARE, Each, Range
from in2core_jax.pipeline.settings import Settings

_fidelity = functools.partial(setting, "fidelity")


@dataclasses.dataclass(frozen=True)
class FidelitySettings(IterationSettings, Settings):
  """`fidelity`: whether the scores predict what retraining gives."""

  run_dir: str = changed(Settings, "run_dir", "runs/fidelity")
  halves: int = _fidelity(64, "Random halves of the training set to retrain on.", within=Range(1, 10**5))
  halves_again: int = _fidelity(
    16,
    "How many of them to retrain with another seed; 0: none.",
    within=Range(0, 10**5),
    more="They give the noise ceiling.",
  )
  lds_solvers: str = _fidelity(
    "identity,datainf,ekfac,low_rank,cg,lissa",
    "Solvers to compare.",
    more="--solver is one of them. "
    "metagradient: exact, through trainings with --seeds; costs one of each seed for every evaluation example.",
  )
  lds_layers: str = _fidelity(
    "last:2;last:1", "Words of --layers to compare, by semicolons; the first is the default.", counts=True
  )
  lds_ratios: str = _fidelity(
    "0.01,0.1", "Damping ratios to compare; the first is the default.", each=Each(float, POSITIVE)
  )
  lds_every: bool = _fidelity(
    True,
    "Compare other layers, dampings and places with every solver.",
    more="false: with --solver and the plain baselines only.",
  )
  lds_at: str = _fidelity(
    "full,base", "Where gradients are taken: base model, or trained on the full set.", more="The first is the default."
  )
  curve_solvers: str = _fidelity("cg,identity", "Solvers whose top examples are left out; empty: no curves.")
  left_out: str = _fidelity(
    "0.05,0.1,0.2,0.3", "Shares of the training examples to leave out.", each=Each(float, SHARE)
  )
