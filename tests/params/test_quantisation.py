"""Matrices in few bits: their numbers, and everything computed with them against plain arrays of the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.model import decoder, stacks
from in2core_jax.params import adapters, quantisation, subtree

KINDS = quantisation.KINDS
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 3, "head_dim": 4, "num_heads": 4, "num_kv_heads": 4}
EXPERTS = {"num_experts": 4, "experts_per_token": 2}


def as_arrays(tree):
  return quantisation.tree_map(quantisation.full, tree)


def rounded(kind, dtype=jnp.float64, **changes):
  """(config, parameters in few bits, plain ones of the same numbers)."""
  config = tiny.make_config(**(SIZES | changes))
  few = quantisation.quantise_tree(tiny.make_params(config, dtype), kind)
  return config, few, as_arrays(few)


@pytest.mark.parametrize(("kind", "inputs"), [("int8", 12), ("nf4", 48), ("nf4", 192)])
def test_numbers_are_the_nearest_that_the_scale_allows(kind, inputs):
  matrix = np.random.default_rng(0).standard_normal((2, inputs, 5)).astype(np.float32)
  matrix[0, :, 1] = 0
  kept = quantisation.quantise(matrix, kind)
  assert kept.shape == matrix.shape and kept.dtype == np.float32
  table = np.arange(-127, 128) / 127 if kind == "int8" else np.array(quantisation.NF4)
  block = {12: 12, 48: 16, 192: 64}[inputs]
  wanted = np.zeros_like(matrix)
  for layer, row, column in np.ndindex(matrix.shape):
    start = row // block * block
    scale = np.abs(matrix[layer, start : start + block, column]).max()
    wanted[layer, row, column] = scale * table[np.argmin(np.abs(table * scale - matrix[layer, row, column]))]
  np.testing.assert_allclose(np.asarray(quantisation.full(kept)), wanted, rtol=1e-6, atol=1e-7)
  again = quantisation.quantise(np.asarray(kept), kind)
  np.testing.assert_array_equal(again.codes, kept.codes)  # what was rounded stays so
  np.testing.assert_allclose(again.scale, kept.scale, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 48, 10), (2, 3, 32, 7)])
def test_tensors_are_rounded_block_by_block_as_at_once(kind, shape, monkeypatch):
  monkeypatch.setattr(stacks, "BLOCK_NUMBERS", 100)
  stored = np.random.default_rng(1).standard_normal((*shape[:-2], shape[-1], shape[-2])).astype(np.float32)
  stack = stacks.stack_of(shape, np.dtype(np.float32), None, kind)
  assert all(stack.put((i,), stored[i], True) for i in range(shape[0]))
  tiny.assert_trees_equal(stack.array, quantisation.quantise(stored.swapaxes(-1, -2), kind))
  assert not stack.put((0,), np.full_like(stored[0], np.nan), True)


def computed(config, params, modules, every=True):
  """Losses, jvp scores and gradients of layer 1; also curvature products and gradients of single examples."""
  chosen = subtree.make_subtree(params, "1", modules)
  objective = tiny.make_objective(config, chosen)
  sub, frozen = subtree.split(params, chosen)
  batch, v = tiny.make_batch(config), tiny.direction(sub)

  def run(sub, frozen):
    scores = gradients.losses_and_jvp_scores(objective, sub, frozen, batch, v)
    more = (
      ()
      if not every
      else (
        gradients.ggn_product(objective, sub, frozen, batch, v),
        gradients.hessian_product(objective, sub, frozen, batch, v),
        gradients.per_example_gradients(objective, sub, frozen, batch, 4),
      )
    )
    return scores, gradients.sum_gradient(objective, sub, frozen, batch), more

  return jax.jit(run)(sub, frozen)


@pytest.mark.parametrize(
  ("kind", "modules", "changes"),
  [
    ("int8", "all", {}),
    ("nf4", "attention", {}),
    ("nf4", "attention", EXPERTS),
    ("int8", "mlp", EXPERTS),
  ],
)
@pytest.mark.slow
def test_every_derivative_is_that_of_the_dequantised_weights(kind, modules, changes, x64):
  config, few, plain = rounded(kind, **changes)
  kept = [leaf for leaf in jax.tree.leaves(few, is_leaf=quantisation.is_leaf) if quantisation.is_leaf(leaf)]
  assert len(kept) == 7
  tiny.assert_trees_close(computed(config, few, modules), computed(config, plain, modules), 1e-10)


def test_scores_and_gradients_are_those_of_the_dequantised_weights(x64):
  config, few, plain = rounded("nf4")
  found, wanted = (computed(config, params, "attention", every=False) for params in (few, plain))
  tiny.assert_trees_close(found, wanted, 1e-10)


@pytest.mark.slow
def test_experts_of_tokens_alone_are_computed_of_few_bits_too(x64, monkeypatch):
  monkeypatch.setattr(decoder.experts, "_LEAST", 1)
  config, few, plain = rounded("nf4", num_experts=16, experts_per_token=1)
  assert decoder.experts.blocks(tiny.SIZE, tiny.NUM_TOKENS, 1, 16) is not None
  tiny.assert_trees_close(computed(config, few, "attention"), computed(config, plain, "attention"), 1e-10)


@pytest.mark.parametrize("layers", [pytest.param("1", marks=pytest.mark.slow), "0,2"])
def test_trained_layers_stay_full_among_those_in_few_bits(layers):
  config, few, plain = rounded("nf4", jnp.float32)
  chosen = subtree.make_subtree(few, layers, "mlp")
  sub, frozen = subtree.split(few, chosen)
  trained = jax.tree.map(lambda leaf: leaf + 0.1, sub)
  merged = subtree.merge(trained, frozen, chosen)
  wanted = subtree.merge(trained, subtree.split(plain, chosen)[1], chosen)
  tiny.assert_trees_close(as_arrays(merged), wanted, 1e-6)
  tokens = tiny.make_batch(config).tokens
  tiny.assert_trees_close(decoder.logits(config, merged, tokens), decoder.logits(config, wanted, tokens), 1e-5)
  again = subtree.split(merged, subtree.make_subtree(merged, "1,2", "mlp/up_proj/kernel"))
  for found, want in zip(
    again, subtree.split(wanted, subtree.make_subtree(wanted, "1,2", "mlp/up_proj/kernel")), strict=True
  ):
    tiny.assert_trees_close(as_arrays(found), want, 1e-6)
  below = subtree.below_params(merged, subtree.make_subtree(merged, "2", "mlp"))
  tiny.assert_trees_close(as_arrays(below), jax.tree.map(lambda leaf: leaf[:2], wanted["layers"]), 1e-6)


@pytest.mark.slow
def test_the_backward_pass_keeps_no_dequantised_weights():
  config = tiny.make_config(**(SIZES | {"hidden_size": 64, "intermediate_size": 256, "num_layers": 24}))
  plain = adapters.add_lora(tiny.make_params(config), 1, jax.random.key(0))
  chosen = subtree.make_subtree(plain, "all", "lora")
  objective, batch = tiny.make_objective(config, chosen), tiny.make_batch(config)
  step = jax.jit(functools.partial(gradients.sum_gradient, objective))
  few = quantisation.quantise_tree(plain, "nf4")
  taken = [step.lower(*subtree.split(params, chosen), batch).compile().memory_analysis() for params in (plain, few)]
  arguments = [one.argument_size_in_bytes for one in taken]
  weights = sum(leaf.nbytes for path, leaf in jax.tree_util.tree_leaves_with_path(plain["layers"]))
  assert arguments[1] < 0.35 * arguments[0]
  assert taken[1].temp_size_in_bytes < taken[0].temp_size_in_bytes + 0.15 * weights
