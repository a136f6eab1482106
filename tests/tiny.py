"""A tiny decoder, a few examples of awkward shapes and their batch, for every test that needs a model.

The same numbers in any dtype: everything is drawn in float64 by NumPy and then cast.
"""

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from in2core_jax import batches, gradients, hf_config, model, subtree

# (role of each token: P prompt, r response). Odd lengths, one response token only, several turns, a prompt at the end,
# one prompt token before a long response, no response at all.
ROLES = ("PPPrrrr", "PPrrPPPrrrP", "PPPPr", "PPPPPP", "Prrrrrrrr", "PPPPrPr")
NO_RESPONSE = 3
MULTI_TURN = 1
NUM_TOKENS, NUM_RESPONSES = 13, 9
SIZE = 8  # two padding rows


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
  """For a module that imports it: programs of microseconds are not worth an optimising compiler's seconds."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


# What makes the decoder a Gemma 3: of five layers the third is global, the window is shorter than the examples.
GEMMA3 = hf_config.GEMMA3 | {
  "query_scalar": 5.0,
  "global_every": 3,
  "sliding_window": 3,
  "local_rope_theta": 50.0,
  "rope_scaling": (("factor", 4.0), ("rope_type", "linear")),
}


class Tiny(NamedTuple):
  """One model, one subtree, one batch."""

  config: model.ModelConfig
  params: Any
  subtree: subtree.Subtree
  objective: gradients.Objective
  sub: Any
  frozen: Any
  batch: batches.Batch


def make_config(**changes) -> model.ModelConfig:
  """Five layers, four heads that share two key heads, sizes that differ from each other."""
  sizes = {
    "vocab_size": 37,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_layers": 5,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
  }
  return model.ModelConfig(**(sizes | changes))


def smaller_config(**changes) -> model.ModelConfig:
  """Small enough for dense curvature matrices."""
  sizes = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 5, "num_layers": 3, "num_heads": 2}
  return make_config(**(sizes | {"num_kv_heads": 1, "head_dim": 4} | changes))


def make_params(config: model.ModelConfig, dtype=jnp.float32, seed: int = 0, lora: int = 0, sketch: int = 0):
  """Parameters of natural scale: factors of norms around one, biases and both LoRA factors not zero, `core` zero."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))

  def draw(path, leaf):
    name = path[-1].key
    values = rng.standard_normal(leaf.shape)
    if name == "kernel":
      return values / np.sqrt(leaf.shape[-2])
    return {"scale": 1 - config.norm_offset + 0.2 * values, "bias": 0.3 * values, "embedding": 0.7 * values}[name]

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  modules = [*params["layers"]["attention"].values(), *params["layers"]["mlp"].values()]
  for module in (module for module in modules if "kernel" in module):
    layers, inner, outer = module["kernel"].shape
    if lora:
      module["lora_a"] = rng.standard_normal((layers, inner, lora)) / np.sqrt(inner)
      module["lora_b"] = 0.3 * rng.standard_normal((layers, lora, outer))
    if sketch:
      module["left"] = rng.standard_normal((layers, inner, sketch))
      module["core"] = np.zeros((layers, sketch, sketch))
      module["right"] = rng.standard_normal((layers, sketch, outer))
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def make_dataset(vocab_size: int, seed: int = 1):
  """The examples of `ROLES` with random ids, as much of a `TokenizedDataset` as a `Batcher` needs."""
  rng = np.random.default_rng(seed)
  return types.SimpleNamespace(
    ids=tuple(f"example-{i}" for i in range(len(ROLES))),
    tokens=tuple(rng.integers(0, vocab_size, len(roles)).astype(np.int32) for roles in ROLES),
    response_mask=tuple(np.array([role == "r" for role in roles]) for roles in ROLES),
  )


def make_batch(config, rows=None, num_tokens=NUM_TOKENS, num_responses=NUM_RESPONSES, size=SIZE, pad_id=0):
  """The batch of the given examples (all of them when None), padded to `size` rows."""
  shape = batches.Shape(num_tokens, num_responses)
  every = make_dataset(config.vocab_size)
  rows = range(len(ROLES)) if rows is None else rows
  fields = {name: tuple(values[row] for row in rows) for name, values in vars(every).items()}
  batcher = batches.Batcher(types.SimpleNamespace(**fields), (shape,), pad_id=pad_id)
  return batcher.batch(range(len(fields["ids"])), shape, size)


def make_tiny(layers="2,3", modules="all", dtype=jnp.float32, config=None, **extra) -> Tiny:
  """Everything that a test of derivatives needs; extra arguments go to `make_params`."""
  config = config or make_config()
  params = make_params(config, dtype, **extra)
  chosen = subtree.make_subtree(params, layers, modules)
  objective = model.make_objective(config, chosen)
  return Tiny(config, params, chosen, objective, *subtree.split(params, chosen), make_batch(config))


def direction(sub, seed: int = 2, queries: int | None = None, dtype=None):
  """A random direction like `sub`, with a leading query axis when `queries` is given."""
  rng = np.random.default_rng(seed)
  lead = () if queries is None else (queries,)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(lead + leaf.shape), dtype or leaf.dtype), sub)


def plain_losses(config, params, batch):
  """The loss, written again from its definition: all logits, log-softmax, weighted sum over response slots; [B]."""
  every = jax.nn.log_softmax(model.logits(config, params, batch.tokens), axis=-1)
  rows = np.arange(every.shape[0])[:, None]
  return -jnp.sum(every[rows, batch.position, batch.target] * batch.weight, axis=-1)


def assert_trees_close(found, wanted, rtol: float):
  """Every leaf within rtol of the largest entry of its counterpart."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max(initial=0))


def assert_trees_equal(found, wanted):
  """Every leaf equal bit for bit, dtypes included."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
