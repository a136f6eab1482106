"""Rules on the rows of an index: with a basis that misses nothing, the choice of the same rule on whole features."""

import dataclasses
import functools

import numpy as np
import pytest

from experiments import large_pools
from experiments.settings import LargePoolsFlags
from in2core_jax.errors import UserError
from in2core_jax.index import basis as bases
from in2core_jax.index import best, metric, rules
from in2core_jax.index import matching as block_matching
from in2core_jax.index import rows as index_rows
from in2core_jax.index.rows import NARROW, NUMBERS, Block, Rows, wide
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.run_folder import RunDir
from in2core_jax.selection import aggregation, coreset, hybrid, matching
from in2core_jax.selection.inputs import Budget, PolicyInputs
from in2core_jax.selection.whitening import WhitenedMetric

SIZE, QUERIES, WIDTH, HIDDEN = 90, 7, 130, 9
PLAIN = rules.How()


class Pool:
  """A small pool with clusters, copies and examples without a response, whole and as rows of an index."""

  def __init__(self, seed: int = 0, far: float = 1.5, order=None):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((5, WIDTH))
    cluster = rng.integers(0, 5, SIZE)
    self.features = (centers[cluster] + rng.standard_normal((SIZE, WIDTH))) * rng.lognormal(0, 1, (SIZE, 1))
    self.hidden = rng.standard_normal((SIZE, 2, HIDDEN)) + np.eye(HIDDEN)[cluster][:, None]
    self.asked = far * centers[:1] + rng.standard_normal((QUERIES, WIDTH))
    self.asked_hidden = rng.standard_normal((QUERIES, 2, HIDDEN)) + far * np.eye(HIDDEN)[0]
    self.responses = rng.integers(1, 30, SIZE)
    self.responses[::17] = 0
    self.features[self.responses == 0] = 0
    for copy, of in ((40, 3), (41, 3), (60, 22)):
      for values in (self.features, self.hidden, self.responses):
        values[copy] = values[of]
    self.alike = np.arange(SIZE)
    self.alike[[40, 41, 60]] = 3, 3, 22
    self.ids = [f"e{number:03d}" for number in rng.permutation(SIZE)]
    self.topics = [f"t{number % 4}" for number in cluster]
    self.tokens = self.responses + rng.integers(1, 20, SIZE)
    self.query_topics, self.query_tokens = [f"q{number % 3}" for number in range(QUERIES)], rng.integers(1, 20, QUERIES)
    order = np.arange(SIZE) if order is None else order
    for name in ("features", "hidden", "responses", "alike", "tokens"):
      setattr(self, name, getattr(self, name)[order].astype(np.float32 if name in ("features", "hidden") else np.int64))
    self.ids, self.topics = [self.ids[row] for row in order], [self.topics[row] for row in order]
    self.asked, self.asked_hidden = self.asked.astype(np.float32), self.asked_hidden.astype(np.float32)
    self.counted = self.responses > 0

  @functools.cache  # noqa: B019
  def basis(self, size: int = 200, hidden: int = HIDDEN) -> bases.Basis:
    queries = bases.Raw(self.asked, self.asked_hidden, np.zeros(QUERIES))
    sample = bases.Raw(self.features, self.hidden, np.zeros(SIZE))
    return bases.make("queries", queries, sample, size, hidden, 0)[0]

  @staticmethod
  def arrays(features, hidden, basis: bases.Basis) -> dict:
    away = hidden - basis.center if basis.hidden.size else np.zeros((len(hidden), 0, 0), np.float32)
    views = np.einsum("nvd,vdh->nvh", away, basis.hidden) if basis.hidden.size else away
    return {
      "gradients": features @ basis.gradients,
      "square": np.sum(features**2, axis=1),
      "hidden": views,
      "hidden_square": np.sum(away**2, axis=2),
      "loss": np.zeros(len(features), np.float32),
    }

  def rows(self, basis=None, cuts=(30, 55)) -> Rows:
    """In three segments; copies share the row of the first."""
    arrays = self.arrays(self.features, self.hidden, basis or self.basis())
    edges = (0, *cuts, SIZE)
    cut = [
      {name: values[low:high] for name, values in arrays.items()} for low, high in zip(edges, edges[1:], strict=False)
    ]
    first = {}
    return Rows(cut, np.array([first.setdefault(group, row) for row, group in enumerate(self.alike)]))

  def questions(self, basis=None) -> rules.Questions:
    arrays = self.arrays(self.asked, self.asked_hidden, basis or self.basis())
    block = Block(np.arange(QUERIES), *(arrays[name] for name in NUMBERS))
    ids = [f"q{number}" for number in range(QUERIES)]
    return rules.Questions(block, np.arange(QUERIES), ids, self.query_topics, self.query_tokens)

  def inputs(self, **more) -> PolicyInputs:
    return PolicyInputs(None, None, self.tokens, self.responses, self.topics, self.ids, **more)

  def dense(self, policy: str, how: rules.How) -> PolicyInputs:
    """The inputs of the same policy with everything at once."""
    if policy in rules.MATCHING:
      target = {"target_mean": how.target_mean, "shrink": how.shrink, "query_tokens": self.query_tokens}
      return self.inputs(features=self.features, target=self.asked, **target)
    metric = hybrid.HybridMetric.fit(self.features, self.hidden, self.ids, self.counted)
    asked = metric.asked(self.asked, self.asked_hidden)
    found = {
      "hybrid": lambda: metric.smoothed(asked, metric.similarity(asked)),
      "whitened_cosine": lambda: WhitenedMetric.fit(self.features, ids=self.ids, counted=self.counted).cosines(
        self.asked, self.features
      ),
      "whitened_embedding": lambda: metric.texts.cosines(self.asked_hidden, self.hidden),
    }["hybrid" if policy == "auto" else policy]()
    return self.inputs(
      similarities={"hybrid" if policy == "auto" else policy: found},
      apart=metric.apart(asked),
      alike=self.alike,
      aggregate=how.aggregate or None,
      similar_topics=self.query_topics,
      similar_ids=[f"q{number}" for number in range(QUERIES)],
      similar_tokens=self.query_tokens,
    )

  def choose(self, policy: str, budget, how: rules.How = PLAIN, basis=None) -> rules.Outcome:
    alike = {} if policy in rules.MATCHING else {"alike": self.alike}
    asked = self.questions(basis), self.counted, Budget.read(budget), how
    return rules.choose(policy, self.inputs(**alike), self.rows(basis), *asked)


CASES = [
  *((policy, budget, PLAIN) for policy in ("hybrid", "whitened_cosine", "auto") for budget in ("0.3", "400tok")),
  ("whitened_embedding", "0.5", PLAIN),
  ("hybrid", "1.0", PLAIN),
  *(("hybrid", "25", rules.How(word)) for word in aggregation.AGGREGATES),
  *((policy, "0.4", rules.How(target_mean=word)) for policy in rules.MATCHING for word in ("both", "examples")),
  ("matching", "300tok", rules.How(shrink=False)),
]


@pytest.mark.parametrize(("policy", "budget", "how"), CASES)
def test_with_a_whole_basis_the_choice_and_its_reasons_are_those_of_whole_features(policy, budget, how):
  pool = Pool()
  found = pool.choose(policy, budget, how).choice
  wanted = coreset.select_by(policy, pool.dense(policy, how), Budget.read(budget), how.seed)
  np.testing.assert_array_equal(found.rows, wanted.rows)
  assert found.reasons == wanted.reasons


def test_auto_measures_the_same_distance_and_draws_at_random_where_kinds_are_the_same():
  pool = Pool(far=0.0)
  pool.asked, pool.asked_hidden = pool.features[5:12].copy(), pool.hidden[5:12].copy()
  outcome, dense = pool.choose("auto", "0.3"), pool.dense("auto", PLAIN)
  np.testing.assert_allclose(outcome.apart.distance, dense.apart.distance, atol=1e-5)
  assert outcome.choice.reasons[0] == "drawn at random"
  np.testing.assert_array_equal(outcome.choice.rows, coreset.select_by("auto", dense, Budget.read("0.3")).rows)


def test_the_order_of_reading_does_not_matter():
  names = []
  for order in (np.arange(SIZE), np.random.default_rng(5).permutation(SIZE)):
    pool = Pool(order=order)
    chosen = [pool.choose(rule, "0.4").choice.rows for rule in ("hybrid", "matching")]
    names.append([sorted(pool.ids[row] for row in rows) for rows in chosen])
  assert names[0] == names[1]


def test_matching_skips_rows_that_cannot_be_chosen_and_chooses_the_same(monkeypatch):
  rng = np.random.default_rng(0)
  features = ((rng.standard_normal((3000, 6)) + [2, 0, 0, 0, 0, 0]) * rng.lognormal(0, 1, (3000, 1))).astype(np.float32)
  features[1::50] = features[::50]  # exact copies: ties
  rows, target = Rows.in_memory(gradients=features, square=np.sum(features**2, axis=1)), -np.eye(6)[1]
  places, read_all, times = rng.permutation(3000), block_matching._Least._read_all, []
  places[::7] = -1  # take no part
  choose = lambda: block_matching.greedy_matching(rows, target, 800, places, block_matching.Pace(64, 16))  # noqa: E731
  monkeypatch.setattr(block_matching._Least, "_read_all", lambda self: times.append(1) or read_all(self))
  found, skipped = choose(), len(times)
  monkeypatch.setattr(block_matching, "_MANY", -1)  # reads all rows for all choices
  np.testing.assert_array_equal(choose(), found)
  assert np.all(places[found] >= 0) and skipped < 0.5 * (len(times) - skipped)


def test_matching_in_blocks_comes_as_close_as_step_by_step():
  rng = np.random.default_rng(3)
  features = (rng.standard_normal((4000, 24)) * rng.lognormal(0, 0.5, (4000, 1))).astype(np.float32)
  target, rows = 0.3 * rng.standard_normal(24), Rows.in_memory(gradients=features, square=np.sum(features**2, axis=1))
  distance = lambda chosen: np.linalg.norm(features[chosen].mean(axis=0) - target)  # noqa: E731
  wanted = distance(matching.greedy_matching(features, target, 400))
  pace = block_matching.Pace(candidates=1024, steps=64)
  found = block_matching.greedy_matching(rows, target, 400, np.arange(4000), pace=pace)
  assert len(set(found.tolist())) == 400
  assert distance(found) < 1.5 * wanted + 1e-3 < 0.1 * distance(rng.permutation(4000)[:400])


def test_the_pool_is_read_more_often_while_few_are_chosen():
  assert [block_matching.Pace().steps_after(done) for done in (0, 500, 1000, 50_000)] == [64, 64, 125, 512]
  rng = np.random.default_rng(5)
  features = (rng.standard_normal((4000, 24)) * rng.lognormal(0, 0.5, (4000, 1)) + rng.standard_normal(24)).astype("f4")
  target, rows = 0.3 * rng.standard_normal(24), Rows.in_memory(gradients=features, square=np.sum(features**2, axis=1))
  choose = lambda pace: block_matching.greedy_matching(rows, target, 400, np.arange(4000), pace)  # noqa: E731
  distance = lambda chosen: np.linalg.norm(features[chosen].mean(axis=0) - target)  # noqa: E731
  at_once = dataclasses.make_dataclass(
    "P", [("candidates", int, 512)], namespace={"steps_after": lambda _, done: 400}
  )()
  assert distance(choose(block_matching.Pace(candidates=512))) < 0.8 * distance(choose(at_once))


def test_turns_with_short_lists_are_those_with_all_examples():
  rng = np.random.default_rng(1)
  values = np.round(rng.standard_normal((6, 200)), 1).astype(np.float32)  # with ties
  wanted = np.argsort(-aggregation.aggregate(values, [""] * 6, "round_robin"))[:150]
  turns = aggregation.turn_order(np.ones(6), 150)
  walk = lambda: ((np.arange(low, low + 40), values[:, low : low + 40]) for low in range(0, 200, 40))  # noqa: E731
  for kept in (3, 17, None):
    np.testing.assert_array_equal(best.in_turns(walk, turns, 6, np.arange(200), kept), wanted)


def test_a_key_orders_by_value_then_place_and_gives_both_back():
  values = np.array([0.0, -0.0, 1.5, -2.0, 1.5, -1e-30, np.inf, 3e38], np.float32)
  places = np.array([4, 3, 9, 0, 2, 1, 7, 2**31 - 1])
  keys = best.keys_of(values, places)
  np.testing.assert_array_equal(best.values_of(keys), values)
  np.testing.assert_array_equal(best.places_of(keys), places)
  np.testing.assert_array_equal(np.argsort(-keys), np.lexsort((places, -values)))


def test_bfloat16_is_widened_exactly():
  numbers = np.array([[1.0, -2.5], [3e38, 1e-40]], np.float32).astype(NARROW)
  np.testing.assert_array_equal(wide(numbers), numbers.astype(np.float32))


@pytest.mark.parametrize("concentrated", [False, True])
def test_rounding_to_bfloat16_is_not_taken_for_what_lies_outside(concentrated):
  rng = np.random.default_rng(0)
  exact = (rng.standard_normal((400, 64)) * (np.geomspace(1, 1e-3, 64) if concentrated else 1)).astype(np.float32)
  square, narrow = np.sum(exact**2, axis=1), wide(exact.astype(NARROW))
  part = metric.Part.of(exact.T @ exact / 400, 0.01)
  image, scale = part.images(narrow, square, rounded=True)
  inside = 1 / np.linalg.norm(image, axis=1)
  taken = np.count_nonzero(np.abs(scale / inside - 1) > 1e-5)  # of four standard deviations few are beyond
  assert taken <= 4 < np.count_nonzero(np.abs(part.images(narrow, square)[1] / inside - 1) > 1e-5)
  outside = 0.02 * square
  wanted = 1 / np.sqrt(np.sum(part.images(exact, square)[0] ** 2, axis=1) + outside / part.damping)
  np.testing.assert_allclose(part.images(narrow, square + outside, rounded=True)[1], wanted, rtol=0.1)


def test_a_smaller_basis_keeps_products_with_the_queries_and_knows_what_is_outside():
  pool = Pool()
  basis = pool.basis(size=24, hidden=6)
  assert basis.gradients.shape == (WIDTH, 24)
  np.testing.assert_allclose(basis.gradients.T @ basis.gradients, np.eye(24), atol=1e-5)
  arrays = pool.arrays(pool.features, pool.hidden, basis)
  exact = pool.features @ pool.asked.T
  inside = arrays["gradients"] @ pool.arrays(pool.asked, pool.asked_hidden, basis)["gradients"].T
  np.testing.assert_allclose(inside, exact, atol=1e-3 * np.abs(exact).max())
  assert (arrays["square"] >= np.sum(arrays["gradients"] ** 2, axis=1) * (1 - 1e-5)).all()


def test_a_policy_that_needs_what_is_not_kept_says_so():
  pool = Pool()
  bare = pool.basis(hidden=0)
  with pytest.raises(UserError, match="hidden states, which this index does not hold"):
    pool.choose("hybrid", "0.3", basis=bare)
  assert len(pool.choose("whitened_cosine", "0.3", basis=bare).choice.rows)
  with pytest.raises(UserError, match="is not served by an index"):
    pool.choose("bm25", "0.3")


def test_rows_are_taken_and_walked_alike_whatever_the_blocks(monkeypatch):
  pool = Pool()
  rows = pool.rows()
  monkeypatch.setattr(index_rows, "BLOCK", 7)
  every = rows.take(np.arange(SIZE))
  for block in rows.blocks():
    np.testing.assert_array_equal(block.gradients, every.gradients[block.rows])
    np.testing.assert_array_equal(block.hidden, every.hidden[block.rows])
  assert sorted(np.concatenate([block.rows for block in rows.blocks()]).tolist()) == list(range(SIZE))


def test_drawn_pools_are_measured_by_every_rule(tmp_path, monkeypatch):
  s = LargePoolsFlags(run_dir=str(tmp_path), pool_sizes="150,300", pool_queries=6, index_size=8, index_hidden=4)
  cells = ResultCache(RunDir.open(tmp_path / "run", {"stage": "large_pools"}))
  found = large_pools.measure_rules(s, cells)
  assert [row["rule"] for row in found[: len(found) // 2]] == [*large_pools.RULES, large_pools.LISTS]
  assert all(row["CPU seconds"] > 0 and row["peak memory, GB"] > 0 for row in found)
  monkeypatch.setattr(large_pools, "work_of", None)  # what is measured is not measured again
  assert large_pools.measure_rules(s, cells) == found
