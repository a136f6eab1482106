"""The settings of `transfer`."""

import dataclasses
import functools

from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.ranges import Each, Range
from in2core_jax.pipeline.settings import Settings

_transfer = functools.partial(setting, "transfer")
_EACH = "One for each model, by semicolons, or one for all."


@dataclasses.dataclass(frozen=True)
class TransferSettings(Settings):
  """`transfer`: one model selects, another one is trained."""

  run_dir: str = changed(Settings, "run_dir", "runs/transfer")
  policy: str = changed(Settings, "policy", "matching")
  score_models: str = _transfer("smollm2", "Models that select, words of --model, by semicolons.")
  model_layers: str = _transfer("", "--layers of each of them; empty: the same.", counts=True, more=_EACH)
  model_trains: str = _transfer(
    "", "--trainable_layers of each, before it scores; empty: the same.", counts=True, more=_EACH
  )
  model_rates: str = _transfer(
    "",
    "--learning_rate of each, before it scores; empty: the same.",
    each=Each(float, Range(0, 1000, open_low=True), ";"),
    added=True,
    more=_EACH,
  )
  score_at: str = _transfer(
    "full", "Whether they score fine-tuned on the full set, or as given.", choices=("full", "base")
  )
