"""The settings of `targets`."""

import dataclasses
import functools

from experiments.study.settings import RuleSettings
from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.ranges import COUNT, Range
from in2core_jax.pipeline.settings import Settings

BASE, WARM, FULL = MODELS = ("base", "warm", "full")

_targets = functools.partial(setting, "targets")


@dataclasses.dataclass(frozen=True)
class TargetsSettings(RuleSettings, Settings):
  """`targets`: what rules find in a mixed pool."""

  run_dir: str = changed(Settings, "run_dir", "runs/targets")
  fractions: str = changed(Settings, "fractions", "0.1")
  equal: str = changed(Settings, "equal", "epochs")
  targets: str = _targets(
    "", "Wanted sources or topics.", more="Semicolons between targets, commas between the parts of one."
  )
  target_queries: int = _targets(60, "Most evaluation examples of a target.", within=COUNT)
  target_tests: int = _targets(120, "Most test examples of a target.", within=COUNT)
  retrained: str = _targets("", "Which of --variants to train on; empty: none.")
  retrained_targets: str = _targets("", "Which of --targets --retrained is for; empty: all.")
  with_siblings: bool = _targets(
    False, "Other JSON files beside those of --train_data are sources, too.", more="In the order of their names."
  )
  absent: str = _targets(
    "", "Sources or topics that are taken out of the pool.", more="As a target they have nothing in it."
  )
  recommend_minutes: float = _targets(
    0.0, "Minutes of recommend for each target; 0: no row of its choices.", within=Range(0, 1e6)
  )
  gradients_at: str = _targets(
    BASE,
    f"Where rules take gradients, instead of at the base model: some of {', '.join(MODELS)}.",
    more="warm: trained on a random 5 % for four epochs; full: on all of the pool. Several: the mean similarity.",
  )
  choices_of: str = _targets(
    "", "Finished targets run of another model on the same pool.", more="What it chose is trained on and judged, too."
  )
