"""The chosen parameters: the --layers language, split and merge, errors that list what exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.errors import UserError
from in2core_jax.model import decoder
from in2core_jax.params import subtree

PARAMS = jax.tree.map(np.asarray, tiny.make_params(tiny.make_config(tie_embeddings=False), lora=2))


@pytest.mark.parametrize(
  ("text", "num_layers", "wanted"),
  [
    ("all", 3, (0, 1, 2)),
    ("last:2", 30, (28, 29)),
    ("first:4", 30, (0, 1, 2, 3)),
    ("middle:2", 6, (2, 3)),
    ("middle:6", 30, (12, 13, 14, 15, 16, 17)),
    ("middle:2", 5, (1, 2)),
    ("every:3", 7, (0, 3, 6)),
    ("0,5,29", 30, (0, 5, 29)),
    (" 5 , 0 ,-1, 29", 30, (0, 5, 29)),
    ("last:3", 3, (0, 1, 2)),
  ],
)
def test_the_layer_language(text, num_layers, wanted):
  assert subtree.parse_layers(text, num_layers) == wanted


@pytest.mark.parametrize(
  "text", ["", "last", "last:", "last:0", "first:6", "every:9", "5", "0,-6", "1;2", "top:2", "1.5"]
)
def test_a_layer_that_is_not_there_is_refused_with_what_exists(text):
  with pytest.raises(UserError, match=r"layers 0\.\.4; use all, last:K") as caught:
    subtree.parse_layers(text, 5)
  assert f"--layers={text}" in str(caught.value)


@pytest.mark.parametrize("layers", [(5,), (0, -6), ()])
def test_indices_are_checked_like_text(layers):
  with pytest.raises(UserError, match=r"layers 0\.\.4"):
    subtree.make_subtree(PARAMS, layers)


def test_indices_may_count_from_the_top_and_repeat():
  assert subtree.make_subtree(PARAMS, (-1, 0, 4)).layers == (0, 4)


@pytest.mark.parametrize(
  ("modules", "wanted"),
  [
    ("attention/q_proj/kernel", ["attention/q_proj/kernel"]),
    ("mlp/up_proj", ["mlp/up_proj/kernel", "mlp/up_proj/lora_a", "mlp/up_proj/lora_b"]),
    ("norms", ["attention_norm/scale", "mlp_norm/scale"]),
    (
      "mlp,norms",
      [f"mlp/{m}_proj/kernel" for m in ("down", "gate", "up")] + ["attention_norm/scale", "mlp_norm/scale"],
    ),
    ("attention", [f"attention/{m}_proj/kernel" for m in "qkvo"]),
  ],
)
def test_modules_name_leaves(modules, wanted):
  assert subtree.make_subtree(PARAMS, "last:1", modules).paths == tuple(sorted(wanted))


def test_norms_of_queries_and_keys_belong_to_attention_and_to_the_norms():
  params = tiny.make_params(tiny.make_config(**tiny.GEMMA3))
  head = ["attention/k_norm/scale", "attention/q_norm/scale"]
  around = [f"{where}_norm/scale" for where in ("attention", "attention_post", "mlp", "mlp_post")]
  paths = lambda modules: list(subtree.make_subtree(params, "all", modules).paths)  # noqa: E731
  assert paths("norms") == sorted(head + around)
  assert paths("attention") == sorted([*head, *(f"attention/{m}_proj/kernel" for m in "qkvo")])
  assert paths("all") == list(subtree.leaf_paths(params))
  assert not any("norm" in path for path in paths("matrices"))


def test_all_takes_every_weight_and_lora_every_factor():
  paths = subtree.leaf_paths(PARAMS)
  factors = {path for path in paths if "lora_" in path}
  assert len(factors) == 14
  assert set(subtree.make_subtree(PARAMS, "all", "lora").paths) == factors
  assert set(subtree.make_subtree(PARAMS, "all", "all").paths) == set(paths) - factors


def test_lora_factors_that_are_not_there_come_with_a_checkpoint():
  bare = jax.eval_shape(lambda key: decoder.init_params(tiny.make_config(), key), jax.random.key(0))
  with pytest.raises(UserError, match="has no 'lora'. Its factors come with the checkpoint of a LoRA training"):
    subtree.make_subtree(bare, "all", "lora")


@pytest.mark.parametrize("word", ["atention", "sketch", "attention/q_proj/bias", ""])
def test_a_module_that_is_not_there_is_refused_with_what_exists(word):
  with pytest.raises(UserError, match="this model has no") as caught:
    subtree.make_subtree(PARAMS, "all", word)
  message = str(caught.value)
  assert "lora" in message
  assert "attention/q_proj/kernel" in message
  assert "sketch," not in message.split("It has")[1]
  if word == "atention":
    assert "Did you mean attention?" in message


def test_a_tied_model_has_no_head_to_choose():
  tied = tiny.make_params(tiny.make_config())
  with pytest.raises(UserError, match="no 'lm_head'"):
    subtree.make_subtree(tied, "all", "lm_head")


@pytest.mark.parametrize(
  ("layers", "modules", "boundary", "segments"),
  [
    ("0,3,4", "all", 0, ((0, 1, True), (1, 3, False), (3, 5, True))),
    ("last:2", "mlp", 3, ((3, 5, True),)),
    ("1,3", "mlp", 1, ((1, 2, True), (2, 3, False), (3, 4, True), (4, 5, False))),
    ("last:1", "mlp,embed", 0, ((0, 4, False), (4, 5, True))),
    ("last:1", "final_norm", 5, ()),
    ("all", "lm_head,mlp", 0, ((0, 5, True),)),
  ],
)
def test_boundary_and_segments(layers, modules, boundary, segments):
  chosen = subtree.make_subtree(PARAMS, layers, modules)
  assert chosen.boundary == boundary
  assert chosen.segments() == segments


@settings(max_examples=25, deadline=None)
@given(
  layers=st.sets(st.integers(0, 4), min_size=1),
  modules=st.sets(
    st.sampled_from(["attention", "mlp", "norms", "lora", "mlp/up_proj", "embed", "final_norm", "lm_head"]), min_size=1
  ),
  dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_merge_gives_back_what_was_split_bit_for_bit(layers, modules, dtype):
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), PARAMS)
  chosen = subtree.make_subtree(params, tuple(layers), ",".join(sorted(modules)))
  sub, frozen = subtree.split(params, chosen)
  tiny.assert_trees_equal(subtree.merge(sub, frozen, chosen), params)
  assert subtree.count(sub) + subtree.count(frozen) == subtree.count(params)  # nothing is stored twice
  per_layer = sum(int(np.prod(_leaf(params, path).shape[1:])) for path in chosen.paths)
  extras = sum(subtree.count(params[name]) for name in chosen.extras)
  assert subtree.count(sub) == per_layer * len(chosen.layers) + extras


def _leaf(params, path):
  leaf = params["layers"]
  for part in path.split("/"):
    leaf = leaf[part]
  return leaf


def test_split_takes_the_chosen_rows():
  chosen = subtree.make_subtree(PARAMS, "0,3,4", "mlp/up_proj/kernel,final_norm")
  sub, frozen = subtree.split(PARAMS, chosen)
  kernel = PARAMS["layers"]["mlp"]["up_proj"]["kernel"]
  assert jax.tree.map(np.shape, sub) == {
    "layers": {"mlp": {"up_proj": {"kernel": (3, *kernel.shape[1:])}}},
    "final_norm": {"scale": (12,)},
  }
  np.testing.assert_array_equal(sub["layers"]["mlp"]["up_proj"]["kernel"], kernel[[0, 3, 4]])
  np.testing.assert_array_equal(frozen["layers"]["mlp"]["up_proj"]["kernel"], kernel[[1, 2]])
  assert "final_norm" not in frozen


@pytest.mark.parametrize(("layers", "modules"), [("0,3,4", "mlp,lora"), ("1,3", "attention"), ("2,3", "all,embed")])
def test_segments_hold_each_layer_in_its_place(layers, modules):
  chosen = subtree.make_subtree(PARAMS, layers, modules)
  sub, frozen = subtree.split(PARAMS, chosen)
  for start, stop, _ in chosen.segments():
    found = subtree.segment_params(sub, frozen, chosen, start, stop)
    tiny.assert_trees_equal(found, jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], PARAMS["layers"]))
  below = jax.tree.map(lambda leaf: leaf[: chosen.boundary], PARAMS["layers"])
  if chosen.boundary:
    tiny.assert_trees_equal(subtree.below_params(frozen, chosen), below)


@pytest.mark.parametrize(("layers", "modules"), [("all", "all,embed,lm_head"), ("0", "norms,lora"), ("1,2", "mlp")])
def test_the_size_is_that_of_what_split_gives(layers, modules):
  tree = subtree.make_subtree(PARAMS, layers, modules)
  assert subtree.size_of(PARAMS, tree) == subtree.count(subtree.split(PARAMS, tree)[0]) > 0


def test_a_subtree_is_a_static_argument():
  first, second = (subtree.make_subtree(PARAMS, "last:2", "mlp,embed,embed") for _ in range(2))
  assert first == second
  assert hash(first) == hash(second)
  assert first.extras == ("embed",)


def test_layer_sums_name_each_layer_and_extra_once():
  t = tiny.make_tiny("0,1", "mlp,norms,final_norm", config=tiny.make_config(num_layers=2))
  v = tiny.direction(t.sub, queries=2)
  leaves = jax.jit(gradients.leaf_scores, static_argnums=0)(t.objective, t.sub, t.frozen, t.batch, v)
  named = subtree.layer_sums(leaves, t.subtree)
  assert list(named) == ["layer 0", "layer 1", "final_norm"]
  # Each layer alone, as a subtree of its own, with the same directions.
  lone = subtree.make_subtree(t.params, "1", "mlp,norms")
  sub, frozen = subtree.split(t.params, lone)
  alone = {"layers": jax.tree.map(lambda leaf: leaf[:, 1:], v["layers"])}
  objective = tiny.make_objective(t.config, lone)
  wanted = jax.jit(gradients.vmap_scores, static_argnums=0)(objective, sub, frozen, t.batch, alone)
  assert wanted.shape == (2, tiny.SIZE)
  np.testing.assert_allclose(named["layer 1"], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
