"""Packed rows: nothing lost, nothing seen of a neighbour, and little padding."""

import itertools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from in2core_jax import gradients
from in2core_jax.data import packed_rows, packing, row_plans
from in2core_jax.data.batches import Batch
from in2core_jax.data.packing import PackedShape, Packer
from in2core_jax.errors import UserError
from in2core_jax.model import decoder
from in2core_jax.parallel import sharding


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=80), st.integers(1, 3), st.integers(1, 4000))
def test_every_token_stands_once_and_starts_at_its_place(lengths, multiple, batch_tokens):
  tokens = [np.arange(length, dtype=np.int32) + 7 * i for i, length in enumerate(lengths)]
  plan = packed_rows.packed_plan(np.array(lengths), batch_tokens, multiple)
  seen = []
  for rows in packed_rows.packed_batches(tokens, plan, pad_id=-1):
    assert rows.tokens.shape[0] % multiple == 0
    flat, offsets = rows.tokens.reshape(-1), rows.offsets.reshape(-1)
    covered = np.zeros(flat.size, bool)
    for example, place in zip(rows.examples, rows.places, strict=True):
      stop = place + lengths[example]
      assert place // rows.tokens.shape[1] == (stop - 1) // rows.tokens.shape[1], "an example is cut"
      np.testing.assert_array_equal(flat[place:stop], tokens[example])
      np.testing.assert_array_equal(offsets[place:stop], np.arange(lengths[example]))
      assert not covered[place:stop].any()
      covered[place:stop] = True
    assert (flat[~covered] == -1).all() and (offsets[~covered] == 0).all()
    seen += rows.examples.tolist()
  assert sorted(seen) == list(range(len(lengths)))


def test_rows_are_nearly_full_and_long_examples_keep_to_themselves():
  lengths = np.random.default_rng(0).integers(10, 97, 1000)
  ((length, _, rows),) = packed_rows.packed_plan(lengths, 10**9)
  assert length == 96 and lengths.sum() > 0.95 * 96 * len(rows)
  mixed = np.concatenate([lengths, [513, 900, 1100]])
  assert list(row_plans.row_lengths(mixed)) == [96, 912, 1104]


def test_best_fit_finds_the_perfect_packing():
  assert row_plans.best_fit([3, 7, 5, 5, 8, 2], 10) == [[4, 5], [1, 0], [2, 3]]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}, tiny.GEMMA3], ids=["plain", "window", "gemma 3"])
def test_packed_examples_see_only_themselves(x64, changes, monkeypatch):
  monkeypatch.setattr(decoder, "SHORTEST_RUN", 2)  # rows of nine in three runs of queries
  config = tiny.make_config(**changes)
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tiny.make_params(config))
  tokens = [np.random.default_rng(i).integers(0, config.vocab_size, n) for i, n in enumerate([5, 3, 8, 1, 6])]
  plan = [(9, 3, [[2, 3], [0, 1], [4]])]
  (rows,) = packed_rows.packed_batches(tokens, plan, pad_id=1)
  hidden = decoder.run_layers(
    config, params["layers"], decoder.embed(config, params, rows.tokens), jnp.asarray(rows.offsets)
  )
  assert jnp.all(jnp.isfinite(hidden))
  flat = hidden.reshape(-1, config.hidden_size)
  for example, place in zip(rows.examples, rows.places, strict=True):
    alone = decoder.run_layers(config, params["layers"], decoder.embed(config, params, tokens[example][None]))[0]
    np.testing.assert_allclose(flat[place : place + len(alone)], alone, rtol=1e-10, atol=1e-12)


# --- batches


def make_dataset(lengths):
  """Examples of (tokens, responses), the responses at the end; token ids tell example and place."""
  return types.SimpleNamespace(
    ids=[f"e{i}" for i in range(len(lengths))],
    tokens=[np.arange(n, dtype=np.int32) + 100 * i for i, (n, _) in enumerate(lengths)],
    response_mask=[np.arange(n) >= n - r for n, r in lengths],
  )


def check_batch(rows, batch, dataset, groups):
  """Every response is where its group looks for it, and predicted from the token before."""
  assert isinstance(batch, Batch)
  there = np.flatnonzero(rows >= 0)
  np.testing.assert_array_equal(np.flatnonzero(batch.valid), there)
  size, tokens = len(batch.valid) // groups, batch.tokens.reshape(groups, -1)
  slots = [row[row < size * batch.weight.shape[1]] for row in batch.slots]
  filled = np.concatenate([part + g * size * batch.weight.shape[1] for g, part in enumerate(slots)])
  np.testing.assert_array_equal(np.sort(filled), np.flatnonzero(batch.weight.reshape(-1) > 0))
  for b in there:
    ids, mask = dataset.tokens[rows[b]], dataset.response_mask[rows[b]]
    used = batch.weight[b] > 0
    np.testing.assert_array_equal(batch.target[b, used], ids[mask])
    np.testing.assert_allclose(batch.weight[b, used], 1 / max(mask.sum(), 1))
    before = tokens[b // size, batch.position[b, used]]
    np.testing.assert_array_equal(before, ids[np.flatnonzero(mask) - 1])


pairs = st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


@settings(deadline=None, max_examples=50)
@given(st.lists(pairs, min_size=1, max_size=40), st.integers(1, 300), st.integers(1, 7), st.integers(1, 3))
def test_each_example_exactly_once(lengths, batch_tokens, batch_size, groups):
  dataset = make_dataset(lengths)
  plain = Packer(dataset, groups=groups)
  shapes = packing.sequential_shapes([plain], batch_tokens)
  packer = Packer(dataset, groups=groups, shapes=shapes)
  seen = []
  for rows, batch in packer.sequential(batch_tokens):
    check_batch(rows, batch, dataset, groups)
    seen += rows[rows >= 0].tolist()
  assert sorted(seen) == list(range(len(lengths)))
  assert {shape for shape, _ in packer.sequential_plan(batch_tokens)} <= set(shapes)
  seen, sizes = [], []
  for rows, batch in Packer(dataset, groups=groups).shuffled(batch_size, seed=5, epoch=1):
    check_batch(rows, batch, dataset, groups)
    seen += rows[rows >= 0].tolist()
    sizes.append(np.count_nonzero(rows >= 0))
  assert sorted(seen) == list(range(len(lengths)))
  assert len(sizes) == -(-len(lengths) // batch_size) and sum(size < batch_size for size in sizes) <= 1


def test_shapes_are_shared_and_outgrown_where_they_must_be():
  rng = np.random.default_rng(0)
  make = lambda count, most: make_dataset([(int(n), int(n) // 3) for n in rng.integers(10, most, count)])  # noqa: E731
  train, evals = Packer(make(400, 90)), Packer(make(30, 60))
  shapes = packing.sequential_shapes([train, evals], 1024)
  sized = [Packer(packer.dataset, shapes=shapes) for packer in (train, evals)]
  assert len({shape for packer in sized for shape, _ in packer.sequential_plan(1024)}) == 1
  longer = Packer(make_dataset([(200, 150)]), shapes=shapes)
  ((shape, _),) = longer.sequential_plan(1024)
  assert shape.num_tokens == 208 and shape.num_responses == 160 and shape not in shapes


def test_batches_of_a_training_are_alike():
  rng = np.random.default_rng(1)
  lengths = [(int(n), int(n) // 2) for n in np.clip(rng.lognormal(3.3, 0.6, 1000), 4, 96)]
  packer = Packer(make_dataset(lengths))
  shape = packing.training_shape([packer], 16)
  packer = Packer(packer.dataset, shapes=[shape])
  plan = [item for epoch in range(2) for item in packer.shuffled_plan(16, 0, epoch)]
  assert {used for used, _ in plan} == {shape}
  total = sum(length for length, _ in lengths)
  assert 2 * total > 0.8 * shape.height * shape.num_tokens * len(plan)  # little padding, with one program


def test_trainings_share_programs_as_far_as_that_pays():
  """The cut of the sets into shapes is the best of all cuts, and short examples do not pay for long ones."""
  rng = np.random.default_rng(2)
  means = (8, 8, 9, 20, 40, 41, 60)
  sets = [Packer(make_dataset([(int(n) + 4, int(n)) for n in rng.poisson(mean, 40) + 1])) for mean in means]
  for steps, families in ((1, (1, 1)), (10, (2, 4)), (1000, (5, 7))):
    shapes = packing.training_shapes(sets, 8, steps)
    assert families[0] <= len(shapes) <= families[1] and len({shape.num_tokens for shape in shapes}) == 1
    length = shapes[0].num_tokens
    needs = [
      shape
      for p in sets
      for shape in packing.join(
        used for seed in range(3) for epoch in range(2) for used, _ in p.shuffled_plan(8, seed, epoch, length)
      )
    ]
    needs.sort(key=packing._step_cost)
    costs = []
    for cuts in itertools.product((False, True), repeat=len(needs) - 1):
      edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(needs)]
      cost = 0
      for start, stop in itertools.pairwise(edges):
        (shape,) = packing.join(needs[start:stop])
        cost += packing._step_cost(shape) * (stop - start) * steps
        cost += packing._COMPILE_STEPS * packing._step_cost(*packing.join(needs))
      costs.append((cost, len(edges) - 1))
    assert len(shapes) == min(costs)[1]
    for p in sets:
      sized = Packer(p.dataset, shapes=shapes)
      plan = [item for seed in range(3) for item in sized.shuffled_plan(8, seed, 1)]
      assert {used for used, _ in plan} <= set(shapes)
      for used, cells in plan:  # the least that holds it
        need = sized._need(used.num_tokens, cells)
        assert used == min(shape for shape in shapes if shape.holds(need))


def test_every_example_meets_every_other_sometime():
  packer = Packer(make_dataset([(10 + i // 8, 2) for i in range(64)]))
  partners = set()
  for epoch in range(150):
    for _, cells in packer.shuffled_plan(8, 0, epoch):
      examples = [e for row in cells[0] for e in row]
      partners |= set(examples) if 0 in examples else set()
  # Its own stratum, the eight shortest, apart.
  assert len(partners) == 1 + 56


def test_shuffled_depends_on_seed_and_epoch_only():
  packer = Packer(make_dataset([(5 + i % 20, 1 + i % 3) for i in range(50)]))
  order = lambda seed, epoch: [cells for _, cells in packer.shuffled_plan(8, seed, epoch)]  # noqa: E731
  assert order(1, 0) == order(1, 0)
  assert order(1, 0) != order(1, 1)
  assert order(1, 0) != order(2, 0)


def test_any_number_of_examples_can_be_cut_into_batches():
  """The rest that fills no batch is drawn evenly, and no example twice: also where two stretches share a row."""
  for size, batch_size in ((15, 8), (23, 8), (7, 8), (101, 34)):
    dataset = types.SimpleNamespace(
      tokens=[np.zeros(3 + i % 9, np.int32) for i in range(size)],
      response_mask=[np.zeros(3 + i % 9, bool) for i in range(size)],
      ids=list(range(size)),
    )
    packer = Packer(dataset)
    for seed in range(20):
      plan = packer.shuffled_plan(batch_size, seed, 1)
      assert sorted(i for _, cells in plan for row in cells[0] for i in row) == list(range(size))
      sizes = sorted(sum(len(row) for row in cells[0]) for _, cells in plan)
      assert sizes == sorted([size % batch_size] * (size % batch_size > 0) + [batch_size] * (size // batch_size))


def test_shuffled_is_the_same_in_another_process():
  code = (
    "import types, numpy as np\nfrom in2core_jax.data.packing import Packer\n"
    "d = types.SimpleNamespace(tokens=[np.zeros(3 + i % 9, np.int32) for i in range(20)],"
    " response_mask=[np.zeros(3 + i % 9, bool) for i in range(20)], ids=list(range(20)))\n"
    "print([cells for _, cells in Packer(d).shuffled_plan(4, 7, 3)])"
  )
  printed = {
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)
  }
  scope = {}
  exec(code.rsplit("\n", 1)[0], scope)
  assert printed == {f"{[cells for _, cells in Packer(scope['d']).shuffled_plan(4, 7, 3)]}\n"}


@pytest.mark.parametrize(
  ("groups", "cached"),
  [(2, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (1, True), (2, False)))],
)
def test_losses_gradients_and_products_are_those_of_a_row_each(x64, groups, cached):
  t = tiny.make_tiny(dtype=jnp.float64)
  dataset = tiny.make_dataset(t.config.vocab_size)
  packer = Packer(dataset, groups=groups)
  cells = [[[0, 3], [1]], [[2], [4, 5]]] if groups == 2 else [[[0, 3], [1], [2], [4, 5]]]
  length = int(max(len(tokens) for tokens in dataset.tokens)) * 2
  rows, batch = packer.batch(cells, PackedShape(length, 5, 4 if groups == 2 else 7, 16, 40))
  alone = tiny.make_batch(t.config)
  batch, alone = (jax.tree.map(jnp.asarray, b) for b in (batch, alone))
  if cached:
    hidden = decoder.run_below(t.config, t.subtree, t.frozen, batch.tokens, batch.offsets)
    batch = batch._replace(hidden=hidden)
  there = np.flatnonzero(rows >= 0)
  v = tiny.direction(t.sub)

  @jax.jit
  def derivatives(sub, frozen, batch, v):
    args = t.objective, sub, frozen, batch
    products = [product(*args, v) for product in gradients.CURVATURE_PRODUCTS.values()]
    return gradients.per_example_losses(*args), products, tiny.jvp_scores(*args, v)

  (losses, found, scores), (expected, wanted, wanted_scores) = (
    derivatives(t.sub, t.frozen, each, v) for each in (batch, alone)
  )
  np.testing.assert_allclose(losses[there], expected[rows[there]], rtol=1e-10)
  assert not np.any(np.delete(np.asarray(losses), there))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), found, wanted)
  np.testing.assert_allclose(scores[there], wanted_scores[rows[there]], rtol=1e-9, atol=1e-12)


def test_packed_rows_go_to_the_devices_that_own_their_examples():
  dataset = make_dataset([(5, 2), (6, 3), (4, 1), (7, 3)])
  mesh = sharding.make_mesh("data:2", jax.devices()[:2])
  for rows, batch in Packer(dataset, groups=2).sequential(1000):
    placed = sharding.place_batch(batch, mesh)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(placed)} == {2}
    check_batch(rows, jax.tree.map(np.asarray, placed), dataset, 2)


def test_mistakes_are_refused():
  bad = types.SimpleNamespace(tokens=(np.zeros(3, np.int32),), response_mask=(np.ones(3, bool),), ids=("z",))
  with pytest.raises(UserError, match="'z' has a response token at t = 0"):
    list(Packer(bad).sequential(16))
  with pytest.raises(UserError, match="batch_tokens=0"):
    Packer(bad).sequential_plan(0)
  with pytest.raises(UserError, match="batch_size=0"):
    Packer(bad).shuffled_plan(0, 0, 0)
  t = tiny.make_tiny()
  _, batch = next(Packer(tiny.make_dataset(t.config.vocab_size)).sequential(64))
  with pytest.raises(ValueError, match="several examples cannot be mapped"):
    gradients.per_example_gradients(t.objective, t.sub, t.frozen, batch)
