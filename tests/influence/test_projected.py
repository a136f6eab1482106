"""The projected store: unbiased, equal to the projection by hand, never trusted blindly, and honest about its noise."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.data.batches import Batcher, Layout, Shape
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.influence import projected
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.influence.projected import Again, ProjectedStore, SketchSettings, make_sketch
from in2core_jax.params import adapters, subtree

IDENTITY = {"weights": "abc", "data": "def"}
MODULES = ("attention/k_proj", "mlp/up_proj")


def kernels(layers=3, inputs=48, outputs=40, small=20, dtype=jnp.float32):
  """Parameters with two kernels, one of them with a side that is no longer than 32, and a norm."""
  shapes = {"attention/k_proj/kernel": (inputs, small), "mlp/up_proj/kernel": (inputs, outputs), "mlp_norm/scale": (7,)}
  flat = {path: jnp.zeros((layers, *shape), dtype) for path, shape in shapes.items()}
  return {"layers": traverse_util.unflatten_dict(flat, sep="/")}


def random_like(params, rows, lead, seed):
  """A random tree like some rows of `params`, with a leading axis; two such trees have a part in common."""
  rng, shared = np.random.default_rng(seed), np.random.default_rng(99)

  def draw(leaf):
    shape = (len(rows), *leaf.shape[1:])
    return jnp.asarray(shared.standard_normal(shape) + rng.standard_normal((lead, *shape)))

  return {"layers": jax.tree.map(draw, params["layers"])}


def inner(a, b):
  """<G, S> over the kernels, for each of the leading axes: [A, B]."""
  flat = [traverse_util.flatten_dict(tree["layers"], sep="/") for tree in (a, b)]
  matrices = [
    np.concatenate(
      [np.asarray(one[f"{name}/kernel"], np.float64).reshape(len(one[f"{name}/kernel"]), -1) for name in MODULES], 1
    )
    for one in flat
  ]
  return matrices[0] @ matrices[1].T


# ---- the projection ------------------------------------------------------------------


def products_of_seeds(params, g, s, seeds):
  """<Pg, Ps> under each seed, float64 [seeds, A, B]."""
  tree = make_sketch(params, "0,2", SketchSettings()).tree

  @jax.jit
  def products(keys):
    def one(seed):
      sketched = adapters.add_sketch(params, 32, jax.random.key(seed))
      sketch = projected.Sketch(SketchSettings(), sketched, tree)
      return projected.project_direction(g, sketch) @ projected.project_direction(s, sketch).T

    return jax.lax.map(one, keys, batch_size=50)

  return np.asarray(products(jnp.arange(seeds)), np.float64)


def test_products_of_projections_are_unbiased():
  """Mean over 1,500 seeds within 4 standard errors, which are small enough to see a wrong scale."""
  params = kernels()
  g, s = (random_like(params, [0, 2], 2, seed) for seed in (1, 2))
  found, wanted = products_of_seeds(params, g, s, 1500), inner(g, s)
  error = found.std(axis=0) / np.sqrt(len(found))
  assert np.all(error < 0.01 * np.abs(wanted))
  assert np.all(np.abs(found.mean(axis=0) - wanted) < 4 * error)
  assert np.all(found.std(axis=0) > 0.2 / 32 * np.abs(wanted))  # one seed is an estimate


def test_both_sides_are_independent():
  """G = a a^T and S = c c^T with a . c = 0: were L and R the same signs, the mean would be |G| |S| / p instead of 0."""
  params = kernels()
  vectors = np.random.default_rng(3).standard_normal((2, 48)) * (np.arange(48) % 2 == [[0], [1]])

  def outer(vector):
    draw = lambda leaf: jnp.asarray(np.tile(np.outer(vector, vector)[: leaf.shape[1], : leaf.shape[2]], (1, 2, 1, 1)))  # noqa: E731
    return {
      "layers": jax.tree.map(lambda leaf: draw(leaf) if leaf.ndim == 3 else jnp.zeros((1, 2, 7)), params["layers"])
    }

  g, s = outer(vectors[0]), outer(vectors[1])
  assert inner(g, s) == 0
  found = products_of_seeds(params, g, s, 1500)
  error = found.std() / np.sqrt(found.size)
  bias = np.sqrt(inner(g, g) * inner(s, s)).item() / 2 / 32 / 2  # of one of two layers, and of one of two kernels
  assert abs(found.mean()) < 4 * error < 0.5 * bias


def test_short_sides_are_exact(x64):
  params = kernels(inputs=30, outputs=32)
  sketch = make_sketch(params, "0,2", SketchSettings(size=32))
  g, s = (random_like(params, [0, 2], 3, seed) for seed in (1, 2))
  found = projected.project_direction(g, sketch) @ projected.project_direction(s, sketch).T
  np.testing.assert_allclose(found, inner(g, s), rtol=1e-12)


@pytest.mark.parametrize(
  ("layers", "chosen", "size"), [(4, "all", 128), (32, "all", 80), (32, "last:16", 128), (144, "last:1", 128)]
)
def test_a_size_of_0_is_as_large_as_the_numbers_of_all_matrices_allow(layers, chosen, size, monkeypatch):
  params = kernels(layers=layers, inputs=8, outputs=8, small=8)  # two matrices a layer
  assert projected.size_of(params, chosen, 0) == size
  assert projected.size_of(params, chosen, 7) == 7
  monkeypatch.setattr(projected, "MOST_NUMBERS", 1)
  assert projected.size_of(params, chosen, 0) == 32


@pytest.mark.parametrize("size", [0, 1, 16, 31])
def test_small_sketches_are_refused_and_why(size):
  with pytest.raises(UserError, match=rf"--sketch_size={size} is below 32: .* about 0\.44.* use 32 or more"):
    SketchSettings(size=size)


def test_settings_that_mean_nothing_are_refused():
  assert SketchSettings(size=3, allow_small=True).size == 3 and SketchSettings().size == 32
  for bad in ({"size": 0, "allow_small": True}, {"dtype": "float16"}, {"shard_bytes": 0}):
    with pytest.raises(UserError):
      SketchSettings(**bad)


def test_directions_that_do_not_fit_are_refused():
  params = kernels()
  sketch = make_sketch(params, "0,2", SketchSettings())
  with pytest.raises(
    UserError, match=r"k_proj/kernel has the shape \(2, 3, 48, 20\) in the direction.*\[Q, 2, 48, 20\]"
  ):
    projected.project_direction(random_like(params, [0, 1, 2], 2, 0), sketch)
  with pytest.raises(UserError, match="attention/k_proj/kernel is missing in the direction"):
    projected.project_direction({"final_norm": {"scale": jnp.ones((1, 7))}}, sketch)
  with pytest.raises(UserError, match="a sketch has cores only"):
    make_sketch(params, "0,2", SketchSettings(), "matrices")


def test_uncovered_share_counts_all_but_covered_kernels():
  params = kernels(layers=1)
  sketch = make_sketch(params, "0", SketchSettings(), "mlp/up_proj/core")
  flat = {
    "attention/k_proj/kernel": np.full((2, 1, 1, 1), 1.0),
    "mlp/up_proj/kernel": np.full((2, 1, 1, 2), 2.0) * [[[[1.0]]], [[[0.0]]]],
    "mlp_norm/scale": np.full((2, 1, 3), 1.0) * [[[1.0]], [[0.0]]],
  }
  tree = {"layers": traverse_util.unflatten_dict(flat, sep="/"), "final_norm": {"scale": np.array([[2.0], [0.0]])}}
  np.testing.assert_allclose(projected.uncovered_share(tree, sketch), [(1 + 3 + 4) / 16, 1.0])
  assert projected.uncovered_share(jax.tree.map(np.zeros_like, tree), sketch).tolist() == [0, 0]


# ---- a model -------------------------------------------------------------------------


def tiny_sketch(size=3, seed=0, dtype=jnp.float64, **options):
  """(config, sketch, problem of projected gradients, problem of the kernels' gradients, stream of rows)."""
  config = tiny.smaller_config()
  params = tiny.make_params(config, dtype)
  sketch = make_sketch(params, "0,2", SketchSettings(size, seed, allow_small=True, **options))
  problems = []
  for whole, tree in ((sketch.params, sketch.tree), (params, subtree.make_subtree(params, "0,2", "matrices"))):
    problems.append(CompiledObjective(tiny.make_objective(config, tree), *subtree.split(whole, tree), microbatch=3))
  dataset = tiny.make_dataset(config.vocab_size)

  def stream_of(rows):
    taken = type(dataset)(**{name: tuple(values[row] for row in rows) for name, values in vars(dataset).items()})
    return lambda: Batcher(taken, [Shape(13, 9)], layout={Shape(13, 9): Layout(3, 27)}).sequential(39)

  return sketch, *problems, stream_of


def by_hand(gradients, sketch):
  """The dense two-sided projection, kernel by kernel in NumPy, from the sides as they stand in the parameters."""
  flat = traverse_util.flatten_dict(sketch.params["layers"], sep="/")
  columns = []
  for module in sorted(path.removesuffix("/core") for path in flat if path.endswith("/core")):
    for_layers = []
    for row, layer in enumerate((0, 2)):
      left, right = (np.asarray(flat[f"{module}/{side}"][layer], np.float64) for side in ("left", "right"))
      block, name = module.split("/")
      kernel = np.asarray(gradients["layers"][block][name]["kernel"], np.float64)[:, row]
      for_layers.append(np.stack([left.T @ each @ right.T for each in kernel]).reshape(len(kernel), -1))
    columns += for_layers
  return np.concatenate(columns, axis=1)


def test_scores_of_the_store_are_the_projection_by_hand(tmp_path, x64):
  sketch, cores, matrices, stream_of = tiny_sketch(shard_bytes=1)
  n, everything = len(tiny.ROLES), np.arange(len(tiny.ROLES))
  store = ProjectedStore.open(tmp_path / "s", IDENTITY, sketch, n)
  assert store.shard_examples == 1
  assert store.fill(lambda rows: cores.adapter_features(stream_of(rows), len(rows))) == n
  each = matrices.gradients(stream_of(everything), n)
  hand = by_hand(each, sketch)
  scale = np.abs(hand).max()
  assert hand.shape == (n, store.width) and scale > 1e-3
  np.testing.assert_allclose(store.features(), hand, atol=1e-6 * scale)
  # A gradient as a query, and a direction that is none: r = (some matrix) g.
  queries = cores.adapter_features(stream_of(everything[::-1]), n)
  np.testing.assert_allclose(store.scores(queries), hand[::-1] @ hand.T, atol=1e-5 * (hand @ hand.T).max())
  r = tiny.direction(matrices.sub, queries=2)
  projected_r = projected.project_direction(r, sketch)
  np.testing.assert_allclose(projected_r, by_hand(r, sketch), rtol=1e-10)
  scores = store.scores(projected_r)
  assert scores.dtype == np.float32 and not np.any(scores[:, tiny.NO_RESPONSE])
  wanted = by_hand(r, sketch) @ hand.T
  np.testing.assert_allclose(scores, wanted, atol=1e-5 * np.abs(wanted).max())
  assert projected.uncovered_share(r, sketch).tolist() == [0, 0]


# ---- the files -----------------------------------------------------------------------

N = 11


def plain_features(rows, width):
  """Numbers that name their row."""
  return np.stack([np.random.default_rng(row).standard_normal(width) for row in rows]).astype(np.float32)


def plain_store(path, seed=0, identity=IDENTITY, **options):
  """A store of two small kernels, three examples a shard."""
  settings = SketchSettings(32, seed, **options)
  sketch = make_sketch(kernels(layers=2, inputs=3, outputs=2, small=2), "all", settings)
  assert sketch.width == 2 * (3 * 2 + 3 * 2)
  return ProjectedStore.open(path, identity, sketch, N)


def fill(store, asked=None):
  def features(rows):
    if asked is not None:
      asked.append(rows.tolist())
    return plain_features(rows, store.width)

  return store.fill(features)


def shard_bytes(path):
  return {file.name: file.read_bytes() for file in sorted((Path(path) / "projected").iterdir())}


SMALL = {"shard_bytes": 4 * 24 * 3}  # three examples


def test_shards_hold_consecutive_rows_and_are_computed_once(tmp_path):
  store, asked = plain_store(tmp_path / "s", **SMALL), []
  assert fill(store, asked) == 4
  assert asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
  again = plain_store(tmp_path / "s", **SMALL)
  assert fill(again, asked) == 0 and len(asked) == 4
  wanted = plain_features(range(N), store.width)
  np.testing.assert_array_equal(again.features(), wanted)
  queries = np.random.default_rng(50).standard_normal((4, store.width))
  np.testing.assert_allclose(again.scores(queries), queries @ wanted.T.astype(np.float64), rtol=1e-5, atol=1e-5)


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
import test_projected as t
store, rename, count = t.plain_store({path!r}, **t.SMALL), os.replace, 0

def replace(source, target):
  global count
  count += str(target).endswith(".shard")
  if count == 3:
    os.kill(os.getpid(), signal.SIGKILL)  # the third shard is on disk under its temporary name
  rename(source, target)

os.replace = replace
t.fill(store)
"""


def test_killed_in_a_write_and_resumed_gives_the_same_bytes(tmp_path):
  tests = Path(__file__).parents[1]
  script = KILLED.format(
    root=str(tests.parent), tests=str(tests), here=str(Path(__file__).parent), path=str(tmp_path / "killed")
  )
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  left = sorted(file.name for file in (tmp_path / "killed/projected").iterdir())
  assert len(left) == 3 and left[0].endswith(".in2core-tmp") and left[1:] == ["000000.shard", "000001.shard"]
  asked = []
  assert fill(plain_store(tmp_path / "killed", **SMALL), asked) == 2
  assert asked == [[6, 7, 8], [9, 10]]
  fill(plain_store(tmp_path / "whole", **SMALL))
  assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")


def test_damaged_and_foreign_shards_are_named_and_computed_again(tmp_path, caplog):
  store = plain_store(tmp_path / "s", **SMALL)
  fill(store)
  good = shard_bytes(tmp_path / "s")
  folder = tmp_path / "s/projected"
  broken = bytearray(good["000001.shard"])
  broken[-5] ^= 1
  (folder / "000001.shard").write_bytes(broken)
  with pytest.raises(UserError, match=r"000001.shard: missing or damaged; fill the store again"):
    store.scores(np.ones((1, store.width)))
  fill(plain_store(tmp_path / "other", seed=1, **SMALL))
  (folder / "000002.shard").write_bytes(shard_bytes(tmp_path / "other")["000002.shard"])
  (folder / "000003.shard").write_bytes(good["000000.shard"])
  caplog.clear()
  asked = []
  with caplog.at_level(logging.WARNING):
    assert fill(store, asked) == 3
  assert asked == [[3, 4, 5], [6, 7, 8], [9, 10]]
  for words in ("000001.shard: damaged", "000002.shard: written for other settings", "000003.shard: a copy of shard 0"):
    assert words in caplog.text
  assert shard_bytes(tmp_path / "s") == good


def test_a_store_of_other_settings_is_refused(tmp_path):
  fill(plain_store(tmp_path / "s"))
  for options, words in (
    ({"seed": 1}, "sketch.seed is 0 there and 1 now"),
    ({"identity": IDENTITY | {"weights": "other"}}, "gradients.weights is 'abc' there and 'other' now"),
    ({"dtype": "bfloat16"}, "sketch.dtype is 'float32' there and 'bfloat16' now"),
  ):
    with pytest.raises(UserError, match=words):
      plain_store(tmp_path / "s", **options)
  sketch = make_sketch(kernels(layers=2, inputs=3, outputs=2, small=2), "1", SketchSettings(33))
  with pytest.raises(UserError, match="sketch.layers is .* there and .* now.*sketch.size is 32 there and 33 now"):
    ProjectedStore.open(tmp_path / "s", IDENTITY, sketch, N)
  assert fill(plain_store(tmp_path / "s")) == 0


def test_other_signs_from_the_same_seed_are_another_identity():
  params = kernels()
  one, two = make_sketch(params, "0,2", SketchSettings()), make_sketch(params, "0,2", SketchSettings())
  assert one.identity() == two.identity()
  flipped = traverse_util.flatten_dict(two.params["layers"], sep="/")
  flipped["mlp/up_proj/right"] = flipped["mlp/up_proj/right"].at[2, 0, 0].multiply(-1)
  params = {"layers": traverse_util.unflatten_dict(flipped, sep="/")}
  other = projected.Sketch(two.settings, params, two.tree).identity()
  assert {name for name, value in one.identity().items() if other[name] != value} == {"signs_sha256"}


def test_bfloat16_takes_half_the_space_and_adds_up_in_float32(tmp_path):
  wide, narrow = plain_store(tmp_path / "w"), plain_store(tmp_path / "n", dtype="bfloat16")
  fill(wide), fill(narrow)
  sizes = [len(shard_bytes(tmp_path / name)["000000.shard"]) for name in "wn"]
  assert sizes[0] - sizes[1] > 0.9 * 2 * N * wide.width
  queries = np.random.default_rng(3).standard_normal((2, wide.width)).astype(np.float32)
  exact, found = wide.scores(queries), narrow.scores(queries)
  assert found.dtype == np.float32
  rounded = np.asarray(jnp.asarray(plain_features(range(N), wide.width), jnp.bfloat16).astype(jnp.float32))
  np.testing.assert_allclose(found, queries @ rounded.T, rtol=1e-5, atol=1e-5)
  assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_numbers_that_are_none_are_refused(tmp_path):
  store = plain_store(tmp_path / "s", **SMALL)

  def broken(rows):
    found = plain_features(rows, store.width)
    found[rows == 4] = np.nan
    return found

  with pytest.raises(UserError, match=r"of 1 example are not finite \(first rows \[4\]\)"):
    store.fill(broken)
  assert list(shard_bytes(tmp_path / "s")) == ["000000.shard"]
  fill(store)
  with pytest.raises(UserError, match=r"shape \(2, 23\), the store holds 24"):
    store.scores(np.ones((2, 23)))
  with pytest.raises(UserError, match=r"projected queries \[1\] are not finite"):
    store.scores(np.where(np.arange(2)[:, None] == 1, np.inf, np.ones((2, 24))))


# ---- self-agreement ------------------------------------------------------------------


def test_self_agreement_is_the_rank_correlation_of_what_was_projected():
  rng = np.random.default_rng(0)
  scores = rng.standard_normal((3, 40)).astype(np.float32)
  again = scores + rng.standard_normal((3, 40)).astype(np.float32)
  scores[:, :10] = again[:, :10] = 0  # no response: they would agree perfectly
  scores[2] = 0
  again[2, 11:] = 0
  found = projected.self_agreement(scores, again)
  np.testing.assert_allclose(found[:2], [statistics.spearman(scores[q, 10:], again[q, 10:]) for q in range(2)])
  assert abs(found[0] - statistics.spearman(scores[0], again[0])) > 1e-3
  assert np.isnan(found[2])
  with pytest.raises(UserError):
    projected.self_agreement(scores, again[:, 1:])


def test_self_agreement_grows_with_the_size_and_is_kept_with_the_store(tmp_path):
  """Random gradients of rank one, as a token's are: what two seeds have in common grows with p, and is noted."""
  rng = np.random.default_rng(7)
  n, inputs, outputs = 60, 140, 100
  params = {"layers": {"mlp": {"up_proj": {"kernel": jnp.zeros((1, inputs, outputs))}}}}
  tree = lambda leaf: {"layers": {"mlp": {"up_proj": {"kernel": jnp.asarray(leaf, jnp.float32)[:, None]}}}}  # noqa: E731
  query = rng.standard_normal((1, inputs, outputs))
  examples = (
    rng.standard_normal((n, inputs, 1)) * rng.standard_normal((n, 1, outputs))
    + query * rng.standard_normal((n, 1, 1)) / 4
  )
  found = {}
  for size in (4, 64):
    sketches = [make_sketch(params, "0", SketchSettings(size, seed, allow_small=True)) for seed in (0, 1)]
    features = [lambda rows, s=s: np.asarray(projected.project_direction(tree(examples[rows]), s)) for s in sketches]
    queries = [np.asarray(projected.project_direction(tree(query), s)) for s in sketches]
    store = ProjectedStore.open(tmp_path / str(size), IDENTITY, sketches[0], n)
    store.fill(features[0])
    assert store.agreement is None
    outcome = projected.measure_self_agreement(store, queries[0], Again(sketches[1], queries[1], features[1]), 50)
    assert outcome == store.agreement == json.loads((tmp_path / str(size) / "self_agreement.json").read_text())
    assert (outcome["size"], outcome["seeds"], outcome["examples"]) == (size, [0, 1], 50)
    rows = np.unique(np.linspace(0, n - 1, 50).round().astype(int))
    wanted = statistics.spearman(store.scores(queries[0])[0, rows], (queries[1] @ features[1](rows).T)[0])
    assert outcome["spearman"] == [outcome["mean"]] == [pytest.approx(wanted, abs=1e-6)]
    found[size] = outcome["mean"]
  print(found)
  assert found[4] < 0.6 < 0.85 < found[64]
  nothing = [np.concatenate([q, 0 * q]) for q in queries]
  outcome = projected.measure_self_agreement(store, nothing[0], Again(sketches[1], nothing[1], features[1]))
  assert outcome["spearman"] == [outcome["mean"], None] and outcome["examples"] == n and outcome == store.agreement
  with pytest.raises(UserError, match="both sketches have the seed 0"):
    projected.measure_self_agreement(store, queries[0], Again(sketches[0], queries[0], features[0]))
  other = make_sketch(params, "0", SketchSettings(32, 1))
  with pytest.raises(UserError, match="differ in size: only the seed may be another"):
    projected.measure_self_agreement(store, queries[0], Again(other, queries[1], features[1]))
