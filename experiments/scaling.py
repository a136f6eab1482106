"""The table of docs/scaling.md: what `select` would take with an 8B model on machines that are not here, on paper.

./run.sh scaling

It runs no model: lengths of examples follow a formula, and every row is what `select --dry_run` says of such data.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Sequence

import numpy as np

from experiments import cli
from in2core_jax.costs import hardware
from in2core_jax.data import tokenizing
from in2core_jax.data.records import Record
from in2core_jax.data.subsets import PARTS
from in2core_jax.estimate import dry_run, pricing, stage_phases
from in2core_jax.estimate.pricing import Phase
from in2core_jax.model import hf_config
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.splits import Splits
from in2core_jax.report import table_text

MODEL = pathlib.Path(__file__).parent / "flags" / "llama-3.1-8b.json"
EXAMPLES = (52_000, 1_000_000)
# Lengths as in 5,000 examples of Alpaca with a chat template: median 74 tokens, mean 87, two thirds of them a response.
MEDIAN, SPREAD, RESPONSE_SHARE = 74, 0.58, 0.68
# Every cost is linear in the number of training examples from a few batches on: two samples give start and slope.
SAMPLES = (26_000, 52_000)
OTHERS = 500  # evaluation and test examples


@dataclasses.dataclass(frozen=True)
class Case:
  """A row of the table.

  Attributes:
    hardware: as `--hardware` takes it.
    flags: of select, by name.
  """

  hardware: str
  flags: tuple[tuple[str, object], ...]


def _case(name: str, **flags) -> Case:
  return Case(name, tuple(flags.items()))


CASES = (
  _case("v5e-8", mesh="fsdp:8", layers="last:4"),
  _case("v5e-8", mesh="fsdp:8", layers="last:8", modules="attention"),
  _case("v5p-32", mesh="fsdp:16", layers="last:8"),
  _case("v5p-32", mesh="fsdp:16", layers="all", modules="attention"),
  _case("h100-8", mesh="fsdp:8", layers="last:8"),
  _case("h100-8", mesh="fsdp:8", layers="all", modules="attention"),
)


def lengths(count: int, most: int) -> np.ndarray:
  """Tokens of each of `count` examples: evenly spaced quantiles of a log-normal distribution, 16 to `most`, int64."""
  normal = statistics.NormalDist()
  quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
  return np.clip(np.rint(MEDIAN * np.exp(SPREAD * quantiles)), 16, most).astype(np.int64)


def on_paper(s: Settings, elsewhere: hardware.Hardware, train: int) -> Session:
  """A session whose examples have the formula's lengths, but no words; so there is no tokenizer."""
  counts = {"train": train, "eval": OTHERS, "test": OTHERS}
  splits = Splits({part: _examples(part, counts[part], s.max_length) for part in PARTS})
  return pricing.described_session(s, (hf_config.read_config(MODEL), None), splits, elsewhere)


@functools.cache
def _examples(part: str, count: int, most: int) -> tokenizing.TokenizedDataset:
  found = lengths(count, most)
  responses = np.maximum(1, np.rint(RESPONSE_SHARE * found).astype(np.int64))
  tokens, mask = np.zeros(most, np.int32), np.arange(2 * most) >= most
  records = tuple(Record(f"{part}-{i}", (), "", "", "formula", i + 1) for i in range(count))
  masks = tuple(mask[most - length + response :][:length] for length, response in zip(found, responses, strict=True))
  return tokenizing.TokenizedDataset(
    part, records, tuple(tokens[:length] for length in found), masks, np.zeros(count, bool)
  )


def settings_of(case: Case) -> Settings:
  """The flags of a row."""
  fixed = {"model": f"random:{MODEL}", "dtype": "bfloat16", "batch_tokens": "auto", "boundary_cache": "off"}
  fixed["policy"] = "proponents"  # matching would hold the projected gradients of a million examples
  fixed["solver"] = "lissa"  # cg stops at a tolerance, after how many products nobody knows beforehand
  return Settings(**(fixed | dict(case.flags)))


@functools.cache
def sampled(case: Case, examples: int) -> list[Phase]:
  """The phases of `select` with so many training examples, one by one."""
  s, where = settings_of(case), hardware.on_paper(case.hardware, "bfloat16")
  return stage_phases.select_phases(on_paper(s, where, examples), s)


def phases(case: Case, examples: int) -> list[Phase]:
  """The phases of `select` with so many training examples, extended from two samples."""
  factor = (examples - SAMPLES[0]) / (SAMPLES[1] - SAMPLES[0])
  few, more = (sampled(case, size) for size in SAMPLES)
  return [_extended(a, b, factor) for a, b in zip(few, more, strict=True)]


def _extended(a: Phase, b: Phase, factor: float) -> Phase:
  """a + factor (b - a) in all that grows with the examples."""
  grown = {name: getattr(a, name) + factor * (getattr(b, name) - getattr(a, name)) for name in _GROWING}
  return dataclasses.replace(b, **grown)


_GROWING = ("flops", "host", "disk", "gathered")


def rows(cases: Sequence[Case] = CASES) -> list[dict]:
  """The table."""
  found = []
  for case in cases:
    for examples in EXAMPLES:
      where = hardware.on_paper(case.hardware, "bfloat16")
      estimate = dry_run.Estimate(phases(case, examples), where, float("inf"))
      least, usual, most = estimate.seconds
      found.append(
        {
          "devices": f"{case.hardware} ({where.count} x {where.memory / 1e9:.0f} GB usable)",
          "examples": f"{examples:,}",
          "flags": ", ".join(f"{name}={value}" for name, value in case.flags),
          "TFLOP": round(estimate.flops / 1e12),
          "seconds": round(usual),
          "from": round(least),
          "to": round(most),
          "GB a device": round(max(phase.device_bytes for phase in estimate.phases) / 1e9, 1),
          "disk GB": round(sum(phase.disk for phase in estimate.phases) / 1e9, 3),
          "fits": not estimate.too_large(),
        }
      )
  return found


def main(_) -> None:
  """Prints the table."""
  print(table_text.markdown_table(rows()))


if __name__ == "__main__":
  cli.run(main)
