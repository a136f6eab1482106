"""The cost model against XLA's own counts, real arrays and the functions that the run uses."""

import functools
import gc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from in2core_jax import gradients
from in2core_jax.costs import flop_counts, memory
from in2core_jax.data import packed_rows, packing
from in2core_jax.data.batches import Batcher, Shape
from in2core_jax.ihvp import ekfac, solvers
from in2core_jax.influence import normalize
from in2core_jax.model import decoder
from in2core_jax.model.objective import make_objective
from in2core_jax.parallel import sharding
from in2core_jax.params import moment_probes, subtree

quick_compile = tiny.quick_compile
# Wide enough for matrices to matter, every chosen layer a run of its own: XLA counts the body of a loop once, and a
# loop of one turn is no loop.
CONFIG = decoder.ModelConfig(512, 48, 128, 3, 4, 2, 12)
LAYERS = "1"  # one below, one chosen, one above


def make_dataset(count=24, longest=48, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(8, longest, count)
  return types.SimpleNamespace(
    ids=tuple(map(str, range(count))),
    tokens=tuple(np.zeros(length, np.int32) for length in lengths),
    response_mask=tuple(np.arange(length) >= length // 2 for length in lengths),
  )


def shapes_of(config, dtype=jnp.float32):
  return jax.eval_shape(lambda key: decoder.init_params(config, key, dtype), jax.random.key(0))


class Case:
  """A subtree of a model and one packed batch, all of them shapes."""

  def __init__(self, config=CONFIG, layers=LAYERS, modules="all", tokens=480, longest=48):
    self.config, self.params = config, shapes_of(config)
    self.tree = subtree.make_subtree(self.params, layers, modules)
    self.sub, self.frozen = flop_counts.split_shapes(self.params, self.tree)
    self.sizes = flop_counts.matrix_sizes(self.params, self.tree)
    packer = packing.Packer(make_dataset(longest=longest))
    packer.shapes = packing.sequential_shapes([packer], tokens)
    self.plan = packer.sequential_plan(tokens)[:1]
    self.shape, cells = self.plan[0]
    _, batch = packer.batch(cells, self.shape)
    self.batch = jax.eval_shape(lambda b: b, batch)

  def compiled(self, kind, cached=False):
    batch = self.batch
    if cached:
      hidden = jax.ShapeDtypeStruct((*batch.tokens.shape, self.config.hidden_size), jnp.float32)
      batch = batch._replace(hidden=hidden)
    known = {
      "losses": gradients.per_example_losses,
      "jvp": gradients.losses_and_jvp_scores,
      "gradient": gradients.sum_gradient,
    }
    function = known.get(kind) or gradients.CURVATURE_PRODUCTS[kind]
    more = () if kind in ("losses", "gradient") else (self.sub,)
    program = jax.jit(functools.partial(function, make_objective(self.config, self.tree)))
    return program.lower(self.sub, self.frozen, batch, *more).compile()


@pytest.mark.parametrize("kind", ["jvp", "gradient", "ggn", "hessian"])
def test_flops_are_xlas_within_six_per_cent(kind):
  case = Case()
  counted = case.compiled(kind).cost_analysis()["flops"]
  ours = flop_counts.pass_flops(case.sizes, kind, flop_counts.packed_work(case.plan), cached=False)
  assert 0.94 < counted / ours < 1.06  # XLA counts norms and softmax too


def test_the_boundary_cache_spares_what_lies_below():
  case = Case()
  work = flop_counts.packed_work(case.plan)
  counted = [case.compiled("jvp", cached).cost_analysis()["flops"] for cached in (False, True)]
  ours = [flop_counts.pass_flops(case.sizes, "jvp", work, cached) for cached in (False, True)]
  assert ours[0] - ours[1] == flop_counts.below_flops(case.sizes, work)
  np.testing.assert_allclose(counted[0] - counted[1], ours[0] - ours[1], rtol=0.1)


def test_per_example_gradients_and_their_contraction_are_counted():
  case, queries = Case(modules="mlp"), 3
  shape = Shape(48, 32)
  batcher = Batcher(make_dataset(6), (shape,))
  plan = [(np.arange(6), shape, 8)]
  batch = jax.eval_shape(lambda b: b, batcher.batch(np.arange(6), shape, 8))
  directions = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((queries, *leaf.shape), leaf.dtype), case.sub)
  program = jax.jit(functools.partial(gradients.vmap_scores, make_objective(CONFIG, case.tree)))
  counted = program.lower(case.sub, case.frozen, batch, directions).compile().cost_analysis()["flops"]
  work = flop_counts.row_work(plan)
  ours = flop_counts.pass_flops(case.sizes, "gradient", work, False) + flop_counts.contraction_flops(
    case.sizes, 8, queries
  )
  assert 0.9 < counted / ours < 1.1


@pytest.mark.parametrize(
  ("length", "queries", "basis"),
  [(16, 1, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((48, 1, False), (16, 2, True)))],
)
def test_measures_out_of_inputs_and_output_gradients_are_counted(length, queries, basis):
  case, size = Case(), moment_probes.EXAMPLES_AT_ONCE  # no loop over examples
  shape = Shape(length, length // 2 + 1)
  batcher, plan = Batcher(make_dataset(size, length), (shape,)), [(np.arange(size), shape, size)]
  batch = jax.eval_shape(lambda b: b, batcher.batch(np.arange(size), shape, size))
  directions = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((queries, *leaf.shape), leaf.dtype), case.sub)
  inverse = ()
  if basis:
    leaves = traverse_util.flatten_dict(case.sub, sep="/").items()
    square = lambda leaf, n: jax.ShapeDtypeStruct((1, n, n), leaf.dtype)  # noqa: E731
    factors = {p: ekfac.Factor(square(w, w.shape[1]), square(w, w.shape[2]), w, w, w) for p, w in leaves if w.ndim == 3}
    inverse = (factors, {p: w for p, w in leaves if w.ndim == 2}, 0.1)
  objective = make_objective(CONFIG, case.tree)
  program = normalize._observed.lower(objective, inverse, case.sub, case.frozen, batch, directions)
  work = flop_counts.row_work(plan, batcher.layout_of(plan))
  ours = flop_counts.measures_flops(case.sizes, work, queries, basis, False)
  assert 0.9 < program.compile().cost_analysis()["flops"] / ours < 1.1


def test_a_chosen_head_is_differentiated_too():
  every, with_head = Case(), Case(modules="all,embed")
  assert with_head.sizes.head_chosen and not every.sizes.head_chosen
  one_slot = flop_counts.Work(slots=1)
  products = [
    flop_counts.pass_flops(case.sizes, "jvp", one_slot, False) / (2 * 48 * 512) for case in (every, with_head)
  ]
  assert products == [2, 3]  # logits and slope; logits, with a tangent of the states, with one of the head


def test_jvp_of_the_top_layers_is_the_formula_of_the_method():
  tree = subtree.make_subtree(shapes_of(CONFIG), "last:2", "matrices")
  sizes = flop_counts.matrix_sizes(shapes_of(CONFIG), tree)
  every = 3 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 128)
  assert flop_counts.flops("jvp", sizes, tokens=1, responses=0) == 2 * every + 4 * sizes.subtree
  assert flop_counts.flops("losses", sizes, tokens=1, responses=0) == 2 * every


def test_flops_are_linear_in_examples_and_layers():
  def of(count, layers):
    packer = packing.Packer(make_dataset(200, seed=1))
    packer.dataset.tokens *= count
    packer = packing.Packer(
      types.SimpleNamespace(
        ids=packer.dataset.ids * count,
        tokens=packer.dataset.tokens,
        response_mask=packer.dataset.response_mask * count,
      )
    )
    params = shapes_of(CONFIG)
    sizes = flop_counts.matrix_sizes(params, subtree.make_subtree(params, f"last:{layers}"))
    return flop_counts.pass_flops(sizes, "jvp", flop_counts.packed_work(packer.sequential_plan(480)), True)

  assert of(8, 2) / of(4, 2) == pytest.approx(2, rel=0.02)
  steps = np.diff([of(1, layers) for layers in (1, 2, 3)])
  np.testing.assert_allclose(steps, steps[0], rtol=1e-12)


def test_work_is_that_of_the_batches():
  packer = packing.Packer(make_dataset(), groups=2)
  packer.shapes = packing.sequential_shapes([packer], 256)
  work = flop_counts.packed_work(packer.sequential_plan(256))
  batches = [batch for _, batch in packer.sequential(256)]
  assert work.tokens == sum(batch.tokens.size for batch in batches)
  assert work.pairs == sum(batch.tokens.size * batch.tokens.shape[1] for batch in batches)
  assert work.slots == sum(batch.slots.size for batch in batches)
  assert (work.examples, work.batches) == (24, len(batches))
  batcher = Batcher(make_dataset(), (Shape(48, 32),), multiple_of=2)
  plan = batcher.sequential_plan(256)
  work, every = flop_counts.row_work(plan, batcher.layout_of(plan), 2), flop_counts.row_work(plan)
  rows = [batch for _, batch in batcher.sequential(256)]
  assert work.tokens == sum(batch.tokens.size for batch in rows) and work.examples == 24
  assert work.slots == sum(batch.slots.size for batch in rows)
  assert every.slots == sum(batch.target.size for batch in rows)
  below = packed_rows.packed_plan(np.array([len(tokens) for tokens in make_dataset().tokens]), 256, 2)
  assert flop_counts.boundary_work(below).tokens == sum(
    laid.tokens.size for laid in packed_rows.packed_batches(make_dataset().tokens, below)
  )


def test_lissa_draws_and_measures_as_often_as_counted():
  products = []
  curvature = solvers.Curvature(lambda context, batch, v: batch * v, lambda batch: jnp.ones(()), ())
  v = jnp.ones((1, 5))
  steady = solvers.fixed_matvec(curvature, lambda: iter([jnp.ones(())] * 3))

  def matvec(u):
    products.extend([1] * 3)
    return steady(u)

  def draw(key):
    products.append(1)
    return jnp.ones(())

  settings = solvers.LissaSettings(0.1, scale=10.0, depth=25, repeat=2, tol=0.0, lambda_max=1.0)
  solvers.lissa(solvers.StochasticCurvature(curvature, draw, matvec), v, jax.random.key(0), settings)
  after_the_eigenvalue = flop_counts.num_products("lissa", 3, 25, 2, 5) - 10 * 3
  assert len(products) == after_the_eigenvalue + 3  # and the residual of the mean of both runs


# ---- memory --------------------------------------------------------------------------


def test_program_memory_is_that_of_compiled_programs_within_a_third():
  case = Case(layers="last:2", tokens=768, longest=96)
  program = memory.Program("", case.shape.height, case.shape.num_tokens, case.shape.num_slots)
  for kind in ("jvp", "gradient"):
    used = case.compiled(kind, cached=True).memory_analysis().temp_size_in_bytes
    ours = memory.program_bytes(CONFIG, case.sizes, program._replace(kind=kind), "float32")
    assert 0.75 < ours / used < 1.35, (kind, ours, used)


def test_what_reverse_mode_keeps_grows_with_rows_and_layers():
  a_layer = memory.residual_bytes(CONFIG, 64, "float32", True)
  case = memory.Program("gradient", 4, 64, 8)
  sizes = [
    flop_counts.matrix_sizes(shapes_of(CONFIG), subtree.make_subtree(shapes_of(CONFIG), f"last:{k}")) for k in (1, 3)
  ]
  few, more = (memory.program_bytes(CONFIG, size, case, "float32") for size in sizes)
  assert more - few == 2 * 4 * a_layer
  assert memory.residual_bytes(CONFIG, 64, "float32", False) < a_layer  # inputs of the matrices are not needed


def test_parameters_on_a_device_are_those_that_place_puts_there():
  config = tiny.make_config(hidden_size=16, intermediate_size=24, num_heads=4, head_dim=4, vocab_size=36)
  params = tiny.make_params(config, lora=3)
  for spec in ("data:8", "fsdp:4,data:2", "fsdp:2,tensor:2,data:2"):
    mesh = sharding.make_mesh(spec)
    placed = sharding.place_params(params, mesh)
    first = jax.devices()[0]
    found = [s.data.nbytes for leaf in jax.tree.leaves(placed) for s in leaf.addressable_shards if s.device == first]
    assert memory.tree_bytes(params, mesh) == sum(found)


@pytest.mark.parametrize("layers", ["last:2", "all", "0,3"])
def test_copied_bytes_are_the_arrays_that_split_makes(layers):
  config = tiny.make_config()
  params = tiny.make_params(config)
  tree = subtree.make_subtree(params, layers, "mlp")
  there = {id(leaf) for leaf in jax.tree.leaves(params)}
  made = sum(leaf.nbytes for leaf in jax.tree.leaves(subtree.split(params, tree)) if id(leaf) not in there)
  assert memory.copied_bytes(params, tree, sharding.make_mesh("", jax.devices()[:1])) == made


@pytest.mark.parametrize("acceleration", ["none", "momentum"])
def test_lissa_holds_no_more_vectors_than_counted(acceleration):
  size, most = 40_009, []  # a size that nothing else has
  curvature = solvers.Curvature(lambda context, batch, v: batch * v, lambda batch: jnp.ones(()), ())
  matvec = solvers.fixed_matvec(curvature, [jnp.ones(())])

  def look(state):
    gc.collect()
    most.append(sum(leaf.size == size for leaf in jax.live_arrays()))

  settings = solvers.LissaSettings(0.1, scale=10.0, depth=20, tol=0.0, average=0.5, acceleration=acceleration)
  sampled = solvers.StochasticCurvature(curvature, lambda key: jnp.ones(()), matvec)
  solvers.lissa(sampled, jnp.ones((1, size)), jax.random.key(0), settings, look)
  counted = memory.num_vectors(flop_counts.Inverse("lissa", "ggn", 20), acceleration != "none")
  # Two more live inside a step: the product and its sum.
  assert max(most) + 2 <= counted <= max(most) + 4
