"""Scores apart by layer and by response token: against a loop of `jax.grad`, and their sums against the scores."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.data.batches import Batcher, Shape
from in2core_jax.errors import UserError
from in2core_jax.influence import decompose
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.model.objective import token_losses_fn
from in2core_jax.params import subtree
from in2core_jax.runs import files

N = len(tiny.ROLES)
COUNTS = [roles.count("r") for roles in tiny.ROLES]
SHAPES = (Shape(13, 9),)
TWO_SHAPES = (Shape(8, 4), Shape(13, 9))  # both are used


def stream_of(config, shapes=SHAPES, batch_tokens=13 * 4, without_slots=False, **options):
  """Batches of the tiny data set, as `CompiledObjective` takes them; the last one has padding rows."""
  batcher = Batcher(tiny.make_dataset(config.vocab_size), shapes, **options)

  def walk():
    for rows, batch in batcher.sequential(batch_tokens):
      yield rows, batch._replace(slots=None) if without_slots else batch

  return walk


def measure(t, stream, direction):
  """(layer scores, token scores) of a tiny model."""
  problem = CompiledObjective(t.objective, t.sub, t.frozen, microbatch=3)
  by_layer = decompose.layer_scores(problem, t.subtree, stream, N, direction, microbatch=3)
  return by_layer, decompose.token_scores(problem, token_losses_fn(t.config, t.subtree), stream, N, direction)


def dots(gradient, direction, tree):
  """Inner products of two trees like `sub`, apart for each part, in NumPy: [parts]."""
  products = jax.tree.map(lambda a, b: np.asarray(a, np.float64) * np.asarray(b, np.float64), gradient, direction)
  inside = [
    sum(leaf[row].sum() for leaf in jax.tree.leaves(products.get("layers", {}))) for row in range(len(tree.layers))
  ]
  return np.array(inside + [sum(leaf.sum() for leaf in jax.tree.leaves(products[name])) for name in tree.extras])


def loop_of_grads(t, direction):
  """The oracle: `jax.grad` of the plain model's loss of one token at a time; a list of [tokens, parts] by example."""
  grad = jax.jit(jax.grad(lambda params, one: tiny.plain_losses(t.config, params, one)[0]))
  table = []
  for row in range(N):
    one = tiny.make_batch(t.config, [row], size=1)
    slots = np.flatnonzero(one.weight[0])
    alone = [one._replace(weight=np.where(np.arange(one.weight.shape[1]) == slot, one.weight, 0)) for slot in slots]
    rows = [dots(subtree.split(grad(t.params, each), t.subtree)[0], direction, t.subtree) for each in alone]
    table.append(np.array(rows).reshape(len(slots), len(decompose.part_names(t.subtree))))
  return table


CASES = {
  "layers and a norm": ("0,1", "mlp/up_proj,norms,final_norm", {"num_layers": 2}),
  "one layer": ("1", "attention/q_proj", {"num_layers": 2}),
  "tied embedding": ("1", "mlp/up_proj,embed", {"num_layers": 2}),
  "untied head": ("1", "norms,lm_head", {"num_layers": 2, "tie_embeddings": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_contributions_are_a_loop_of_grad_over_tokens(case, x64):
  layers, modules, changes = CASES[case]
  t = tiny.make_tiny(layers, modules, jnp.float64, tiny.smaller_config(**changes))
  direction = tiny.direction(t.sub)
  table = loop_of_grads(t, direction)
  by_layer, by_token = measure(t, stream_of(t.config), direction)
  assert list(by_layer) == [f"layer {layer}" for layer in t.subtree.layers] + list(t.subtree.extras)
  wanted = np.concatenate([rows.sum(axis=1) for rows in table])
  assert by_token.influence.dtype == np.float64 and np.median(np.abs(wanted)) > 1e-3
  np.testing.assert_allclose(by_token.influence, wanted, rtol=1e-10, atol=1e-10 * np.abs(wanted).max())
  wanted = np.array([rows.sum(axis=0) for rows in table])  # [N, parts]
  # A single part is the score itself, which `CompiledObjective.scores` keeps in float32.
  tolerance = 1e-6 if len(by_layer) == 1 else 1e-10
  found = np.stack(list(by_layer.values()), axis=1)
  np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
  # None for the example without response, whose parts are exactly zero.
  assert by_token.counts.tolist() == COUNTS and COUNTS[tiny.NO_RESPONSE] == 0
  assert by_token.rows.tolist() == [row for row, count in enumerate(COUNTS) for _ in range(count)]
  assert not np.any(found[tiny.NO_RESPONSE]) and by_token.totals()[tiny.NO_RESPONSE] == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_are_the_scores(reduction):
  config = tiny.smaller_config(attention_bias=True)
  t = tiny.make_tiny("0,2", "attention/q_proj,norms,final_norm", config=config)
  direction, stream = tiny.direction(t.sub), stream_of(config, TWO_SHAPES, reduction=reduction)
  by_layer, by_token = measure(t, stream, direction)
  whole = jax.tree.map(lambda leaf: leaf[None], direction)
  scores = CompiledObjective(t.objective, t.sub, t.frozen).scores(stream, N, whole)[0]
  assert scores.dtype == np.float32 and len(by_layer) == 3
  # Relative to the largest contribution: a sum that cancels has no relative precision of its own.
  size = max(np.abs(part).max() for part in by_layer.values())
  assert np.abs(scores).max() > 0.1 * size
  np.testing.assert_allclose(sum(by_layer.values()), scores, atol=1e-5 * size, rtol=0)
  np.testing.assert_allclose(by_token.totals(), scores, atol=1e-5 * size, rtol=0)


def test_padding_batches_and_slots_change_nothing(x64):
  t = tiny.make_tiny("1,2", "mlp/up_proj,norms", jnp.float64, tiny.smaller_config())
  direction = tiny.direction(t.sub)
  wanted = measure(t, stream_of(t.config), direction)
  same = measure(t, stream_of(t.config, pad_id=5), direction)
  for name, values in wanted[0].items():
    np.testing.assert_array_equal(same[0][name], values)
  np.testing.assert_array_equal(same[1].influence, wanted[1].influence)
  cuts = [
    stream_of(t.config, multiple_of=2),  # the slots of two devices
    stream_of(t.config, [Shape(17, 11)], batch_tokens=17 * 5, without_slots=True),
  ]
  for stream in cuts:
    by_layer, by_token = measure(t, stream, direction)
    np.testing.assert_array_equal(by_token.counts, wanted[1].counts)
    np.testing.assert_allclose(by_token.influence, wanted[1].influence, rtol=1e-11, atol=1e-12)
    for name, values in wanted[0].items():
      np.testing.assert_allclose(by_layer[name], values, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("slots", [True, False])
def test_slots_without_weight_have_exactly_no_share(slots):
  t = tiny.make_tiny("1", "mlp/up_proj", config=tiny.smaller_config(num_layers=2))
  token_losses, along = token_losses_fn(t.config, t.subtree), tiny.direction(t.sub)
  batch = t.batch if slots else t.batch._replace(slots=None)
  values, moved = jax.jit(lambda sub: jax.jvp(lambda s: token_losses(s, t.frozen, batch), (sub,), (along,)))(t.sub)
  for found in (np.asarray(values), np.asarray(moved)):
    assert found.shape == batch.weight.shape
    assert not np.any(found[batch.weight == 0]) and np.all(found[batch.weight > 0] != 0)


def test_empty_data_has_no_contributions():
  t = tiny.make_tiny("0,1", "mlp/up_proj", config=tiny.smaller_config(num_layers=2))
  problem = CompiledObjective(t.objective, t.sub, t.frozen)
  direction = tiny.direction(t.sub)
  assert [v.tolist() for v in decompose.layer_scores(problem, t.subtree, lambda: (), 2, direction).values()] == [
    [0, 0]
  ] * 2
  found = decompose.token_scores(problem, token_losses_fn(t.config, t.subtree), lambda: (), 2, direction)
  assert found.totals().tolist() == [0, 0] and found.influence.size == 0
  dataset = types.SimpleNamespace(ids=("a", "b"), tokens=[np.array([1])] * 2, response_mask=[np.array([False])] * 2)
  columns = decompose.token_columns(dataset, found, str)
  assert [len(values) for values in columns.values()] == [0, 0, 0, 0]


def test_what_is_not_finite_is_refused():
  t = tiny.make_tiny("0,1", "mlp/up_proj", config=tiny.smaller_config(num_layers=2))
  broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), tiny.direction(t.sub))
  problem, stream = CompiledObjective(t.objective, t.sub, t.frozen), stream_of(t.config)
  with pytest.raises(UserError, match="not finite"):
    decompose.layer_scores(problem, t.subtree, stream, N, broken)
  with pytest.raises(UserError, match=r"of 5 examples are not finite \(first rows \[0, 1, 2, 4, 5\]"):
    decompose.token_scores(problem, token_losses_fn(t.config, t.subtree), stream, N, broken)


def test_a_second_call_compiles_nothing(caplog):
  t = tiny.make_tiny("0,1", "mlp/gate_proj", config=tiny.smaller_config(num_layers=2))
  problem, stream = CompiledObjective(t.objective, t.sub, t.frozen), stream_of(t.config)

  def compiled(problem, direction):
    caplog.clear()
    token_losses = token_losses_fn(t.config, t.subtree)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      decompose.layer_scores(problem, t.subtree, stream, N, direction)
      decompose.token_scores(problem, token_losses, stream, N, direction)
    return sum("Compiling" in record.getMessage() for record in caplog.records)

  assert compiled(problem, tiny.direction(t.sub)) > 0
  other = jax.tree.map(lambda leaf: leaf * 1.5, t.sub)
  direction = tiny.direction(t.sub, seed=9)
  assert compiled(problem.at(other), direction) == 0  # other parameters, another direction


# ---- tables --------------------------------------------------------------------------


def test_layer_table(tmp_path):
  scores = {"layer 3": np.array([1.0, 2.0], np.float32), "final_norm": np.array([-0.5, 0.25], np.float32)}
  files.write_parquet(tmp_path / "t.parquet", decompose.layer_columns(["a", "b"], scores))
  table = files.read_parquet(tmp_path / "t.parquet")
  assert list(table) == ["example_id", "layer", "influence"]
  assert table["example_id"].tolist() == ["a", "a", "b", "b"]
  assert table["layer"].tolist() == ["layer 3", "final_norm"] * 2
  assert table["influence"].tolist() == [1.0, -0.5, 2.0, 0.25] and table["influence"].dtype == np.float32


def three_examples():
  """A data set of three examples, the second one without response."""
  return types.SimpleNamespace(
    ids=("a", "b", "c"),
    tokens=[np.array([7, 8, 9, 7], np.int32), np.array([5], np.int32), np.array([1, 2, 8], np.int32)],
    response_mask=[np.array([False, True, False, True]), np.array([False]), np.array([False, False, True])],
  )


def test_token_table(tmp_path):
  scores = decompose.TokenScores(np.array([2, 0, 1]), np.array([0.5, -1.0, 2.0]))
  asked = []

  def piece(token):
    asked.append(token)
    return f"<{token}>"

  files.write_parquet(tmp_path / "t.parquet", decompose.token_columns(three_examples(), scores, piece))
  table = files.read_parquet(tmp_path / "t.parquet")
  assert list(table) == ["example_id", "position", "token", "influence"]
  assert table["example_id"].tolist() == ["a", "a", "c"]
  assert table["position"].tolist() == [1, 3, 2] and table["token"].tolist() == ["<8>", "<7>", "<8>"]
  assert table["influence"].tolist() == [0.5, -1.0, 2.0] and table["influence"].dtype == np.float32
  assert asked == [7, 8]  # each different token once
  np.testing.assert_array_equal(scores.totals(), [-0.5, 0, 2])


def test_token_table_of_other_examples_is_refused():
  for counts in ([1, 1, 1], [2, 0]):
    scores = decompose.TokenScores(np.array(counts), np.zeros(sum(counts)))
    with pytest.raises(UserError, match=rf"of {len(counts)} examples with {sum(counts)} .* of 3 examples with 3"):
      decompose.token_columns(three_examples(), scores, str)
