"""Seconds, memory and compilation of the passes that scores, solvers and training are made of, against a forward pass.

./run.sh benchmark --flagfile=experiments/flags/benchmark.flags --train_data=jsonl:ALPACA.json

Writes benchmark.md and benchmark.json into --run_dir.
"""

import dataclasses
import datetime
import logging
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments import flags
from experiments.benchmark import isolated, shapes
from experiments.benchmark.passes import FORWARD, make_rows, measured_session
from experiments.benchmark.settings import BenchmarkSettings
from in2core_jax.costs import hardware, timing
from in2core_jax.errors import UserError, how_many
from in2core_jax.model import weights
from in2core_jax.params import subtree
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import integers, listed, words
from in2core_jax.report import table_text
from in2core_jax.runs import run_folder
from in2core_jax.runs.progress import Progress

log = logging.getLogger(__name__)

PRODUCT = "matrix product"
MEASURES = ("times", "compile", "memory")
# n of the n x n matrices, and how many products in a row: a second on two cores, a tenth of one on an accelerator.
_PRODUCT_SIZE = {"cpu": (4096, 1)}
_PRODUCT_SIZE_ELSEWHERE = (8192, 64)


@dataclasses.dataclass(frozen=True)
class Requirement:
  """A figure that the project promises, for the setting of a flagfile.

  Attributes:
    text: what it is, for people.
    figure: its name among the figures that `figures` makes.
    bound: at most so much; at least so much where `at_least`.
    aim: what would be better still, or None.
    at_least: which way is good.
  """

  text: str
  figure: str
  bound: float
  aim: float | None = None
  at_least: bool = False

  def verdict(self, value: float | None) -> str:
    """Whether a measured value reaches bound and aim."""
    if value is None:
      return "not measured"
    good = lambda limit: value >= limit if self.at_least else value <= limit  # noqa: E731
    if not good(self.bound):
      return "missed"
    return "reached, and the aim" if self.aim is not None and good(self.aim) else "reached"


# experiments/flags/benchmark.flags: float32, two cores, SmolLM2-135M, 64 examples of up to 256 tokens.
ON_CPU = (
  Requirement("score pass, aggregated query, last 8 layers, to forward only", "score last:8", 1.8, 1.6),
  Requirement("the same for the last 4 layers", "score last:4", 1.5, 1.35),
  Requirement("score pass, all layers, to forward only", "score all", 3.2, 3.0),
  Requirement("score pass, attention matrices of all layers, to forward only", "score all, attention", 2.7, 2.3),
  Requirement("index pass, last 8 layers, 512 numbers, to forward only", "index last:8", 1.9, 1.6),
  Requirement("index pass, all layers, 512 numbers, to forward only", "index all", 3.4, 3.0),
  Requirement("LiSSA step, last 4 layers: without boundary cache to with it", "LiSSA last:4 speed-up", 2.0, 3.0, True),
  Requirement("forward only: share of the matrix product's rate", "share of forward only", 0.55, 0.8, True),
  Requirement("peak memory of the score pass: growth with the examples, %", "memory growth", 3.0, 0.0),
  Requirement("compilation of a select run, empty cache, seconds", "compile cold", 60.0, 30.0),
  Requirement("compilation of a select run, filled cache, seconds", "compile warm", 10.0, 5.0),
  Requirement("scores on several devices: largest difference to one", "scaling difference", 1e-5),
)
# experiments/flags/benchmark-accelerator.flags: bfloat16, Llama-3.2-1B's shape, 1,024 tokens, last quarter of layers.
ON_ACCELERATOR = (
  Requirement("tokens/s scored, last 4 of 16 layers", "tokens/s of score last:4", 130e3, None, True),
  Requirement("score pass, last 4: share of the matrix product's rate", "share of score last:4", 0.4, None, True),
  Requirement("peak memory of the score pass: growth with the examples, %", "memory growth", 3.0, 0.0),
  Requirement("scores on several devices: largest difference to one", "scaling difference", 1e-5),
)


@dataclasses.dataclass
class Found:
  """What was measured; empty where it was not asked for.

  Attributes:
    times, compile, memory, scaling: rows of tables.
    figures: name -> number that requirements are about.
  """

  times: list[dict] = dataclasses.field(default_factory=list)
  compile: list[dict] = dataclasses.field(default_factory=list)
  memory: list[dict] = dataclasses.field(default_factory=list)
  scaling: list[dict] = dataclasses.field(default_factory=list)
  figures: dict[str, float] = dataclasses.field(default_factory=dict)


# ---- times ---------------------------------------------------------------------------


def measure_times(
  session: Session, s: BenchmarkSettings, score_layers: list[str]
) -> tuple[list[dict], dict[str, float]]:
  """(rows of the table, figures) of all passes, interleaved."""
  rows = make_rows(session, s, score_layers)
  size, repeat = _PRODUCT_SIZE.get(jax.default_backend(), _PRODUCT_SIZE_ELSEWHERE)
  product, product_flops = timing.matrix_product(size, repeat, jnp.dtype(s.dtype))
  references = {PRODUCT: product, FORWARD: rows[FORWARD].work}
  others = {name: row.work for name, row in rows.items() if name != FORWARD}
  total = (len(references) + len(others)) + s.rounds * (2 * len(references) + len(others))
  with Progress(total, "benchmark", "measurements") as progress:
    timings = timing.interleaved(references, others, s.rounds, lambda name: progress.update(1, now=name))
  flops = {PRODUCT: product_flops} | {name: row.flops for name, row in rows.items()}
  tokens = int(session.splits["train"].num_tokens.sum())
  return time_rows(timings, flops, tokens)


def time_rows(timings: timing.Timings, flops: dict[str, int], tokens: int) -> tuple[list[dict], dict[str, float]]:
  """(rows of the table, figures) from seconds and operations."""
  table, figures = [], {}
  for name in flops:
    seconds = timings.median(name)
    share = timings.ratio(PRODUCT, name) * flops[name] / flops[PRODUCT]
    row = {
      "pass": name,
      "seconds": seconds,
      "to forward only": timings.ratio(name, FORWARD),
      "by operations": flops[name] / flops[FORWARD],
      "tokens/s": round(tokens / seconds),
      "GFLOP/s": flops[name] / seconds / 1e9,
      "% of the matrix product": 100 * share,
    }
    if name == PRODUCT:  # which has no tokens
      row |= dict.fromkeys(("to forward only", "by operations", "tokens/s"))
    else:
      figures |= {name: row["to forward only"], f"share of {name}": share, f"tokens/s of {name}": tokens / seconds}
    table.append(row)
  for name in flops:
    if f"{name}, boundary cache" in flops:
      figures[f"{name} speed-up"] = timings.ratio(name, f"{name}, boundary cache")
  return table, figures


# ---- report --------------------------------------------------------------------------


def verdicts(figures: dict[str, float], platform: str) -> list[dict]:
  """The table of what was asked for."""
  return [
    {
      "figure": wanted.text,
      "asked": f"{'at least' if wanted.at_least else 'at most'} {wanted.bound:g}",
      "aim": wanted.aim,
      "measured": figures.get(wanted.figure),
      "verdict": wanted.verdict(figures.get(wanted.figure)),
    }
    for wanted in (ON_CPU if platform == "cpu" else ON_ACCELERATOR)
  ]


def facts(s: BenchmarkSettings) -> dict:
  """Where and on what it was measured."""
  return {
    "date": datetime.date.today().isoformat(),
    "processor": hardware.processor(),
    "load": [round(load, 2) for load in os.getloadavg()],
    **run_folder.device_summary(),
    "model": s.model,
    "dtype": s.dtype,
    "versions": run_folder.package_versions(),
  }


def markdown(found: Found, measured_on: dict, asked: list[dict]) -> str:
  """The report."""
  where = f"{measured_on['num_devices']} x {measured_on['device_kind']} on {measured_on['processor']}"
  jax_version = measured_on["versions"]["jax"]
  text = [
    "# Benchmark\n",
    f"{measured_on['date']}, {where}, {how_many(measured_on['num_cores'], 'core')}, "
    f"load {measured_on['load'][0]} at the end, {measured_on['model'].rsplit('/', 1)[-1]} in {measured_on['dtype']}, "
    f"jax {jax_version}.\n",
  ]
  tables = {"Times": found.times, "Compilation": found.compile, "Memory": found.memory, "Devices": found.scaling}
  for title, table in tables.items():
    if table:
      text.append(f"## {title}\n\n{table_text.markdown_table(table, digits=3)}")
  flagfile = "benchmark.flags on two cores" if measured_on["platform"] == "cpu" else "benchmark-accelerator.flags"
  text.append(f"## What was asked for\n\nOf experiments/flags/{flagfile}, whatever was measured here.\n")
  text.append(table_text.markdown_table(asked, digits=3))
  return "\n".join(text)


# ---- command -------------------------------------------------------------------------


def counts(text: str, name: str) -> list[int]:
  """Reads a comma-separated list of growing numbers above 0."""
  found = list(integers(text, name))
  if not found or sorted(set(found)) != found:
    raise UserError(f"--{name}={text} is not a list of growing numbers above 0, such as 1,2,4")
  return found


def asked_of(s: BenchmarkSettings) -> tuple[list[str], list[str]]:
  """(the words of --measure, those of --score_layers), told before there is a run folder.

  Raises:
    UserError: none of them, one that is unknown, or layers to be measured that the model does not have.
  """
  wanted, score_layers = words(s.measure, "measure", MEASURES), words(s.score_layers, "score_layers")
  if not wanted or not score_layers:
    raise UserError(f"--measure={s.measure} --score_layers={s.score_layers}: give at least one word each")
  num_layers = weights.describe_model(s.model)[0].num_layers
  used = len(score_layers) if "times" in wanted and not s.scaling else int("memory" in wanted or s.scaling)
  for layers in score_layers[:used]:
    subtree.parse_layers(layers, num_layers, "--score_layers")
  return wanted, score_layers


def measure(s: BenchmarkSettings) -> Found:
  """Everything that `--measure` or `--scaling` asks for; processes of their own first, while this one has no device."""
  wanted, score_layers = asked_of(s)
  examples, devices = counts(s.memory_examples, "memory_examples"), counts(s.device_counts, "device_counts")
  found = Found()
  if s.scaling:
    found.scaling = isolated.measure_scaling(s, score_layers[0], devices)
    found.figures["scaling difference"] = max(row["largest difference"] for row in found.scaling)
    return found
  if "compile" in wanted:
    found.compile = isolated.measure_compile(s)
    found.figures |= {f"compile {row['cache']}": row["seconds"] for row in found.compile}
  if "memory" in wanted:
    found.memory = isolated.measure_memory(s, score_layers[0], examples)
    found.figures["memory growth"] = max(row["growth, %"] for row in found.memory)
  if "times" in wanted:
    found.times, figures = measure_times(measured_session(s), s, score_layers)
    found.figures |= figures
  return found


def run(s: BenchmarkSettings) -> str:
  """Measures, prints the tables, writes benchmark.md and benchmark.json; returns the run folder."""
  asked_of(s if not s.shapes else s.replace(model=listed(s.shapes)[0]))
  identity = {"stage": "benchmark", "flags": s.identity("run", "data", "model", "select", "benchmark")}
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.benchmark --flagfile=THIS"])
  if s.shapes:
    return _run_shapes(s, run_dir)
  found, measured_on = measure(s), facts(s)
  asked = verdicts(found.figures, measured_on["platform"])
  text = markdown(found, measured_on, asked)
  run_dir.write_text("benchmark.md", text)
  run_dir.write_json("benchmark.json", {"measured_on": measured_on, "asked": asked} | dataclasses.asdict(found))
  print(text)
  return str(run_dir.path)


def _run_shapes(s: BenchmarkSettings, run_dir: run_folder.RunDir) -> str:
  """Measures --shapes, which end in the same files."""
  rows = shapes.measure_shapes(s, run_dir)
  measured_on = facts(s)
  where = f"{measured_on['num_devices']} x {measured_on['device_kind']}"
  head = f"# Accelerator\n\n{measured_on['date']}, {where}, {s.dtype}, jax {measured_on['versions']['jax']}.\n\n"
  text = head + table_text.markdown_table(rows, digits=3)
  run_dir.write_text("benchmark.md", text)
  run_dir.write_json("benchmark.json", {"measured_on": measured_on, "shapes": rows})
  print(text)
  return str(run_dir.path)


def main(_: Sequence[str]) -> None:
  """Entry point."""
  s = flags.read(BenchmarkSettings)
  if s.alone:
    isolated.run_alone(s, {"select": isolated.select_alone, "score": isolated.score_alone, "shape": shapes.shape_alone})
  else:
    run(s)
