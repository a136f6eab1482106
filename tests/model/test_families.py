"""Every family of `families.py` against PyTorch's implementation, and out again: config.json and tensors.

third_party/make_reference.py made the values, on one random model of each with every option that the family has.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.errors import UserError
from in2core_jax.model import config as model_config
from in2core_jax.model import decoder, hf_config, rotary, weights
from in2core_jax.model.families import FAMILIES
from in2core_jax.model.objective import head_ggn, token_nll
from in2core_jax.params import subtree

REFERENCE = pathlib.Path(__file__).resolve().parents[2] / "third_party" / "reference"
MODELS = json.loads((REFERENCE / "families.json").read_text(encoding="utf-8"))
PICKED = 12  # as in make_reference.py


def tensors_of(name: str) -> dict[str, np.ndarray]:
  """The weights, as tiny_weights in make_reference.py draws them."""
  rng, tensors = np.random.default_rng(MODELS[name]["seed"]), {}
  for key in sorted(MODELS[name]["shapes"]):
    draw = rng.standard_normal(MODELS[name]["shapes"][key])
    tensors[key] = (1 + 0.1 * draw if "norm" in key else 0.2 * draw).astype(np.float32)
  return tensors


def write(folder: pathlib.Path, name: str, tensors=None, **changes) -> pathlib.Path:
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(MODELS[name]["config"] | changes))
  safetensors.numpy.save_file(tensors or tensors_of(name), folder / "model.safetensors")
  return folder


def pick(gradient: np.ndarray) -> np.ndarray:
  flat = gradient.astype(np.float64).ravel()
  return np.append(flat[:: -(-flat.size // PICKED)], np.linalg.norm(flat))


def expected(name: str) -> dict[str, np.ndarray]:
  with np.load(REFERENCE / "families.npz") as stored:
    return {key: stored[f"{name}/{key}"] for key in ("logits", "gradients")}


def stored_gradients(folder: pathlib.Path, config, gradient) -> np.ndarray:
  """Entries of the gradient under the names of the source, as its weights are stored: names and layouts are linear."""
  weights.save_hf_dir(folder, config, jax.tree.map(np.asarray, gradient))
  found = safetensors.numpy.load_file(folder / "model.safetensors")
  return np.concatenate([pick(found[key]) for key in sorted(found)])


def losses_and_logits(config, params, tokens):
  """(mean loss, (loss of each text [B], logits [B,T,V]))."""
  h = decoder.run_layers(config, params["layers"], decoder.embed(config, params, tokens))
  logits = decoder._logits(decoder.head_input(config, params, h), decoder.head_matrix(params), config.logit_cap)
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
  return -jnp.mean(picked), (-jnp.mean(picked, axis=1), logits)


# What these have beyond the models of one router alone, others have too.
SLOW = ("qwen3 moe", "granite moe shared", "olmoe", "olmoe softmax", "flex olmo", "granite moe")
SLOW += ("minimax m2", "solar open", "solar open free")
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("name", EVERY)
def test_family_matches_pytorch(name, tmp_path, x64):
  entry = MODELS[name]
  config, params = weights.load_hf_dir(write(tmp_path / "in", name))
  assert config.model_type == entry["config"]["model_type"]
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
  measure = jax.jit(jax.value_and_grad(losses_and_logits, 1, has_aux=True), static_argnums=0)
  (_, (losses, logits)), gradient = measure(config, params, jnp.asarray(entry["token_ids"]))
  wanted = expected(name)
  np.testing.assert_allclose(losses, entry["losses"], rtol=1e-6)
  np.testing.assert_allclose(logits[:, -wanted["logits"].shape[1] :], wanted["logits"], rtol=0, atol=1e-4)
  ours = stored_gradients(tmp_path / "gradient", config, gradient)
  np.testing.assert_allclose(ours, wanted["gradients"], rtol=2e-4, atol=2e-6 * np.abs(wanted["gradients"]).max())


@pytest.mark.parametrize("name", EVERY)
def test_export_is_what_was_read(name, tmp_path):
  """Tensors bit for bit under the same names, and a config.json that transformers reads as the source (`exported`)."""
  config, params = weights.load_hf_dir(write(tmp_path / "in", name))
  weights.save_hf_dir(tmp_path / "out", config, params)
  written, source = (safetensors.numpy.load_file(tmp_path / there / "model.safetensors") for there in ("out", "in"))
  assert written.keys() == source.keys()
  for key, tensor in source.items():
    np.testing.assert_array_equal(written[key], tensor, err_msg=key)
  values = json.loads((tmp_path / "out" / "config.json").read_text())
  assert values == MODELS[name]["exported"], "the exporter writes other folders: make the reference again"
  again, loaded = weights.load_hf_dir(tmp_path / "out")
  assert (again, again.model_type) == (config, config.model_type)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_every_family_has_a_model_and_every_option_is_on():
  """No row of the table without its reference, no key of a row that its model leaves as it is absent."""
  old = {"mistral", "gemma3_text"}  # in tiny.json
  assert {entry["config"]["model_type"] for entry in MODELS.values()} == FAMILIES.keys() - old
  for kind in FAMILIES.keys() - old:
    given = [entry["config"] for entry in MODELS.values() if entry["config"]["model_type"] == kind]
    for key in FAMILIES[kind].options:
      assert any(config.get(key, FAMILIES[kind].defaults.get(key, False)) is not False for config in given), (kind, key)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_truncated_model_can_be_exported(kind):
  """Layers that differ are counted from the bottom; what is left may be all alike, and is still the same family."""
  values = {"model_type": kind, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 8}
  values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True}
  values |= {"sliding_window": 4, "max_window_layers": 3} if FAMILIES[kind].window != "none" else {}
  values.pop("use_sliding_window") if FAMILIES[kind].window not in ("late", "unrotated") else None
  values |= {"rope_scaling": YARN} if FAMILIES[kind].rope_kinds == ("yarn",) else {}
  whole = hf_config.parse_config(values, "config")
  for count in range(1, 9):
    config = dataclasses.replace(whole, num_layers=count)
    written = hf_config.write_config(config, "float32")
    again = hf_config.parse_config(written, "again")
    assert written["model_type"] == kind
    assert hf_config._shortest_period(again) == hf_config._shortest_period(config)
    for mine, theirs in ((config.local, whole.local), (config.unrotated, whole.unrotated)):
      assert mine is None or mine == theirs[:count]


def multimodal(folder, spelling, **changes):
  """A folder as Gemma 3's with pictures: the text part under another name, beside other parts."""
  inner = {"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
  inner |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 61, "sliding_window": 7}
  inner |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "query_pre_attn_scalar": 24}
  config = hf_config.parse_config(inner, "text")
  params = jax.tree.map(np.asarray, tiny.make_params(config))
  weights.save_hf_dir(folder, config, params)
  text = safetensors.numpy.load_file(folder / "model.safetensors")
  tensors = {spelling + name.removeprefix("model."): value for name, value in text.items()}
  vision = spelling.replace("language_model.model.", "").replace("language_model.", "") + "vision_tower.patch.weight"
  tensors |= {vision: np.ones((2, 2), np.float32), vision.replace("vision_tower", "multi_modal_projector"): np.ones(3)}
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
  (folder / "config.json").write_text(json.dumps(outer | {"text_config": inner, "vision_config": {}} | changes))
  return config, params


@pytest.mark.parametrize("spelling", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_folder_is_read(tmp_path, spelling):
  config, params = multimodal(tmp_path, spelling)
  read, loaded = weights.load_hf_dir(tmp_path)
  assert read == config and read.model_type == "gemma3_text"
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  weights.save_hf_dir(tmp_path / "out", read, loaded)
  values = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (values["model_type"], values["eos_token_id"]) == ("gemma3_text", [1, 106])


def test_multimodal_folders_that_do_not_map_are_refused(tmp_path):
  multimodal(tmp_path, "model.language_model.", text_config=3)
  with pytest.raises(UserError, match="text_config is 3; it must be an object"):
    weights.load_hf_dir(tmp_path)
  multimodal(tmp_path, "model.language_model.", model_type="qwen2_5_vl")
  with pytest.raises(UserError, match="'qwen2_5_vl' is not supported.*multimodal model: save its text part"):
    weights.load_hf_dir(tmp_path)


REFUSED = [
  ("llama dynamic", {"max_position_embeddings": None}, "dynamic needs max_position_embeddings"),
  ("llama biases yarn", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
  (
    "qwen2 sliding yarn",
    {"sliding_window": None, "layer_types": ["sliding_attention"] * 3},
    "no sliding_window in use",
  ),
  ("phi4 mini", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported; known: default, long"),
  ("phi4 mini", {"partial_rotary_factor": 0.5}, "short_factor has 3 numbers; 2 pairs of a head are rotated"),
  ("phi4 mini", {"partial_rotary_factor": 0.4}, "rotates 3 of 8 entries"),
  ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers of 3"),
  ("granite", {"logits_scaling": 0}, "logits_scaling is 0; it must be a number"),
  ("granite", {"num_local_experts": 8}, "num_local_experts 8 is not supported"),
  ("olmo3", {"rope_parameters": {"rope_theta": 5.0}}, "must have sliding_attention, unscaled"),
  ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
  ("gemma2", {"final_logit_softcapping": "thirty"}, "final_logit_softcapping is 'thirty'"),
  ("qwen3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers .* is not supported"),
  ("ministral", {"use_bias": True}, "use_bias True is not supported"),
  ("arcee", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported; .* 'relu2' only"),
  (
    "qwen3 moe",
    {"model_type": "qwen3_vl_moe"},
    "mixture of experts .* lacks an option, .* closest that works is qwen3_moe",
  ),
  ("solar open", {"model_type": "glm4_moe"}, "first layers have no experts, .* closest that works is solar_open"),
  ("solar open", {"first_k_dense_replace": 1}, "first_k_dense_replace 1 is not supported"),
  ("solar open", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; .* 'sigmoid' only"),
  ("solar open", {"n_group": 4}, "6 experts cannot be in 4 groups of which a token takes 2"),
  ("solar open", {"topk_group": 1}, "1 of 3 groups have fewer than the 3 experts of a token"),
  ("minimax m2", {"rotary_dim": 4}, "rotary_dim and partial_rotary_factor say different things"),
  ("mixtral", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported"),
  ("qwen3 moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] is not supported"),
  ("qwen3 moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
  ("qwen3 moe", {"num_experts_per_tok": 7}, "cannot go through 7 of 6 experts"),
  ("qwen3 moe", {"num_local_experts": 3}, "num_experts and num_local_experts say different things"),
  ("mixtral", {"num_local_experts": 0}, "mixtral without experts is not supported"),
  ("gpt oss", {"rope_scaling": None}, "'default' is not supported; known: yarn"),
  (
    "gpt oss",
    {"quantization_config": {"quant_method": "nvfp4"}},
    "quantization_config .*nvfp4.* a quantised checkpoint",
  ),
  ("llama dynamic", {"swiglu_limit": 7.0}, "swiglu_limit 7.0 is not supported"),
  (
    "olmo2",
    {"model_type": "olmo_hybrid"},
    "'olmo_hybrid' is not supported; known: llama.*; the closest that works is olmo",
  ),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_configurations_that_do_not_map_are_refused(name, changes, message):
  with pytest.raises(UserError, match=message):
    hf_config.parse_config(MODELS[name]["config"] | changes, "config.json")


def test_the_keys_of_released_minimax_m2_folders_are_read():
  released = MODELS["minimax m2"]["config"] | {"rotary_dim": 8, "use_qk_norm": True, "scoring_func": "sigmoid"}
  released |= {"use_routing_bias": True, "qk_norm_type": "per_layer", "shared_intermediate_size": 0, "use_mtp": True}
  del released["partial_rotary_factor"]
  read = hf_config.parse_config(released, "config.json")
  assert read == hf_config.parse_config(MODELS["minimax m2"]["config"], "config.json") and read.rotary_dim == 8


def test_fused_matrices_of_other_sizes_are_refused(tmp_path):
  tensors = tensors_of("phi3")
  tensors["model.layers.1.self_attn.qkv_proj.weight"] = np.ones((60, 32), np.float32)
  with pytest.raises(UserError, match=r"layers\.1\.self_attn\.qkv_proj\.weight is \(60, 32\), .* asks for \(64, 32\)"):
    weights.load_hf_dir(write(tmp_path, "phi3", tensors))


def test_what_lies_in_a_missing_tensor_is_named_by_it(tmp_path):
  tensors = {name: value for name, value in tensors_of("phi3").items() if "1.mlp.gate_up_proj" not in name}
  with pytest.raises(UserError, match=r"tensors are missing: model\.layers\.1\.mlp\.gate_up_proj\.weight; the file is"):
    weights.load_hf_dir(write(tmp_path, "phi3", tensors))


def test_a_new_option_changes_no_identity():
  """Stored results of models without it are found again: repr and `stated` know nothing of what is at its default."""
  sizes = {"vocab_size": 5, "hidden_size": 4, "intermediate_size": 3, "num_layers": 2, "num_heads": 2}
  plain = model_config.ModelConfig(**sizes, num_kv_heads=1, head_dim=2)
  assert len(plain.stated()) == 22 and "model_type" not in plain.stated()
  assert repr(plain).endswith("global_every=None, local_rope_theta=10000.0)")
  capped = dataclasses.replace(plain, logit_cap=3.0, model_type="gemma2")
  assert capped.stated() == plain.stated() | {"logit_cap": 3.0}
  assert repr(capped).endswith("local_rope_theta=10000.0, logit_cap=3.0)")
  assert dataclasses.replace(plain, model_type="mistral") == plain


# --- What the options mean for derivatives and for rows with several examples.

OPTIONS = {
  "sliding_window": 3,
  "local": (True, False, True),
  "local_rope_theta": 50.0,
  "unrotated": (False, True, False),
  "rotary_dim": 2,
  "pre_norms": False,
  "post_norms": True,
  "query_key_norms": True,
  "wide_query_key_norms": True,
  "attention_bias": True,
  "output_bias": True,
  "mlp_bias": True,
  "gated_mlp": False,
  "activation": "relu2",
  "embedding_multiplier": 3.0,
  "residual_multiplier": 0.7,
  "attention_multiplier": 0.4,
  "logits_divisor": 0.5,
  "score_cap": 2.0,
  "logit_cap": 1.5,
}


def test_losses_and_products_of_a_model_with_every_option_are_the_dense_ones(x64):
  config = tiny.smaller_config(**OPTIONS)
  t = tiny.make_tiny("1,2", "attention/o_proj,final_norm", jnp.float64, config)
  batch, v = t.batch, tiny.direction(t.sub)
  losses = lambda sub: tiny.plain_losses(config, subtree.merge(sub, t.frozen, t.subtree), batch)  # noqa: E731

  def outputs(sub):  # capped logits of every response slot
    every = decoder.logits(config, subtree.merge(sub, t.frozen, t.subtree), batch.tokens)
    return jnp.take_along_axis(every, batch.position[..., None], 1)

  @jax.jit
  def dense(sub):
    gradient, exact = jax.jvp(jax.grad(lambda s: jnp.sum(losses(s))), (sub,), (v,))
    logits, moved = jax.jvp(outputs, (sub,), (v,))
    p = jax.nn.softmax(logits)
    bent = batch.weight[..., None] * (p * moved - p * jnp.sum(p * moved, -1, keepdims=True))
    return losses(sub), gradient, jax.vjp(outputs, sub)[1](bent)[0], exact

  @jax.jit
  def ours(sub):
    args = t.objective, sub, t.frozen, batch
    products = gradients.ggn_product(*args, v), gradients.hessian_product(*args, v)
    return gradients.per_example_losses(*args), gradients.sum_gradient(*args), *products

  for found, wanted in zip(ours(t.sub), dense(t.sub), strict=True):
    tiny.assert_trees_close(found, wanted, 1e-8)


def test_curvature_under_a_soft_cap_is_the_covariance_of_sampled_gradients(x64):
  """W^T D (diag(p) - p p^T) D W = sum over labels y of p_y s_y s_y^T, s_y the gradient of the capped loss of y."""
  rng = np.random.default_rng(0)
  matrix, z, cap = rng.standard_normal((7, 4)), 2 * rng.standard_normal(4), 1.5
  logits = cap * np.tanh(matrix @ z / cap)
  p, slope = np.exp(logits) / np.exp(logits).sum(), 1 - np.tanh(matrix @ z / cap) ** 2
  dense = matrix.T @ np.diag(slope) @ (np.diag(p) - np.outer(p, p)) @ np.diag(slope) @ matrix
  found = jax.jit(jax.vmap(lambda dz: head_ggn(z[None], dz[None], jnp.asarray(matrix), cap)[0]))(jnp.eye(4))
  np.testing.assert_allclose(found, dense, rtol=1e-12, atol=1e-14)
  score = jax.grad(lambda z, y: token_nll(z[None], jnp.asarray(matrix), y[None], cap)[0])
  scores = np.asarray(jax.jit(jax.vmap(score, (None, 0)))(z, np.arange(7)))
  np.testing.assert_allclose(scores.T @ np.diag(p) @ scores, dense, rtol=1e-12, atol=1e-14)
  np.testing.assert_allclose(p @ scores, 0, atol=1e-15)
  assert np.linalg.eigvalsh(dense)[0] > -1e-15
  assert np.abs(dense - matrix.T @ (np.diag(p) - np.outer(p, p)) @ matrix).max() > 0.1  # the cap matters here


def test_rows_of_several_examples_give_each_what_it_has_alone(x64):
  config = tiny.smaller_config(**OPTIONS)
  params = tiny.make_params(config, jnp.float64)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 12))
  offsets = jnp.asarray([[*range(7), *range(5)]])

  @jax.jit
  def run(part, where=None):
    return decoder.run_layers(config, params["layers"], decoder.embed(config, params, part), where)

  alone = jnp.concatenate([run(tokens[:, :7]), run(tokens[:, 7:])], axis=1)
  np.testing.assert_allclose(run(tokens, offsets), alone, rtol=1e-9, atol=1e-11)


def test_examples_beyond_what_fixed_angles_allow_are_known():
  config = hf_config.parse_config(MODELS["phi4 mini"]["config"], "config")
  assert rotary.longest_example(config) == 64
  config = hf_config.parse_config(MODELS["llama dynamic"]["config"], "config")
  assert rotary.longest_example(config) == 128
  with pytest.raises(UserError, match="of 129 tokens, .* only up to 128 tokens .*dynamic.*: --max_length=128"):
    rotary.check_length(config, 129, "the train set")
  rotary.check_length(config, 128, "the train set")
  assert rotary.longest_example(hf_config.parse_config(MODELS["llama biases yarn"]["config"], "config")) is None


def test_the_table_of_families_is_that_of_the_tests():
  import families_table

  text = families_table.DOC.read_text(encoding="utf-8")
  for row in families_table.rows():
    assert f"\n{row}" in text, "run tests/model/families_table.py"
  for part in (families_table.known(), families_table.gguf_kinds(), families_table.checked_adapters()):
    assert part in text


@pytest.mark.parametrize("experts", [False, True])
def test_no_option_widens_half_precision(experts):
  config = tiny.smaller_config(**OPTIONS, rope_scaling=tuple(sorted(YARN.items())))
  if experts:
    own = {"num_experts": 4, "experts_per_token": 2, "router_bias": True, "expert_bias": True, "swiglu_limit": 1.0}
    config = dataclasses.replace(config, **own, attention_sinks=True, qkv_clip=1.0)
  params = jax.eval_shape(lambda: tiny.make_params(config, jnp.bfloat16))
  tokens = jax.ShapeDtypeStruct((1, 5), jnp.int32)
  run = lambda p, t: decoder.run_layers(config, p["layers"], decoder.embed(config, p, t))  # noqa: E731
  h = jax.eval_shape(run, params, tokens)
  head = jax.eval_shape(lambda p, h: decoder.head_input(config, p, h), params, h)
  assert (h.dtype, head.dtype) == (jnp.bfloat16, jnp.bfloat16)
  assert jax.eval_shape(lambda p, t: decoder.logits(config, p, t), params, tokens).dtype == jnp.float32
