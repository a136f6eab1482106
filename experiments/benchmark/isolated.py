"""What the benchmark measures in processes of their own: compilation from an empty cache, peak memory, device counts.

The benchmark starts itself again with `--alone=select` or `--alone=score`, and reads what that process wrote.
"""

import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from experiments import subprocesses
from experiments.benchmark.passes import measured_session
from experiments.benchmark.settings import BenchmarkSettings
from in2core_jax.costs import timing
from in2core_jax.errors import UserError, how_many
from in2core_jax.pipeline import scoring, select
from in2core_jax.pipeline.session import choose
from in2core_jax.runs import run_folder

_RESULT = "alone.json"


# ---- inside the process --------------------------------------------------------------


def run_alone(s: BenchmarkSettings, known: Mapping[str, Callable[[BenchmarkSettings], dict]]) -> None:
  """Does what `--alone` names and writes alone.json into the run folder."""
  folder = pathlib.Path(s.run_dir)
  folder.mkdir(parents=True, exist_ok=True)
  run_folder.write_json(folder / _RESULT, known[s.alone](s))


def select_alone(s: BenchmarkSettings) -> dict:
  """A whole `select` run, and what was compiled for it. Two solver steps run the programs of any number of them."""
  short = s.replace(run_dir=str(pathlib.Path(s.run_dir) / "select"), depth=2, policy="proponents")
  with timing.CompileMeter() as meter:
    select.run(short, measured_session(short))
  return {
    "programs": meter.programs,
    "from the cache": meter.cached,
    "seconds to compile or read": meter.compile_seconds,
    "seconds to lower": meter.lower_seconds,
    "seconds": meter.compile_seconds + meter.lower_seconds,
  }


def score_alone(s: BenchmarkSettings) -> dict:
  """The score pass through the whole model on the first `--device_counts` devices, twice: compiled, then timed."""
  wanted = int(s.device_counts)
  if wanted > len(jax.devices()):
    return {"devices": len(jax.devices())}
  session = measured_session(s.replace(boundary_cache="off"), wanted)
  chosen = choose(session, session.model.params, s.layers, s.modules)
  query, _ = scoring.queries(session, s, chosen)
  train, device = session.packer("train"), jax.devices()[0]
  stream, held = session.stream(train, "scores"), [0]

  def watched():
    for item in stream():
      yield item
      held[0] = max(held[0], timing.device_bytes(jax.live_arrays(), device))

  of_pass = timing.reset_peak_memory()
  chosen.problem.losses_and_scores(watched, len(train), query, "jvp")
  peak, began = timing.peak_memory(), time.perf_counter()
  _, scores = chosen.problem.losses_and_scores(stream, len(train), query, "jvp")
  seconds, weights = time.perf_counter() - began, timing.device_bytes(session.model.params, device)
  run_folder.write_json(pathlib.Path(s.run_dir) / "scores.json", scores.astype(float).tolist())
  return {
    "devices": wanted,
    "platform": device.platform,
    "examples": len(train),
    "tokens": int(train.dataset.num_tokens.sum()),
    "seconds": seconds,
    "peak memory": peak,
    "peak counted from": "the pass" if of_pass else "the start of the process",
    "bytes of weights": weights,
    "bytes of other arrays": held[0] - weights,
  }


# ---- outside -------------------------------------------------------------------------


def start(s: BenchmarkSettings, folder: pathlib.Path, environment: Mapping[str, str]) -> dict:
  """Runs this benchmark with `s.alone` in a process of its own and returns what it found.

  Args:
    s: flags; `run_dir` is replaced.
    folder: the process's run folder, made here.
    environment: variables beside those of this process; "" takes one away.

  Raises:
    UserError: the process failed; its own messages stand above.
  """
  folder.mkdir(parents=True)
  command = subprocesses.command("benchmark", s.replace(run_dir=str(folder)), folder / "alone.flags")
  done = subprocess.run(command, env=subprocesses.environment(environment), check=False)
  if done.returncode:
    raise UserError(f"--alone={s.alone} ended with {done.returncode} in a process of its own: see its messages above")
  return run_folder.read_json(folder / _RESULT)


def measure_compile(s: BenchmarkSettings) -> list[dict]:
  """Compilation of a `select` run from an empty persistent cache, and once more from the filled one."""
  with tempfile.TemporaryDirectory() as temporary:
    place = pathlib.Path(temporary)
    # JAX's own variable would win over the project's, whose settings users have.
    environment = {"IN2CORE_CACHE": str(place / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}
    runs = [(name, start(s.replace(alone="select"), place / name, environment)) for name in ("cold", "warm")]
  return [{"cache": name} | found for name, found in runs]


def measure_memory(s: BenchmarkSettings, layers: str, counts: list[int]) -> list[dict]:
  """Peak memory of the score pass over so many training examples, each in a process of its own."""
  found = []
  with tempfile.TemporaryDirectory() as temporary:
    for count in counts:
      own = s.replace(alone="score", layers=layers, modules="all", train_limit=count, limit_block=0, device_counts="1")
      found.append(start(own, pathlib.Path(temporary) / str(count), {}))
      if found[-1]["examples"] < count:
        raise UserError(
          f"--memory_examples={count}, but --train_data has {how_many(found[-1]['examples'], 'training example')}"
        )
  return [{**row, "growth, %": 100 * (row["peak memory"] / found[0]["peak memory"] - 1)} for row in found]


def measure_scaling(s: BenchmarkSettings, layers: str, counts: list[int]) -> list[dict]:
  """The score pass over the first devices, compared with the first count; counts beyond the machine's are left out."""
  found, reference = [], None
  with tempfile.TemporaryDirectory() as temporary:
    for count in counts:
      own = s.replace(alone="score", layers=layers, modules="all", device_counts=str(count))
      # Says nothing to machines with accelerators.
      simulated = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
      folder = pathlib.Path(temporary) / str(count)
      row = start(own, folder, {"XLA_FLAGS": simulated.strip()})
      if row["devices"] < count:
        break
      scores = np.array(run_folder.read_json(folder / "scores.json"))
      reference = scores if reference is None else reference
      difference = float(np.abs(scores - reference).max() / np.abs(reference).max())
      found.append(row | {"largest difference": difference})
  if not found:
    raise UserError(
      f"--device_counts={s.device_counts}: this machine has {how_many(row['devices'], 'device')}, fewer than that"
    )
  return found
