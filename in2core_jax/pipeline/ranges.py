"""The numbers that flags may have, in one table: beyond them something overflows, never ends, or means nothing.

A flag with a number needs a row here; `tests/test_flags.py` asks for it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from in2core_jax.errors import UserError

_INT32 = 2**31 - 1
SEED = 2**32 - 1  # JAX's keys take 32 bits: a larger seed would be another name for a smaller one's numbers


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`.

  Attributes:
    low: the smallest.
    high: the largest.
    open_low: whether `low` itself is not among them.
    open_high: whether `high` itself is not among them.
    may_be_unset: whether not-a-number stands for "not set".
  """

  low: float
  high: float
  open_low: bool = False
  open_high: bool = False
  may_be_unset: bool = False

  def holds(self, value: float) -> bool:
    """Whether a number is in the range; not-a-number is not, unless it means "not set"."""
    if value != value:
      return self.may_be_unset
    low = value > self.low if self.open_low else value >= self.low
    return low and (value < self.high if self.open_high else value <= self.high)

  def __str__(self) -> str:
    """In words."""
    low = f"above {self.low:.17g}" if self.open_low else f"at least {self.low:.17g}"
    return f"{low} and {'below' if self.open_high else 'at most'} {self.high:.17g}"


_COUNT, _LIMIT = Range(1, _INT32), Range(0, _INT32)
_SHARE, _STEPS = Range(0, 1, open_low=True), Range(1, 10**6)
_POSITIVE = Range(0, 1e9, open_low=True)

NUMBERS: Mapping[str, Range] = {
  "seed": Range(0, SEED),
  "process_id": Range(-1, 2**20),
  "num_processes": Range(0, 2**20),
  "boundary_cache_gb": Range(0, 1e6),
  "batch_tokens": Range(1, 2**24),
  "microbatch": Range(1, 2**16),
  "shard_batches": _COUNT,
  "train_limit": _LIMIT,
  "eval_limit": _LIMIT,
  "test_limit": _LIMIT,
  "limit_block": _LIMIT,
  "target_queries": _COUNT,
  "target_tests": _COUNT,
  "max_length": Range(1, 2**24),
  "max_shapes": Range(1, 1000),
  "lora_rank": Range(1, 2**14),
  "learning_rate": Range(0, 1000),
  "epochs": Range(0, 1e6, open_low=True),
  "steps": Range(0, 10**7),
  "batch_size": Range(1, 2**16),
  "warmup_ratio": Range(0, 1),
  "weight_decay": Range(0, 1000),
  "max_grad_norm": Range(0, 1e9),
  "checkpoint_every": _COUNT,
  "keep_checkpoints": _LIMIT,
  "ekfac_examples": _LIMIT,
  "damping": Range(0, 1e9, may_be_unset=True),
  "damping_ratio": Range(0, 1e9),
  "depth": _STEPS,
  "repeat": _STEPS,
  "scale": Range(0, 1e30, open_low=True, may_be_unset=True),
  "solver_tol": _POSITIVE,
  "average": Range(0, 1, open_high=True),
  "curvature_examples": _COUNT,
  "curvature_batch": Range(1, 2**16),
  "fraction": _SHARE,
  "num_examples": _LIMIT,
  "token_budget": Range(0, 2**53),
  "query_block": Range(1, 2**16),
  "sketch_size": Range(1, 4096),
  "check_examples": Range(1, 2**16),
  "curve_every": _STEPS,
  "cg_steps": _STEPS,
  "krylov": _STEPS,
  "mislabelled": Range(0, 1, open_high=True),
  "halves": Range(1, 10**5),
  "halves_again": Range(0, 10**5),
  "ablate_examples": _COUNT,
  "folds": Range(1, 10**4),
  "kills": Range(1, 10**4),
  "rounds": Range(1, 10**4),
  "synthetic_length": Range(0, 2**20),
}

# Lists: whether their numbers are whole, the range of each, and what stands between them.
LISTS: Mapping[str, tuple[type, Range, str]] = {
  "seeds": (int, Range(0, SEED), ","),
  "fixed_seeds": (int, Range(0, SEED), ","),
  "fractions": (float, _SHARE, ","),
  "split": (float, Range(0, 1), ","),
  "compare_ratios": (float, _POSITIVE, ","),
  "agreement_ratios": (float, _POSITIVE, ","),
  "lds_ratios": (float, _POSITIVE, ","),
  "left_out": (float, _SHARE, ","),
  "model_rates": (float, Range(0, 1000, open_low=True), ";"),
  "ablate_counts": (int, Range(1, 10**4), ","),
  "memory_examples": (int, _COUNT, ","),
  "device_counts": (int, Range(1, 2**20), ","),
}

# Words with numbers in them, such as data:4, last:8, 3: what reads them knows their limits, but not such numbers.
_MOST_DIGITS = 9
WORDS = (
  *("mesh", "hardware", "layers", "trainable_layers", "mislabelled_layers", "lds_layers", "model_layers"),
  *("model_trains", "ablate_retrain", "ablate_measure", "score_layers", "hold_out_topics"),
)


def check(values: Mapping[str, Any]) -> None:
  """Refuses numbers out of their ranges.

  Args:
    values: flags by name; those that are no numbers are passed over.

  Raises:
    UserError: names the flag, its value and the range.
  """
  for name, allowed in NUMBERS.items():
    value = values[name]
    if not isinstance(value, str) and not allowed.holds(value):
      raise UserError(f"--{name}={value} must be a number that is {allowed}")
  for name, (kind, allowed, separator) in LISTS.items():
    parts = [part.strip() for part in values[name].split(separator) if part.strip()]
    wrong = next((part for part in parts if not _is_in(part, kind, allowed)), None)
    if wrong is not None:
      what = "whole numbers" if kind is int else "numbers"
      raise UserError(f"--{name}={_cut(values[name])}: {_cut(wrong)!r} is wrong in this list of {what}, each {allowed}")
  for name in ("seeds", "fixed_seeds"):
    found = [int(part) for part in values[name].split(",") if part.strip()]
    if len(set(found)) < len(found):
      raise UserError(f"--{name}={_cut(values[name])}: a seed is given twice")
  for name in WORDS:
    if re.search(rf"\d{{{_MOST_DIGITS + 1}}}", values[name]):
      raise UserError(f"--{name}={_cut(values[name])} holds a number of more than {_MOST_DIGITS} digits")


def _is_in(text: str, kind: type, allowed: Range) -> bool:
  try:
    value = kind(text)
  except ValueError:  # int() also refuses thousands of digits
    return False
  return allowed.holds(value) and math.isfinite(value)


def _cut(text: str, most: int = 80) -> str:
  return text if len(text) <= most else f"{text[:most]}..."
