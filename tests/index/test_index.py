"""The index of a large pool: its rows, kills and additions on the way, and what `select --index` makes of it."""

import pathlib

import jax
import numpy as np
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from experiments import large_pools
from experiments.settings import LargePoolsFlags
from in2core_jax.data import packing, spots
from in2core_jax.errors import UserError
from in2core_jax.index import basis as bases
from in2core_jax.index import store
from in2core_jax.influence.index_pass import IndexPass, OnDevice
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.influence.projected import SketchSettings, make_sketch
from in2core_jax.model import decoder
from in2core_jax.model.objective import losses_and_hidden_fn, make_objective
from in2core_jax.parallel import sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline import checks, index, select, select_index
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.index_settings import IndexSettings
from in2core_jax.pipeline.projection import Projection
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs.run_folder import RunDir, read_parquet
from in2core_jax.runs.shards import ShardStore

slow = pytest.mark.slow


@pytest.mark.parametrize(
  ("layers", "changes"), [("1", {}), pytest.param("0,1", {"num_experts": 3, "experts_per_token": 2}, marks=slow)]
)
def test_a_pass_gives_products_lengths_losses_and_pooled_hidden_states(x64, layers, changes):
  config = tiny.smaller_config(num_layers=2, **changes)
  params = tiny.make_params(config, np.float64)
  sketch = make_sketch(params, layers, SketchSettings(4, allow_small=True))
  dataset, batch = tiny.make_dataset(config.vocab_size), tiny.make_batch(config)
  lengths = np.array([len(ids) for ids in dataset.tokens])
  problem = CompiledObjective(make_objective(config, sketch.tree), *subtree.split(sketch.params, sketch.tree))
  wanted = problem.adapter_features(lambda: iter([(np.arange(6), batch)]), 6)
  packer = packing.Packer(dataset, groups=2)
  plan = packer.sequential_plan(40)
  most = spots.most_in_a_row(plan)
  assert len(plan) > 1 and most > 1 and len({shape for shape, _ in plan}) == 1
  where = lambda cells: spots.spots_of(cells, plan[0][0], dataset.tokens, most)  # noqa: E731
  items = lambda: ((*packer.batch(cells, shape), where(cells)) for shape, cells in plan)  # noqa: E731
  run = IndexPass(losses_and_hidden_fn(config, sketch.tree), sketch, params)
  raw = run.raw(items(), 6, most)
  np.testing.assert_allclose(raw.gradients, wanted, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(raw.loss, tiny.plain_losses(config, sketch.params, batch)[:6], rtol=1e-5)
  h = decoder.run_layers(config, sketch.params["layers"], decoder.embed(config, sketch.params, batch.tokens))
  hidden = np.asarray(decoder.final_norm(config, sketch.params, h))
  for row, size in enumerate(lengths):
    np.testing.assert_allclose(raw.hidden[row], [hidden[row, :size].mean(axis=0), hidden[row, size - 1]], rtol=1e-4)
  basis = bases.make("queries", raw.take(np.arange(2)), raw, 3, 4, 0)[0]
  rows = run.rows(items(), 6, most, OnDevice(basis))
  for name, values in run.rows_of(raw, OnDevice(basis)).items():
    np.testing.assert_allclose(rows[name], values, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(rows["gradients"], wanted @ basis.gradients, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(rows["square"], np.sum(wanted**2, axis=1), rtol=1e-4)
  assert not rows["gradients"][tiny.NO_RESPONSE].any()


def test_a_generic_projection_keeps_products_on_average():
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((2, 1, 300)).astype(np.float32)
  y += x
  found = []
  for seed in range(30):
    basis = bases.Basis("generic", bases.generic_projection(300, 64, seed), 64, np.zeros((0, 0, 0)), np.zeros((0, 0)))
    run = IndexPass(None, None, None)
    rows = run.rows_of(bases.Raw(np.concatenate([x, y]), np.zeros((2, 0, 0), np.float32), np.zeros(2)), OnDevice(basis))
    found.append(float(rows["gradients"][0] @ rows["gradients"][1]))
  assert abs(np.mean(found) - float(x[0] @ y[0])) < 4 * np.std(found) / np.sqrt(len(found))


# ---- the stage -----------------------------------------------------------------------


def settings(folder: pathlib.Path, **changes) -> IndexSettings:
  """Of an index whose basis misses nothing."""
  small = {"index_size": 512, "run_dir": str(folder / "index"), "policy": "auto", "shard_batches": 1}
  return tiny.run_settings(folder, kind=IndexSettings, **(small | changes))


def pieces_of(folder: str) -> dict[str, bytes]:
  """Content of the files that hold results, by name."""
  root = pathlib.Path(folder)
  return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.shard")}


def rows_of(s: IndexSettings, session):
  train = session.splits["train"]
  return store.IndexStore.load(s.run_dir).read_rows(store.keys_of(train.tokens, train.response_mask), train.ids)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A finished index, its settings and its session."""
  s = settings(tmp_path_factory.mktemp("index"), index_size=8, batch_tokens=192)
  session = tiny.open_session(s)
  index.run(s, session)
  return s, session


def test_an_index_that_cannot_be_read_says_so_in_one_line(tmp_path):
  def stored(name: str, **changes) -> store.IndexStore:
    identity = {"stage": "index", "index": store.VERSION, "basis": {"kind": "queries"}} | changes
    held = store.IndexStore(RunDir.open(tmp_path / name, identity))
    held.run_dir.write_json(store.PARTS, [{"first": 0, "shards": 1, "plan": "sample"}])
    numbers = {"gradients": np.ones((2, 3)), "square": np.ones(2)}
    held.write_rows(0, numbers, keys)
    held.run_dir.write_json(store.MARK, {})
    return held

  keys = store.keys_of([np.arange(3), np.arange(4)], [np.ones(3, bool), np.ones(4, bool)])
  flipped = lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]  # noqa: E731
  shard = stored("whole").run_dir.path / "rows" / "000000.shard"
  whole = shard.read_bytes()
  held = store.IndexStore.load(str(tmp_path / "whole"))
  assert len(held.read_rows(keys, ["a", "b"])) == 2
  for harm in (flipped, lambda data: data[: len(data) // 2], lambda data: b""):
    shard.write_bytes(harm(whole))
    with pytest.raises(UserError, match="^[^\n]*000000.shard: missing or damaged, 1 shard in all: start[^\n]*$"):
      held.read_rows(keys, ["a", "b"])
  with pytest.raises(UserError, match="^[^\n]*basis[^\n]*missing or damaged[^\n]*--overwrite$"):
    held.load_basis()
  stored("old", index=0)
  with pytest.raises(UserError, match="has version 0, and this program reads version 1: make the index anew$"):
    store.IndexStore.load(str(tmp_path / "old"))
  stored("other", stage="select")
  with pytest.raises(UserError, match="not an index"):
    store.IndexStore.load(str(tmp_path / "other"))


@slow
def test_rows_have_the_products_and_lengths_of_whole_sketched_gradients(tmp_path):
  s = settings(tmp_path)
  session = tiny.open_session(s)
  index.run(s, session)
  rows = rows_of(s, session)
  block = rows.take(np.arange(len(rows)))
  whole = Projection(session, s, session.model.params, s.seed).features("train")
  exact = whole @ whole.T
  np.testing.assert_allclose(block.square, np.diag(exact), rtol=1e-5)
  np.testing.assert_allclose(block.gradients @ block.gradients.T, exact, atol=1e-2 * np.abs(exact).max())
  hidden = np.stack([session.hidden.pooled("train", pooling=view) for view in ("mean", "last")], axis=1)
  basis = store.IndexStore.load(s.run_dir).read_basis()
  np.testing.assert_allclose(block.hidden_square, np.sum((hidden - basis.center) ** 2, axis=2), rtol=1e-4)


@slow
def test_two_devices_give_the_rows_of_one(tmp_path):
  found = []
  for count in (1, 2):
    s = settings(tmp_path / str(count), train_limit=20, eval_limit=4)
    session = sessions.open_session(s, sharding.make_mesh("", jax.devices()[:count]))
    index.run(s, session)
    found.append(rows_of(s, session).take(np.arange(len(session.splits["train"]))))
  one, two = found
  np.testing.assert_allclose(two.square, one.square, rtol=1e-5)
  np.testing.assert_allclose(two.hidden_square, one.hidden_square, rtol=1e-5)
  products = [block.gradients @ block.gradients.T for block in found]
  np.testing.assert_allclose(*products, atol=1e-2 * np.abs(products[0]).max())


@slow
def test_killed_anywhere_it_ends_in_the_same_bytes(made, tmp_path, monkeypatch):
  s, session = made
  other, writes = s.replace(run_dir=str(tmp_path / "index")), []

  write = ShardStore.write

  def write_or_die(self, *args):
    writes.append(args)
    if len(writes) % 5 == 0:
      raise tiny.Killed
    return write(self, *args)

  monkeypatch.setattr(ShardStore, "write", write_or_die)
  kills = 0
  while True:
    try:
      index.run(other, session)
      break
    except tiny.Killed:
      kills += 1
  assert kills > 1
  assert pieces_of(other.run_dir) == pieces_of(s.run_dir)


@slow
def test_examples_are_added_and_none_is_computed_again(made, tmp_path, monkeypatch):
  s, session = made
  smaller = session.with_splits(session.splits.with_parts(train=session.splits["train"].take(range(22))))
  own = s.replace(run_dir=str(tmp_path / "index"))
  index.run(own, smaller)
  before, passed = pieces_of(own.run_dir), []
  items = index.Pool._items
  note = lambda self, packer, plan, most: passed.extend(index.order_of(plan)) or items(self, packer, plan, most)  # noqa: E731
  monkeypatch.setattr(index.Pool, "_items", note)
  index.run(own, session)
  distinct = [len({record.content_key for record in own.splits["train"].records}) for own in (session, smaller)]
  assert len(passed) == distinct[0] - distinct[1] > 0
  assert before.items() <= pieces_of(own.run_dir).items()
  wanted, found = rows_of(s, session), rows_of(own, session)
  np.testing.assert_allclose(found.values("square"), wanted.values("square"), rtol=1e-4)
  passed.clear()
  index.run(own, session)
  assert not passed
  (pathlib.Path(own.run_dir) / "rows" / "000000.shard").write_bytes(b"damaged")
  with pytest.raises(UserError, match="missing or damaged"):
    rows_of(own, session)
  index.run(own, session)  # a shard of an older part
  np.testing.assert_allclose(rows_of(own, session).values("square"), wanted.values("square"), rtol=1e-4)
  with pytest.raises(UserError, match="not in the index"):
    held = store.IndexStore.load(own.run_dir)
    held.read_rows(store.keys_of([np.arange(3)], [np.zeros(3, bool)]), ["new"])


@slow
@pytest.mark.parametrize("policy", ["hybrid", "matching", "proponents"])
def test_a_selection_from_the_index_is_that_of_a_pass_over_the_examples(tmp_path, policy, monkeypatch):
  s = settings(tmp_path, policy=policy, budget="0.3", solver="identity")
  session = tiny.open_session(s)
  index.run(s, session)
  plain = s.replace(run_dir=str(tmp_path / "plain"))
  from_index = s.replace(run_dir=str(tmp_path / "chosen"), index=s.run_dir, write="query")
  select.run(plain, session)
  monkeypatch.setattr(index, "Pool", None)  # nothing is computed again, the queries neither
  select.run(from_index, session)
  wanted, found = (read_parquet(pathlib.Path(own.run_dir) / "scores.parquet") for own in (plain, from_index))
  same = np.count_nonzero(wanted["selected"] & found["selected"]) / np.count_nonzero(wanted["selected"])
  assert same >= 0.8
  np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-4)
  lists = read_parquet(pathlib.Path(from_index.run_dir) / "query_top.parquet")
  assert set(lists) == {"query", "rank", "example", "influence"} and lists["rank"].min() == 1
  names = lambda own: {path.name for path in pathlib.Path(own.run_dir).iterdir()}  # noqa: E731
  assert names(from_index) - names(plain) == {"query_top.parquet"} and names(plain) <= names(from_index)
  select.run(from_index.replace(coreset_format="parquet"), session)  # a finished run adds a form
  assert "coreset.parquet" in names(from_index)


def test_the_cost_of_a_selection_from_an_index_is_not_told_as_that_of_a_pass():
  with pytest.raises(UserError, match="^--dry_run prices passes"):
    checks.BEFORE["select"](None, Settings(index="made"))


def test_an_index_says_how_its_model_was_kept_and_older_ones_say_nothing():
  made_with = {"model": "m", "frozen_weights": "int8"}
  assert select_index._settled(Settings(index="i"), made_with).frozen_weights == "int8"
  with pytest.raises(UserError, match="^--frozen_weights=nf4: the index i was made with --frozen_weights=int8"):
    select_index._settled(Settings(index="i", frozen_weights="nf4"), made_with)
  assert select_index._settled(Settings(index="i", frozen_weights="nf4"), {"model": "m"}).frozen_weights == "nf4"


@slow
def test_other_queries_are_computed_once_and_other_flags_are_refused(made, tmp_path):
  s, session = made
  other = session.with_splits(session.splits.with_parts(eval=session.splits["test"]))
  own = s.replace(index=s.run_dir, run_dir=str(tmp_path / "a"), policy="whitened_cosine", budget="5")
  select.run(own, other)
  assert len(list((tmp_path / "index_queries").iterdir())) == 1
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(index, "Pool", None)  # nothing is computed for another budget
    select.run(own.replace(run_dir=str(tmp_path / "b"), budget="7"), other)
  for changes, told in (
    ({"policy": "bm25"}, "does not work with an index"),
    ({"layers": "last:1"}, "was made with --layers=last:2"),
    ({"write": "layer"}, "does not hold"),
    ({"index": str(tmp_path)}, "not a run folder"),
  ):
    with pytest.raises(UserError, match=told):
      select.run(own.replace(run_dir=str(tmp_path / "c"), **changes), session)


@slow
def test_agreement_with_exact_products_is_whole_where_nothing_is_left_out(tmp_path):
  given = {"sketch_size": 64, "agreement_sizes": "4,512", "solver": "identity"}
  s = tiny.run_settings(tmp_path, kind=LargePoolsFlags, **given)
  whole, few, all_ = large_pools.measure_agreement(s)
  assert whole["mean query"] > 0.999 and whole["whitened cosines, median"] > 0.99  # rounding orders ties anew
  assert all_["single queries, median"] > 0.99 and all_["whitened cosines, median"] > 0.99
  assert few["bytes an example"] < all_["bytes an example"]


@slow
def test_exact_products_are_those_of_jvp(tmp_path, monkeypatch):
  monkeypatch.setattr(large_pools, "held_bytes", lambda: 4 * 10**5)  # few gradients at a time
  s = tiny.run_settings(tmp_path, kind=LargePoolsFlags, train_limit=20, eval_limit=4)
  session = tiny.open_session(s)
  train, evals = (np.flatnonzero(session.splits[part].num_response_tokens) for part in ("train", "eval"))
  found = large_pools.exact_products(session, s, train, evals)
  chosen = sessions.choose(session, session.model.params, s.layers, "matrices")
  v = chosen.problem.gradients(session.stream(session.batcher("eval", chosen.tree, chosen.params, evals)), len(evals))
  stream = session.stream(session.packer("train", chosen.tree, chosen.params, train))
  wanted = chosen.problem.scores(stream, len(train), v, "jvp")
  np.testing.assert_allclose(found[: len(evals), len(evals) :], wanted, atol=1e-5 * np.abs(wanted).max())
  np.testing.assert_allclose(found, found.T, atol=0)
