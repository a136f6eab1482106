"""What rules of selection take on an index of up to a million examples, and how close its scores are to exact ones.

./run.sh large_pools --pool_sizes=10000,100000,1000000 --run_dir=runs/large_pools
./run.sh large_pools --agreement --layers=last:4 --train_limit=160 --run_dir=runs/agreement

The first draws rows: clusters, of which the queries are of three, lengths with heavy tails, a tenth in copies of a
topic. It selects 5 % by every rule; a stopped run goes on. The second takes gradients of real examples, and compares
ranks of scores. Both write large_pools.md into --run_dir.
"""

import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from experiments import cli, flags
from experiments.settings import LargePoolsFlags
from in2core_jax.costs import timing
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.index import basis as bases
from in2core_jax.index import best, rules, store
from in2core_jax.index.metric import IndexMetric
from in2core_jax.index.rows import BLOCK, NARROW, NUMBERS, Block, Rows
from in2core_jax.parallel import host, processes
from in2core_jax.params import subtree
from in2core_jax.pipeline import index, phases
from in2core_jax.pipeline.session import Session, choose, open_session
from in2core_jax.pipeline.settings import integers
from in2core_jax.report import table_text
from in2core_jax.runs.progress import Progress
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.run_folder import RunDir
from in2core_jax.selection.inputs import Budget, PolicyInputs
from in2core_jax.selection.whitening import WhitenedMetric

log = logging.getLogger(__name__)

RULES = (*rules.SIMILAR, *rules.MATCHING, "proponents", "topic_quota", "length_matched_random")
LISTS = "100 best of each query"
WORK = (*RULES, LISTS)
MEASURED = ("seconds", "CPU seconds", "peak memory, GB")
CLUSTERS, SOURCES, OF_QUERIES = 64, 8, 3
SHARE = 0.05
SHARD = 20_000  # rows
HELD = 4 * 10**9  # bytes of whole gradients in memory at once, at least, where scores are compared with exact ones


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
    with Progress(size, "drawing rows", "rows") as progress:
      for number, start in enumerate(starts):
        if not held.has_rows(number):
          held.write_rows(number, self._draw(number, min(SHARD, size - start)), self.keys[start : start + SHARD])
        progress.update(min(SHARD, size - start))
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
    block = Block(np.arange(count), *(drawn[name].astype(np.float32) for name in NUMBERS))
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


def measure_rules(s: LargePoolsFlags, cells: ResultCache) -> list[dict]:
  """Seconds and peak memory of every rule at every size, and how CPU seconds grow from one size to the next.

  What is measured stays in the run folder: a stopped run goes on with the next rule.
  """
  found: list[dict] = []
  sizes = integers(s.pool_sizes, "pool_sizes")
  with Progress(len(sizes) * len(WORK), "rules on drawn rows", "selections") as progress:
    for size in sizes:
      drawn = Drawn(s, size)
      questions = drawn.questions(s.pool_queries)
      for rule in WORK:
        cell = cells.get(lambda rule=rule, own=(drawn, questions): _measured(work_of(rule, *own)), rule, size)
        row = {"rule": rule, "examples": size} | {name: cell[name] for name in MEASURED}
        before = [old for old in found if old["rule"] == rule]
        if before:
          ratio = row["CPU seconds"] / before[-1]["CPU seconds"]
          row["growth"] = float(np.log(ratio) / np.log(size / before[-1]["examples"]))
        found.append(row)
        progress.update(1, now=f"{rule} of {size:,}")
  return found


def _measured(work: Callable[[], object]) -> dict[str, float]:
  timing.reset_peak_memory()
  began, busy = time.perf_counter(), time.process_time()
  work()
  taken = time.perf_counter() - began, time.process_time() - busy, timing.peak_memory() / 1e9
  return dict(zip(MEASURED, taken, strict=True))


# ---- agreement -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
  """Scores of queries and examples by one way.

  Attributes:
    products: [Q, N] of gradients. whitened: [Q, N], cosines as the policy `whitened_cosine` takes them.
  """

  products: np.ndarray
  whitened: np.ndarray

  @classmethod
  def of_gradients(cls, asked: np.ndarray, pool: np.ndarray) -> "Scores":
    """Of rows [Q, W] and [N, W] that have the gradients' products."""
    return cls(asked @ pool.T, WhitenedMetric.fit(pool).cosines(asked, pool))

  @classmethod
  def of_products(cls, every: np.ndarray, queries: int) -> "Scores":
    """Of the products of all pairs, queries first: cosines depend on no length, so rows of length 1 with these do."""
    size = np.sqrt(np.maximum(np.diag(every), np.finfo(np.float64).tiny))
    values, vectors = np.linalg.eigh(every / np.outer(size, size))
    unit = vectors * np.sqrt(np.maximum(values, 0))
    whitened = WhitenedMetric.fit(unit[queries:]).cosines(unit[:queries], unit[queries:])
    return cls(every[:queries, queries:], whitened)

  @classmethod
  def of_index(cls, basis: bases.Basis, asked: np.ndarray, pool: np.ndarray) -> "Scores":
    """Of sketched gradients in a basis, the pool's as narrow as an index keeps them."""
    own, narrow = (rows @ basis.gradients for rows in (asked, pool))
    rows = Rows.in_memory(gradients=narrow.astype(NARROW), square=np.sum(pool**2, axis=1))
    (block,) = rows.blocks()
    none = np.zeros((len(own), 0, 0), np.float32), np.zeros((len(own), 0), np.float32)
    questions = Block(np.arange(len(own)), own, np.sum(asked**2, axis=1), *none)
    metric = IndexMetric.fit(rows, np.ones(len(rows), bool), "whitened_cosine")
    return cls(own @ block.gradients.T, metric.similarity(metric.asked(questions), block))


def measure_agreement(s: LargePoolsFlags) -> list[dict]:
  """Spearman of scores from an index, and of those of the whole sketch, with exact ones of whole gradients."""
  session = open_session(s)
  pool = index.Pool(session, s)
  train, evals = (np.flatnonzero(session.splits[part].num_response_tokens) for part in ("train", "eval"))
  if len(train) > BLOCK:
    raise UserError(f"--agreement compares all pairs: give --train_limit of {BLOCK:,} or less, not {len(train):,}")
  sample = pool.raw("train", train, None, "sketched gradients")
  asked = pool.raw("eval", evals, None, phases.ASKED)
  every = exact_products(session, s, train, evals)
  exact = Scores.of_products(every, len(evals))
  sketched = Scores.of_gradients(asked.gradients, sample.gradients)
  found = [_agreement("whole sketch", sketched, exact, 4 * sample.gradients.shape[1])]
  for size in integers(s.agreement_sizes, "agreement_sizes"):
    some = np.sort(np.random.default_rng(s.seed).permutation(len(train))[: max(1, size // 4)])
    basis, _ = bases.make("queries", asked, sample.take(some), size, 0, 0)
    scores = Scores.of_index(basis, asked.gradients, sample.gradients)
    found.append(_agreement(f"index, r = {basis.size}", scores, exact, 2 * basis.size + 4))
  return found


def held_bytes() -> int:
  """How much may be held: the more, the fewer gradients are taken again."""
  return max(HELD, host.available_bytes() // 2)


def exact_products(session: Session, s: LargePoolsFlags, train: np.ndarray, evals: np.ndarray) -> np.ndarray:
  """g_i . g_j of whole gradients of the kernels, all pairs of queries, which come first, and examples: f64 [Q+N, Q+N].

  Gradients of some rows are held, those of all later ones come by: nothing is projected, no pair is left out, and no
  more than `held_bytes` of gradients are in memory, beside those of a batch.
  """
  chosen = choose(session, session.checkpoint_params(s.checkpoint), s.layers, "matrices")
  width, size = subtree.count(chosen.problem.sub), len(evals) + len(train)
  together = max(1, held_bytes() // (4 * width))
  total = np.zeros((size, size))

  def leaves(rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """(some of the rows, their gradients leaf by leaf)."""
    for part, own, first in (("eval", evals, 0), ("train", train, len(evals))):
      mine = rows[(rows >= first) & (rows < first + len(own))]
      batcher = session.batcher(part, chosen.tree, chosen.params, own[mine - first])
      for at, batch in session.stream(batcher)():
        found = jax.tree.leaves(processes.to_host(chosen.problem.batch_gradients(batch)))
        yield mine[at], [leaf[: len(at)].reshape(len(at), -1) for leaf in found]

  blocks = [np.arange(start, min(start + together, size)) for start in range(0, size, together)]
  with Progress(sum(size - block[0] for block in blocks), "exact products", "gradients") as progress:
    for block in blocks:
      held = [np.empty((len(block), leaf.size), np.float32) for leaf in jax.tree.leaves(chosen.problem.sub)]
      for rows, found in leaves(block):
        for kept, leaf in zip(held, found, strict=True):
          kept[rows - block[0]] = leaf
        progress.update(len(rows))
      total[np.ix_(block, block)] = sum(own @ own.T for own in held)
      for rows, found in leaves(np.arange(block[-1] + 1, size)):
        products = sum(kept @ leaf.T for kept, leaf in zip(held, found, strict=True))
        total[np.ix_(block, rows)], total[np.ix_(rows, block)] = products, products.T
        progress.update(len(rows))
  return total


def _agreement(name: str, scores: Scores, exact: Scores, size: int) -> dict:
  pairs = zip(scores.products, exact.products, strict=True), zip(scores.whitened, exact.whitened, strict=True)
  single, whitened = ([statistics.spearman(a, b) for a, b in pair] for pair in pairs)
  best = max(1, exact.products.shape[1] // 20)
  mean = [of.products.mean(axis=0) for of in (scores, exact)]
  return {
    "scores": name,
    "bytes an example": size,
    "mean query": statistics.spearman(*mean),
    "single queries, median": float(np.median(single)),
    "single queries, least": float(np.min(single)),
    "whitened cosines, median": float(np.median(whitened)),
    "best 5 % in common": len(np.intersect1d(*(np.argsort(-of)[:best] for of in mean))) / best,
  }


def main(_) -> None:
  """Measures, and writes large_pools.json and large_pools.md."""
  s = flags.read(LargePoolsFlags)
  run_dir = RunDir.open(s.run_dir, {"stage": "large_pools", "flags": s.identity("large_pools", "index")}, s.overwrite)
  found = measure_agreement(s) if s.agreement else measure_rules(s, ResultCache(run_dir))
  run_dir.write_json("large_pools.json", found)
  table = table_text.markdown_table(found)
  run_dir.write_text("large_pools.md", table)
  log.info("\n%s", table)


if __name__ == "__main__":
  flags.define(LargePoolsFlags)
  cli.run(main, alone=True)
