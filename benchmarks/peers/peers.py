"""bergson and kronfluence beside us: the same model, tokens and machine, pass by pass in turns.

python -m benchmarks.peers.peers --data=jsonl:ALPACA.json --examples=12 --rounds=2 --folder=runs/peers

The peers run in an environment of their own, which the first call makes (requirements.txt). All matrices of all layers,
float32, gradients of the mean loss of an example. CPU seconds count: a machine may be shared. No part of the tests.
"""

import argparse
import dataclasses
import datetime
import json
import logging
import pathlib
import subprocess
import time
from collections.abc import Callable

import jax
import numpy as np

from experiments.benchmark.passes import Rows
from experiments.interop import environment
from in2core_jax.costs import hardware, timing
from in2core_jax.data.tokenizing import TokenizedDataset
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.pipeline import export, index
from in2core_jax.pipeline.index_settings import IndexSettings
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.report.table_text import markdown_table

HERE = pathlib.Path(__file__).parent
_SPARE = 8  # times as many examples are read as are taken: those longer than --max_length are left out
# Pass -> (whose, what).
THEIRS = {
  "forward": ("PyTorch", "forward only"),
  "bergson_score": ("bergson", "exact score of one query"),
  "kronfluence_score": ("kronfluence", "exact score of one query"),
  "bergson_store": ("bergson", "gradient store, 16 x 16 a matrix"),
}


@dataclasses.dataclass(frozen=True)
class Measured:
  """One pass: seconds, CPU seconds, GB at most, and a number for each example where it has one."""

  seconds: float
  cpu: float
  peak: float
  values: list[float]


def measured(work: Callable[[], np.ndarray]) -> Measured:
  """Of a pass of ours."""
  timing.reset_peak_memory()
  began, busy = time.perf_counter(), time.process_time()
  values = np.asarray(work())
  taken = time.perf_counter() - began, time.process_time() - busy
  return Measured(*taken, timing.peak_memory() / 1e9, values.tolist())


def ours(session: Session) -> dict[str, tuple[str, Callable[[], np.ndarray]]]:
  """Name -> (what, the pass)."""
  rows, chosen = Rows(session), Rows(session).chosen("all", "matrices")
  problem, size = chosen.problem, len(session.splits["train"])
  query = problem.gradients(session.stream(session.batcher("eval")), 1)
  stream, forward = session.stream(session.packer("train")), rows.forward()
  pool = index.Pool(session, IndexSettings.of(session.settings, layers="all", sketch_size=16))
  store = lambda: pool.raw("train", np.arange(size), None, "store").loss * 0  # noqa: E731
  return {
    "forward": ("forward only", forward.work),
    "score": ("exact score of one query", lambda: problem.scores(stream, size, query, "jvp")[0]),
    "store": ("gradient store, 16 x 16 a matrix", store),
  }


def short(session: Session, count: int) -> Session:
  """With the first `count` training examples, and the first query, that are whole and have a response.

  Raises:
    UserError: there are too few.
  """
  parts = {}
  for part, wanted in (("train", count), ("eval", 1)):
    dataset = session.splits[part]
    rows = np.flatnonzero((dataset.num_response_tokens > 0) & ~dataset.truncated)[:wanted]
    if len(rows) < wanted:
      raise UserError(f"{part}: {len(rows)} of {len(dataset)} examples fit, {wanted} are wanted: raise --max_length")
    parts[part] = dataset.take(rows)
  return session.with_splits(session.splits.with_parts(**parts))


def example(dataset: TokenizedDataset, row: int) -> dict[str, list[int]]:
  """As PyTorch's side takes it; labels of tokens that do not count are -100."""
  ids, mask = dataset.tokens[row], dataset.response_mask[row]
  return {"input_ids": ids.tolist(), "labels": np.where(mask, ids, -100).tolist()}


class Other:
  """The process of the peers."""

  def __init__(self, python: pathlib.Path, job: pathlib.Path):
    """Starts it, and waits until it has the model."""
    command = [str(python), str(HERE / "torch_side.py"), str(job)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    self._process = subprocess.Popen(command, env=environment.clean_environment(), **pipes)
    self.versions = self._answer()

  def _answer(self) -> dict:
    for line in self._process.stdout:
      if line.startswith('{"'):  # libraries may have printed something while they were imported
        return json.loads(line)
    raise SystemExit("the process of the peers has ended; its last lines say why")

  def run(self, name: str) -> Measured:
    """One pass."""
    self._process.stdin.write(f"{name}\n")
    self._process.stdin.flush()
    return Measured(**self._answer())

  def end(self) -> None:
    """Lets it end."""
    self._process.stdin.close()
    self._process.wait()


def table(found: dict[str, list[Measured]], about: dict[str, tuple[str, str]]) -> list[dict]:
  """A row for each pass: medians, and ratios to our forward pass of the same round."""
  base = np.array([one.cpu for one in found["in2core_jax forward"]])
  scores = np.array(found["in2core_jax score"][0].values)
  rows = []
  for name, runs in found.items():
    who, what = about[name]
    cpu = np.array([one.cpu for one in runs])
    row = {"what": what, "who": who, "CPU seconds": float(np.median(cpu))}
    row |= {"to our forward pass": float(np.median(cpu / base)), "peak memory, GB": max(one.peak for one in runs)}
    if what.startswith("exact"):
      row["Spearman with ours"] = statistics.spearman(np.array(runs[0].values), scores)
    rows.append(row)
  return sorted(rows, key=lambda row: row["what"])


def arguments() -> argparse.Namespace:
  """What was given."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True)
  parser.add_argument("--examples", type=int, default=12)
  parser.add_argument("--max_length", type=int, default=128, help="tokens of an example at most")
  parser.add_argument("--model", default=IndexSettings.model)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--folder", default="runs/peers")
  parser.add_argument("--python", default="", help="of an environment that has requirements.txt already")
  return parser.parse_args()


def peers_python(given: str) -> pathlib.Path:
  """The Python of the peers' environment."""
  cache = pathlib.Path(__file__).parents[2] / ".cache" / "peers"
  cache.mkdir(parents=True, exist_ok=True)
  if given:
    return pathlib.Path(given)
  python = environment.python(HERE / "requirements.txt", cache)
  # Bergson asks for them and nothing here does; built for a GPU, they do not go with PyTorch for CPUs.
  remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"]
  subprocess.run(remove, check=True, env=environment.clean_environment())
  return python


def run_all(session: Session, other: Other, rounds: int) -> list[dict]:
  """The table: every pass once a round, every second round backwards; the round before the first one warms up."""
  own = ours(session)
  works = {f"in2core_jax {name}": lambda work=work: measured(work) for name, (_, work) in own.items()}
  works |= {name: lambda name=name: other.run(name) for name in THEIRS}
  about = {f"in2core_jax {name}": ("in2core_jax", what) for name, (what, _) in own.items()} | THEIRS
  found: dict[str, list[Measured]] = {name: [] for name in works}
  for turn in range(-1, rounds):
    for name in works if turn % 2 == 0 else reversed(works):
      one = works[name]()
      print(f"{turn + 1 or 'warm-up'}: {name} {one.cpu:.1f} CPU s, {one.seconds:.1f} s", flush=True)
      if turn >= 0:
        found[name].append(one)
  return table(found, about)


def main() -> None:
  """Measures, and writes peers.json and peers.md."""
  given = arguments()
  folder = pathlib.Path(given.folder).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  python = peers_python(given.python)
  limits = {"train_limit": _SPARE * given.examples, "eval_limit": _SPARE, "test_limit": _SPARE}
  own = {"model": given.model, "max_length": given.max_length}
  s = IndexSettings(train_data=given.data, run_dir=str(folder), **own, **limits)
  session = short(open_session(s), given.examples)
  model, train = export.run(s.replace(overwrite=True), str(folder / "model")), session.splits["train"]
  job = {"model": str(model), "folder": str(folder), "batch_tokens": session.batching.batch_tokens}
  job |= {"train": [example(train, row) for row in range(len(train))], "query": example(session.splits["eval"], 0)}
  (folder / "job.json").write_text(json.dumps(job))
  other = Other(python, folder / "job.json")
  rows = run_all(session, other, given.rounds)
  other.end()
  versions = ", ".join(f"{name} {version}" for name, version in (other.versions | {"jax": jax.__version__}).items())
  tokens = int(train.num_tokens.sum())
  head = f"{datetime.date.today()}, {hardware.processor()}, {len(train)} examples of {tokens:,} tokens, {versions}"
  (folder / "peers.json").write_text(json.dumps({"about": head, "rows": rows}, indent=2))
  (folder / "peers.md").write_text(f"{head}\n\n{markdown_table(rows)}")
  print((folder / "peers.md").read_text())


if __name__ == "__main__":
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  try:
    main()
  except UserError as error:
    raise SystemExit(f"error: {error}") from None
