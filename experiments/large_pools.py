"""What rules of selection take on an index of up to a million examples, and how close its scores are to exact ones.

python -m experiments.large_pools --pool_sizes=10000,100000,1000000 --run_dir=runs/large_pools
python -m experiments.large_pools --agreement --layers=last:4 --train_limit=300 --run_dir=runs/agreement

The first draws rows: clusters, of which the queries are of three, lengths with heavy tails, a tenth in copies of a
topic. It selects 5 % by every rule. The second takes gradients of real examples, and compares ranks of scores.
"""

import logging
import pathlib
import time
from collections.abc import Callable

import numpy as np

from experiments import cli, flags
from experiments.settings import LargePoolsFlags
from in2core_jax.costs import timing
from in2core_jax.evaluation import statistics
from in2core_jax.index import basis as bases
from in2core_jax.index import best, rules, store
from in2core_jax.index.rows import NARROW, Block, wide
from in2core_jax.parallel import processes
from in2core_jax.pipeline import index
from in2core_jax.pipeline.session import choose, open_session
from in2core_jax.pipeline.settings import integers
from in2core_jax.report import table_text
from in2core_jax.runs.run_folder import RunDir
from in2core_jax.selection.inputs import Budget, PolicyInputs

log = logging.getLogger(__name__)

RULES = (*rules.SIMILAR, *rules.MATCHING, "proponents", "topic_quota", "length_matched_random")
LISTS = "100 best of each query"
CLUSTERS, SOURCES, OF_QUERIES = 64, 8, 3
SHARE = 0.05
SHARD = 20_000  # rows


# ---- drawn rows ----------------------------------------------------------------------


class Drawn:
  """Rows of an index without a model, on disk as an index's are."""

  def __init__(self, s: LargePoolsFlags, size: int):
    """Writes them where they are not there yet."""
    self.size, self.width, self.hidden = size, s.index_size, s.index_hidden
    rng = np.random.default_rng((s.seed, 1))
    spectrum = np.arange(1, self.width + 1) ** -0.5
    self._centers = rng.standard_normal((CLUSTERS, self.width)) * spectrum
    self._hidden_centers = rng.standard_normal((CLUSTERS, 2, self.hidden))
    self._spectrum, self._seed = spectrum, s.seed
    identity = {"stage": "index", "drawn": size, "width": self.width, "hidden": self.hidden, "seed": s.seed}
    held = store.IndexStore(RunDir.open(pathlib.Path(s.run_dir) / f"rows-{size}", identity))
    self.keys, starts = _names(size), range(0, size, SHARD)
    for number, start in enumerate(starts):
      if not held.has_rows(number):
        held.write_rows(number, self._draw(number, min(SHARD, size - start)), self.keys[start : start + SHARD])
    held.run_dir.write_json(store.PARTS, [{"first": 0, "shards": len(starts), "plan": "drawn"}])
    self.held = held

  def _clusters(self, number: int, count: int, most: int = CLUSTERS) -> np.ndarray:
    return np.random.default_rng((self._seed, 2, number)).integers(0, most, count)

  def _draw(self, number: int, count: int, most: int = CLUSTERS) -> dict[str, np.ndarray]:
    rng, cluster = np.random.default_rng((self._seed, 3, number)), self._clusters(number, count, most)
    gradients = self._centers[cluster] + rng.standard_normal((count, self.width)) * self._spectrum
    gradients *= rng.lognormal(0, 1, (count, 1))  # heavy tails
    gradients = gradients.astype(np.float32)
    hidden = self._hidden_centers[cluster] + rng.standard_normal((count, 2, self.hidden))
    inside = np.sum(gradients**2, axis=1)
    return {
      "gradients": gradients,
      "square": inside * (1 + 0.3 * rng.random(count)),
      "hidden": hidden.astype(np.float32),
      "hidden_square": np.sum(hidden**2, axis=2),
      "loss": rng.gamma(2, 1, count),
    }

  def questions(self, count: int) -> rules.Questions:
    """Queries of the first clusters."""
    drawn = self._draw(10**6, count, OF_QUERIES)
    block = Block(np.arange(count), *(drawn[name].astype(np.float32) for name in store.QUERY_NAMES))
    ids = [f"query-{number}" for number in range(count)]
    return rules.Questions(block, np.arange(count), ids, ["" for _ in ids], np.full(count, 50))

  def inputs(self, scores: np.ndarray | None = None) -> PolicyInputs:
    """The pool: token counts, sources, ids, copies."""
    rng = np.random.default_rng((self._seed, 4))
    responses = rng.geometric(0.01, self.size)
    alike = np.arange(self.size)
    alike[: self.size // 10] //= 2
    topics = np.array([f"source-{number}" for number in range(SOURCES)])[rng.integers(0, SOURCES, self.size)]
    loss = np.ones(self.size)
    return PolicyInputs(scores, loss, responses + 40, responses, topics, self.keys.astype(np.str_), alike=alike)


def _names(size: int) -> np.ndarray:
  """Keys of drawn examples, which are their ids too; not in growing order."""
  numbers = (np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(0x5851F42D4C957F2D)
  return np.array([f"{number:032x}".encode() for number in numbers.tolist()], "S32")


def work_of(rule: str, drawn: Drawn, questions: rules.Questions) -> Callable[[], object]:
  """One selection, from opening the rows on; what comes before is not measured."""
  ids = drawn.keys.astype(np.str_)

  def work() -> object:
    rows = drawn.held.read_rows(drawn.keys, ids)
    if rule == LISTS:
      along = questions.block.gradients
      walk = ((own, along @ numbers.T) for own, numbers in rows.gradients())
      return best.best(walk, len(along), 100)
    scores = None
    if rule in rules.PLAIN:
      mean, scores = questions.block.gradients.mean(axis=0), np.empty(len(rows))
      for own, numbers in rows.gradients():
        scores[own] = numbers @ mean
    counted = np.ones(len(rows), bool)
    return rules.choose(rule, drawn.inputs(scores), rows, questions, counted, Budget(fraction=SHARE), rules.How())

  return work


def measure_rules(s: LargePoolsFlags) -> list[dict]:
  """Seconds and peak memory of every rule at every size, and how seconds grow from one size to the next."""
  found: list[dict] = []
  for size in integers(s.pool_sizes, "pool_sizes"):
    drawn = Drawn(s, size)
    questions = drawn.questions(s.pool_queries)
    for rule in (*RULES, LISTS):
      timing.reset_peak_memory()
      began, busy = time.perf_counter(), time.process_time()
      work_of(rule, drawn, questions)()
      row = {
        "rule": rule,
        "examples": size,
        "seconds": time.perf_counter() - began,
        "CPU seconds": time.process_time() - busy,
        "peak memory, GB": timing.peak_memory() / 1e9,
      }
      before = [old for old in found if old["rule"] == rule]
      if before:
        ratio = row["CPU seconds"] / before[-1]["CPU seconds"]
        row["growth"] = float(np.log(ratio) / np.log(size / before[-1]["examples"]))
      found.append(row)
      log.info("%s", ", ".join(f"{name} {table_text.format_value(value)}" for name, value in row.items()))
  return found


# ---- agreement -----------------------------------------------------------------------


def measure_agreement(s: LargePoolsFlags) -> list[dict]:
  """Spearman of scores from an index with exact products of gradients, and with those of the whole sketch."""
  bench = open_session(s)
  pool = index.Pool(bench, s)
  train, evals = (np.flatnonzero(bench.splits[part].num_response_tokens) for part in ("train", "eval"))
  sample = pool.raw("train", train, None, "sketched gradients")
  asked = pool.raw("eval", evals, None, "evaluation gradients")
  exact = _exact(bench, s, train, evals)
  rows = [_agreement("whole sketch", asked.gradients @ sample.gradients.T, exact, 4 * sample.gradients.shape[1])]
  for size in integers(s.agreement_sizes, "agreement_sizes"):
    some = np.sort(np.random.default_rng(s.seed).permutation(len(train))[: max(1, size // 4)])
    made, _ = bases.make("queries", asked, sample.take(some), size, 0, 0)
    narrow = wide((sample.gradients @ made.gradients).astype(NARROW))
    scores = (asked.gradients @ made.gradients) @ narrow.T
    kept = made.gradients.shape[1]
    rows.append(_agreement(f"index, r = {kept}", scores, exact, 2 * kept + 4))
  return rows


def _exact(bench, s: LargePoolsFlags, train: np.ndarray, evals: np.ndarray) -> np.ndarray:
  """Products of whole gradients of the kernels, [Q, N]."""
  chosen = choose(bench, bench.checkpoint_params(s.checkpoint), s.layers, "matrices")
  scores = []
  for start in range(0, len(evals), s.query_block):
    own = evals[start : start + s.query_block]
    v = chosen.problem.gradients(bench.stream(bench.batcher("eval", chosen.tree, chosen.params, own)), len(own))
    batcher = bench.batcher("train", chosen.tree, chosen.params, train)
    scores.append(chosen.problem.scores(bench.stream(batcher, "exact scores"), len(train), v, "vmap"))
  return processes.to_host(np.concatenate(scores))


def _agreement(name: str, scores: np.ndarray, exact: np.ndarray, size: int) -> dict:
  single = [statistics.spearman(a, b) for a, b in zip(scores, exact, strict=True)]
  half = max(1, exact.shape[1] // 20)
  top = [np.argsort(-of.mean(axis=0))[:half] for of in (scores, exact)]
  return {
    "scores": name,
    "bytes an example": size,
    "mean query": statistics.spearman(scores.mean(axis=0), exact.mean(axis=0)),
    "single queries, median": float(np.median(single)),
    "single queries, least": float(np.min(single)),
    "best 5 % in common": len(np.intersect1d(*top)) / half,
  }


def main(_) -> None:
  """Measures, and writes large_pools.json and large_pools.md."""
  s = flags.read(LargePoolsFlags)
  run_dir = RunDir.open(s.run_dir, {"stage": "large_pools", "flags": s.identity("large_pools", "index")}, s.overwrite)
  found = measure_agreement(s) if s.agreement else measure_rules(s)
  run_dir.write_json("large_pools.json", found)
  table = table_text.markdown_table(found)
  run_dir.write_text("large_pools.md", table)
  log.info("\n%s", table)


if __name__ == "__main__":
  flags.define(LargePoolsFlags)
  cli.run(main, alone=True)
