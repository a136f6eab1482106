"""Models of several shapes on the devices that are here: rates, share of the peak, memory, compilation, agreement.

./run.sh benchmark --flagfile=experiments/flags/accelerator.flags

Every shape runs twice in processes of its own, from an empty compilation cache and from the one that the first has
filled. What is finished stays in the run folder, so that the same command goes on. Scores of the first shape are
compared with those of this machine's CPU in float32.
"""

import pathlib
import tempfile

import jax
import numpy as np

from experiments.benchmark import isolated
from experiments.benchmark.passes import FORWARD, Rows, measured_session
from experiments.benchmark.settings import BenchmarkSettings
from in2core_jax.costs import hardware, timing
from in2core_jax.evaluation import statistics
from in2core_jax.pipeline.settings import listed
from in2core_jax.runs import run_folder

_COMPARED = 16  # examples whose scores are compared with a CPU's


# ---- inside the process --------------------------------------------------------------


def shape_alone(s: BenchmarkSettings) -> dict:
  """Passes of one shape through its whole model: seconds, operations, compilation, memory."""
  rows, layers = Rows(measured_session(s, 1)), listed(s.score_layers)[0]
  made = {FORWARD: rows.forward(), f"score {layers}": rows.score(rows.chosen(layers), False)}
  made[f"index {layers}"] = rows.index(layers)
  with timing.CompileMeter() as meter:
    for row in made.values():
      row.work()
  timing.reset_peak_memory()
  works = {name: row.work for name, row in made.items() if name != FORWARD}
  found = timing.interleaved({FORWARD: made[FORWARD].work}, works, s.rounds, lambda _: None)
  device = jax.devices()[0]
  return {
    "device": f"{device.platform}: {device.device_kind}",
    "tokens": rows.tokens,
    "compilation": meter.compile_seconds + meter.lower_seconds,
    "peak memory": timing.peak_memory(),
    "passes": {name: {"seconds": found.median(name), "flops": row.flops} for name, row in made.items()},
  }


# ---- outside -------------------------------------------------------------------------


def measure_shapes(s: BenchmarkSettings, run_dir: run_folder.RunDir) -> list[dict]:
  """A row for each shape and pass."""
  table = []
  for number, model in enumerate(listed(s.shapes)):
    file = f"shapes/{pathlib.Path(model).stem}-{run_folder.hash_of(model)[:8]}.json"
    if not run_dir.holds(file):
      run_dir.folder("shapes")
      run_dir.write_json(file, _one(s.replace(model=model), compares=number == 0))
    table += rows_of(pathlib.Path(model).stem, run_dir.load_json(file), s.dtype)
  return table


def rows_of(name: str, found: dict, dtype: str) -> list[dict]:
  """The rows of one shape; the share of the peak where the chip's data sheet is known."""
  warm = found["warm"]
  peak = peak_of(warm["device"], dtype)
  rows = []
  for what, one in warm["passes"].items():
    rate = one["flops"] / one["seconds"]
    row = {"shape": name, "pass": what, "seconds": one["seconds"], "tokens/s": round(warm["tokens"] / one["seconds"])}
    row |= {"TFLOP/s": rate / 1e12, "% of the peak": 100 * rate / peak if peak else None}
    rows.append(row)
  about = {"peak memory, GB": warm["peak memory"] / 1e9}
  about |= {f"compilation {cache}, s": found[cache]["compilation"] for cache in ("cold", "warm")}
  return [rows[0] | about | {"Spearman with a CPU": found["agreement"]}, *rows[1:]]


def peak_of(device: str, dtype: str) -> float | None:
  """FLOP/s of a chip by its data sheet, None where it is not known."""
  name = device.lower().replace("v5 lite", "v5e").replace("v6 lite", "v6e")
  return next((chip[1] for word, chip in hardware.CHIPS.items() if word in name), None) if dtype == "bfloat16" else None


def _one(s: BenchmarkSettings, compares: bool) -> dict:
  with tempfile.TemporaryDirectory() as temporary:
    place = pathlib.Path(temporary)
    environment = {"IN2CORE_CACHE": str(place / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}
    found: dict = {
      name: isolated.start(s.replace(alone="shape"), place / name, environment) for name in ("cold", "warm")
    }
    found["agreement"] = _agreement(s, place) if compares else None
  return found


def _agreement(s: BenchmarkSettings, place: pathlib.Path) -> float:
  """Spearman of scores here with those of a CPU in float32, over a few examples."""
  few = s.replace(
    alone="score", train_limit=_COMPARED, layers=listed(s.score_layers)[0], modules="all", device_counts="1"
  )
  isolated.start(few, place / "here", {})
  isolated.start(few.replace(dtype="float32"), place / "cpu", {"JAX_PLATFORMS": "cpu"})
  scores = [np.array(run_folder.read_json(place / name / "scores.json"))[0] for name in ("here", "cpu")]
  return statistics.spearman(*scores)
