"""The settings of `recommend`: those of all stages, with defaults for many short trainings, and its own."""

import dataclasses
import functools
from typing import ClassVar

from in2core_jax.errors import UserError
from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.lists import words
from in2core_jax.pipeline.ranges import Range
from in2core_jax.pipeline.settings import Settings
from in2core_jax.recommendation.rules import RULES

_recommend = functools.partial(setting, "recommend")


def _here(name: str, default: str, text: str, more: str = ""):
  """A field of `Settings` that means something narrower here."""
  known = Settings.__dataclass_fields__[name].metadata
  return dataclasses.field(default=default, metadata=known | {"help": text, "more": more})


FEW = 60  # evaluation, and test examples of `in_little`
_IN_LITTLE = {"rules": "bm25", "fractions": "0.05", "seeds": "0,1", "minutes": 1e6}  # so little that no clock is needed


@dataclasses.dataclass(frozen=True)
class RecommendSettings(Settings):
  """Rules tried on the user's own data."""

  shown: ClassVar = ("recommend", "fractions", "equal", "seeds", "budget", "data", "model", "finetune", "run")
  minutes: float = _recommend(
    20.0,
    "Most minutes that it may take.",
    within=Range(0, 1e6, open_low=True),
    more="What does not fit is left out, with a message. The same command with more minutes continues there.",
  )
  rules: str = _recommend(
    ",".join(RULES),
    "Rules to try, the most promising first; the last ones are left out first if time is short.",
    more="Random, length-matched random and the longest examples, full data and full data without duplicates are "
    "always tried.",
  )
  run_dir: str = changed(Settings, "run_dir", "runs/recommend")
  budget: str | float | int = _here(
    "budget", "1.0", "Most that the answer may keep: 0.1 (share) or 500 (examples); 1.0: all of it."
  )
  fractions: str = _here(
    "fractions", "0.05,0.1,0.25,0.5", "Budgets to try, as shares.", "Those above --budget are not, and --budget is."
  )
  equal: str = changed(Settings, "equal", "epochs")
  seeds: str = _here("seeds", "0,1,2,3,4", "Seeds of halves, data order and random sets; as many as there is time for.")
  layers: str = changed(Settings, "layers", "last:4")
  trainable_layers: str = changed(Settings, "trainable_layers", "last:4")

  def check(self) -> None:
    """Refuses rules that there are not."""
    super().check()
    if not words(self.rules, "rules", RULES):
      raise UserError(f"rules= is empty: name one or several of {', '.join(RULES)}")


def in_little(s: Settings, run_dir: str) -> RecommendSettings:
  """What the demo ends in: one rule, one small budget, trainings of a few steps.

  Args:
    s: the flags of the demo.
    run_dir: of the recommendation.
  """
  return RecommendSettings.of(s, "run", "data", "model", "finetune", **_IN_LITTLE | {"run_dir": run_dir})
