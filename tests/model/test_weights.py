"""Readers and the writer of weights, on files small enough to be written here; the embedded model is marked real."""

import dataclasses
import hashlib
import json
import os

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from flax import traverse_util

from in2core_jax.data import assets
from in2core_jax.errors import UserError
from in2core_jax.model import decoder, gguf_file, hf_config, weights
from in2core_jax.model.tensors import GGUF_ROTARY

CONFIG = decoder.ModelConfig(
  vocab_size=40,
  hidden_size=32,
  intermediate_size=64,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  rope_theta=1000.0,
  tie_embeddings=False,
)
VARIANTS = {
  "llama": CONFIG,
  "tied": dataclasses.replace(CONFIG, tie_embeddings=True),
  "biases": dataclasses.replace(CONFIG, attention_bias=True),
  "window": dataclasses.replace(CONFIG, sliding_window=5),
  "linear": dataclasses.replace(CONFIG, rope_scaling=(("factor", 2.0), ("rope_type", "linear"))),
  "llama3": dataclasses.replace(
    CONFIG,
    rope_scaling=(
      ("factor", 8.0),
      ("high_freq_factor", 4.0),
      ("low_freq_factor", 1.0),
      ("original_max_position_embeddings", 64),
      ("rope_type", "llama3"),
    ),
  ),
  "gemma3": dataclasses.replace(CONFIG, **tiny.GEMMA3, tie_embeddings=True, rms_eps=1e-6),
}


def make_params(config, dtype=np.float32, seed=0):
  return jax.tree.map(np.asarray, decoder.init_params(config, jax.random.key(seed), dtype))


def assert_same(left, right):
  left, right = (traverse_util.flatten_dict(tree, sep="/") for tree in (left, right))
  assert left.keys() == right.keys()
  for leaf in left:
    assert left[leaf].dtype == right[leaf].dtype, leaf
    np.testing.assert_array_equal(left[leaf], right[leaf], err_msg=leaf)


def shard(folder, cut="layers.1."):
  """Splits model.safetensors into two shards with an index, as large checkpoints come."""
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
  where = {name: files[cut in name] for name in tensors}
  for file in files:
    part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
    safetensors.numpy.save_file(part, folder / file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
  return files


def edit_tensors(folder, change):
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **values):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- Hugging Face folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_folder_round_trip_is_exact(tmp_path, name, dtype):
  params = make_params(VARIANTS[name], weights.DTYPES[dtype])
  weights.save_hf_dir(tmp_path, VARIANTS[name], params)
  config, loaded = weights.load_hf_dir(tmp_path, dtype)
  assert config == VARIANTS[name]
  assert_same(loaded, params)
  assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_folder_files_follow_hugging_face(tmp_path):
  params = make_params(CONFIG)
  weights.save_hf_dir(tmp_path, CONFIG, params)
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert len(tensors) == 3 + 9 * CONFIG.num_layers
  assert tensors["model.layers.2.mlp.down_proj.weight"].shape == (32, 64)  # [out, in]
  np.testing.assert_array_equal(
    tensors["model.layers.1.self_attn.k_proj.weight"], params["layers"]["attention"]["k_proj"]["kernel"][1].T
  )
  assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_sharded_folder_equals_single_file(tmp_path):
  params = make_params(CONFIG)
  weights.save_hf_dir(tmp_path, CONFIG, params)
  files = shard(tmp_path)
  assert_same(weights.load_hf_dir(tmp_path)[1], params)
  (tmp_path / files[1]).unlink()
  with pytest.raises(UserError, match=files[1]):
    weights.load_hf_dir(tmp_path)


def test_index_that_names_the_wrong_shard_is_refused(tmp_path):
  weights.save_hf_dir(tmp_path, CONFIG, make_params(CONFIG))
  files = shard(tmp_path)
  index = tmp_path / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  values["weight_map"]["model.norm.weight"] = files[1]
  index.write_text(json.dumps(values))
  with pytest.raises(UserError, match="model.norm.weight"):
    weights.load_hf_dir(tmp_path)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_stored_dtypes_become_float32(tmp_path, stored):
  params = make_params(CONFIG)
  weights.save_hf_dir(tmp_path, CONFIG, params)
  edit_tensors(tmp_path, lambda t: t.update({name: value.astype(stored) for name, value in t.items()}))
  loaded = weights.load_hf_dir(tmp_path)[1]
  kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
  np.testing.assert_array_equal(loaded["layers"]["mlp"]["up_proj"]["kernel"], kernel.astype(stored).astype(np.float32))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), r"missing: model\.layers\.2\.mlp\.up_proj\.weight"),
    (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}), "q_norm"),
    (lambda t: t["model.layers.1.mlp.gate_proj.weight"].__setitem__((3, 4), np.nan), r"layers\.1\.mlp\.gate.*NaN"),
    (lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}), r"model\.norm\.weight is \(31,\)"),
    (lambda t: t.update({"model.norm.weight": np.ones(32, np.int32)}), r"model\.norm\.weight is stored as I32"),
  ],
)
def test_damaged_weights_are_refused_by_name(tmp_path, change, message):
  weights.save_hf_dir(tmp_path, CONFIG, make_params(CONFIG))
  edit_tensors(tmp_path, change)
  with pytest.raises(UserError, match=message):
    weights.load_hf_dir(tmp_path)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"model_type": "gemma3"}, r"'gemma3' is not supported; known: llama, mistral, qwen2, gemma3_text"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"model_type": "mistral", "architectures": None, "attention_bias": True}, "attention_bias True"),
    ({"model_type": "mistral", "architectures": None, "mlp_bias": True}, "mlp_bias True"),
    ({"attention_bias": True}, r"missing: model\.layers\.0\.self_attn\.k_proj\.bias"),
    ({"mlp_bias": True}, r"missing: model\.layers\.0\.mlp\.down_proj\.bias"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "'ntk' is not supported; known: default, linear, llama3"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn needs original_max_position_embeddings"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs low_freq_factor"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types mixes"),
    ({"num_hidden_layers": None}, "num_hidden_layers must be given"),
    ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
  ],
)
def test_configurations_that_do_not_map_are_refused(tmp_path, values, message):
  weights.save_hf_dir(tmp_path, CONFIG, make_params(CONFIG))
  edit_config(tmp_path, **values)
  with pytest.raises(UserError, match=message):
    weights.load_hf_dir(tmp_path)


GEMMA3 = hf_config.write_config(VARIANTS["gemma3"], "float32")


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "every n-th of 3 layers"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters .* is not supported"),
    (
      {"rope_scaling": None, "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
      "sliding_attention, unscaled",
    ),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "no rope_scaling beside it"),
    ({"sliding_window": None}, "local layers need a sliding_window"),
  ],
)
def test_gemma3_configurations_that_do_not_map_are_refused(values, message):
  with pytest.raises(UserError, match=message):
    hf_config.parse_config(GEMMA3 | values, "config.json")


def test_gemma3_configurations_are_read_in_every_spelling():
  old = {key: GEMMA3[key] for key in GEMMA3 if key not in ("rope_theta", "rope_scaling", "rope_local_base_freq")}
  far = {"rope_type": "linear", "factor": 4.0, "rope_theta": CONFIG.rope_theta}
  new = old | {"rope_parameters": {"sliding_attention": {"rope_theta": 50.0}, "full_attention": far}}
  assert hf_config.parse_config(new, "new") == hf_config.parse_config(GEMMA3, "old") == VARIANTS["gemma3"]
  named = {key: value for key, value in GEMMA3.items() if key != "layer_types"} | {"num_hidden_layers": 14}
  config = hf_config.parse_config(named, "config")
  assert config.local_layers(0, 14).tolist() == [*[True] * 5, False, *[True] * 5, False, True, True]
  assert config.local_layers(4, 3).tolist() == [True, False, True]  # a run of layers knows its place
  bare = {key: GEMMA3[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
  config = hf_config.parse_config(bare | {"num_hidden_layers": 2, "num_attention_heads": 8}, "config")
  assert (config.head_dim, config.num_kv_heads, config.query_scalar, config.sliding_window) == (256, 4, 256.0, 4096)
  assert (config.rope_theta, config.local_rope_theta, config.tie_embeddings) == (1e6, 1e4, True)


def test_both_spellings_of_the_rotary_keys_are_read(tmp_path):
  base = hf_config.write_config(CONFIG, "float32")
  scaling = dict(VARIANTS["llama3"].rope_scaling)
  old = base | {"rope_scaling": scaling}
  new = {key: value for key, value in base.items() if key not in ("rope_theta", "rope_scaling")}
  new |= {"rope_parameters": scaling | {"rope_theta": 1000.0}}
  assert hf_config.parse_config(old, "old") == hf_config.parse_config(new, "new") == VARIANTS["llama3"]


def test_absent_keys_mean_what_transformers_takes_them_to_mean():
  values = {"model_type": "mistral", "vocab_size": 40, "hidden_size": 64, "intermediate_size": 64}
  values |= {"num_hidden_layers": 2, "num_attention_heads": 8}
  config = hf_config.parse_config(values, "config")
  assert (config.num_kv_heads, config.sliding_window, config.rms_eps, config.head_dim) == (8, 4096, 1e-6, 8)
  assert config.rope_theta == 10000.0 and not config.tie_embeddings
  assert hf_config.parse_config(values | {"sliding_window": None}, "config").sliding_window is None
  assert hf_config.parse_config(values | {"model_type": "llama", "sliding_window": 9}, "c").sliding_window is None


def test_folders_that_are_none_are_refused(tmp_path):
  with pytest.raises(UserError, match="config.json: no such file"):
    weights.load_hf_dir(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": ')
  with pytest.raises(UserError, match="broken JSON"):
    weights.load_hf_dir(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(hf_config.write_config(CONFIG, "float32")))
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(UserError, match="never loaded"):
    weights.load_hf_dir(tmp_path)
  (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
  with pytest.raises(UserError, match="not a complete safetensors file"):
    weights.load_hf_dir(tmp_path)


def test_export_folds_lora_in(tmp_path):
  params = make_params(CONFIG)
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(3, 32, 2)).astype(np.float32), rng.normal(size=(3, 2, 16)).astype(np.float32)
  tuned = jax.tree.map(lambda leaf: leaf, params)
  tuned["layers"]["attention"]["v_proj"] |= {"lora_a": a, "lora_b": b}
  weights.save_hf_dir(tmp_path, CONFIG, tuned)
  config, loaded = weights.load_hf_dir(tmp_path)
  tokens = jnp.arange(12)[None]
  np.testing.assert_allclose(decoder.logits(config, loaded, tokens), decoder.logits(config, tuned, tokens), atol=1e-5)
  assert (
    np.abs(loaded["layers"]["attention"]["v_proj"]["kernel"] - params["layers"]["attention"]["v_proj"]["kernel"]).max()
    > 1
  )
  assert "lora_a" in tuned["layers"]["attention"]["v_proj"]  # the caller's tree is left alone


def test_export_refuses_what_hugging_face_has_no_place_for(tmp_path):
  params = make_params(CONFIG)
  params["layers"]["mlp"]["up_proj"]["core"] = np.zeros((3, 2, 2), np.float32)
  with pytest.raises(UserError, match="layers/mlp/up_proj/core"):
    weights.save_hf_dir(tmp_path / "sketch", CONFIG, params)
  both = dataclasses.replace(CONFIG, attention_bias=True, post_norms=True)
  with pytest.raises(UserError, match="no known model type has all options.* closest, qwen2, differs: post_norms"):
    weights.save_hf_dir(tmp_path / "both", both, make_params(both))
  half = dataclasses.replace(CONFIG, query_key_norms=True, norm_offset=1.0)
  with pytest.raises(UserError, match="the closest, qwen3, differs: norm_offset"):
    hf_config.write_config(half, "float32")


def test_folder_hash_follows_the_content(tmp_path):
  first, second, moved = tmp_path / "a", tmp_path / "b", tmp_path / "c"
  weights.save_hf_dir(first, CONFIG, make_params(CONFIG))
  weights.save_hf_dir(second, CONFIG, make_params(CONFIG, seed=1))
  weights.save_hf_dir(moved, CONFIG, make_params(CONFIG))
  assert weights.hf_hash(first) == weights.hf_hash(moved) != weights.hf_hash(second)
  before = weights.hf_hash(moved)
  whole = (moved / "model.safetensors").read_bytes()
  for at in (len(whole) // 3, len(whole) // 2, len(whole) - 1):  # any one bit
    (moved / "model.safetensors").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert weights.hf_hash(moved) != before
  (moved / "model.safetensors").write_bytes(whole)
  assert weights.hf_hash(moved) == before
  edit_tensors(
    moved, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.layers.2.mlp.up_proj.weight"] * 1.01})
  )
  assert weights.hf_hash(moved) != before


# --- GGUF


def write_gguf(path, config, params, change=lambda tensors: None, architecture="llama", **metadata):
  """Writes `params` as a converter would: [out, in], q and k rows interleaved, matrices as Q8_0 or float32."""
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_block_count(config.num_layers)
  writer.add_embedding_length(config.hidden_size)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.rms_eps)
  writer.add_token_list([f"token {i} é" for i in range(config.vocab_size)])
  for key, value in metadata.items():
    {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](
      key.replace("__", "."), value
    )
  tensors = {}
  for leaf, value in traverse_util.flatten_dict(params, sep="/").items():
    for i, row in enumerate(value if leaf.startswith("layers/") else [value]):
      row = row.T if leaf.endswith("/kernel") else row
      if leaf.endswith("_norm/scale"):
        row = row + np.float32(config.norm_offset)
      if leaf in GGUF_ROTARY and architecture == "llama":
        heads = getattr(config, GGUF_ROTARY[leaf])
        row = row.reshape(heads, 2, -1, row.shape[1]).swapaxes(1, 2).reshape(row.shape)
      tensors[weights.GGUF_NAMES[leaf].format(i=i)] = np.ascontiguousarray(row)
  change(tensors)
  for name, value in tensors.items():
    if "ffn_up" in name:
      packed = gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0)
      writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_gives_back_what_was_written(tmp_path, tied):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  params = make_params(config)
  loaded_config, loaded = weights.load_gguf(write_gguf(tmp_path / "m.gguf", config, params))
  assert loaded_config == config  # rms_eps and rope_theta exactly, although the file holds float32
  up, loaded_up = params["layers"]["mlp"].pop("up_proj")["kernel"], loaded["layers"]["mlp"].pop("up_proj")["kernel"]
  assert_same(loaded, params)
  assert 0 < np.abs(up - loaded_up).max() <= np.abs(up).max() / 127  # Q8_0: half a step of the block's scale


GEMMA3_IN_GGUF = {"query_scalar": 8.0, "global_every": 6, "local_rope_theta": 10000.0, "rope_scaling": None}


def write_gemma3_gguf(path, config, **metadata):
  values = {"gemma3.attention.sliding_window": config.sliding_window, "gemma3.attention.key_length": config.head_dim}
  params = make_params(config)
  noise = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: (leaf + 0.125 * noise.integers(-4, 4, leaf.shape)).astype(np.float32), params)
  return write_gguf(path, config, params, architecture="gemma3", **(values | metadata)), params


def test_gguf_of_gemma3_gives_back_what_was_written(tmp_path):
  config = dataclasses.replace(VARIANTS["gemma3"], **GEMMA3_IN_GGUF)
  path, params = write_gemma3_gguf(tmp_path / "m.gguf", config)
  cut = tmp_path / "first", tmp_path / "second"
  cut[0].write_bytes(path.read_bytes()[:5000])
  cut[1].write_bytes(path.read_bytes()[5000:])
  params["layers"]["mlp"].pop("up_proj")
  for place in (path, cut):
    loaded_config, loaded = weights.load_gguf(place)
    assert loaded_config == config
    loaded["layers"]["mlp"].pop("up_proj")  # Q8_0
    assert_same(loaded, params)
  assert weights._file_hash(cut) == weights._file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
  with pytest.raises(UserError, match="ends inside tensor"):
    weights.load_gguf(cut[:1])


@pytest.mark.parametrize(
  "metadata", [{"gemma3.final_logit_softcapping": 30.0}, {"gemma3.attention.sliding_window_pattern": 4}]
)
def test_gguf_of_gemma3_that_would_not_map_is_refused(tmp_path, metadata):
  config = dataclasses.replace(VARIANTS["gemma3"], **GEMMA3_IN_GGUF)
  with pytest.raises(UserError, match=f"{next(iter(metadata))} .* is not supported"):
    weights.load_gguf(write_gemma3_gguf(tmp_path / "m.gguf", config, **metadata)[0])


def test_gguf_dtype(tmp_path):
  params = make_params(CONFIG)
  loaded = weights.load_gguf(write_gguf(tmp_path / "m.gguf", CONFIG, params), "bfloat16")[1]
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(ml_dtypes.bfloat16)}
  kernel = params["layers"]["attention"]["q_proj"]["kernel"]
  np.testing.assert_array_equal(loaded["layers"]["attention"]["q_proj"]["kernel"], kernel.astype(ml_dtypes.bfloat16))
  with pytest.raises(UserError, match="int8.*float32 or bfloat16"):
    weights.load_gguf(tmp_path / "m.gguf", "int8")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("blk.1.attn_k.weight"), r"missing: blk\.1\.attn_k\.weight"),
    (lambda t: t.pop("token_embd.weight"), r"token_embd\.weight is missing"),
    (
      lambda t: t.update({"blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)}),
      r"blk\.0\.ffn_gate_exps\.weight",
    ),
    (lambda t: t.update({"rope_freqs.weight": np.float32([1, 5, 2, 9])}), "rope_freqs.weight are of no scaling"),
    (lambda t: t.update({"rope_freqs.weight": np.ones(5, np.float32)}), "rope_freqs.weight must hold 4 factors"),
    (lambda t: t["blk.2.attn_v.weight"].__setitem__((0, 0), np.nan), r"blk\.2\.attn_v\.weight holds NaN"),
  ],
)
def test_damaged_gguf_is_refused_by_name(tmp_path, change, message):
  path = write_gguf(tmp_path / "m.gguf", CONFIG, make_params(CONFIG), change)
  with pytest.raises(UserError, match=message):
    weights.load_gguf(path)


def test_other_files_are_refused(tmp_path):
  params = make_params(CONFIG)
  with pytest.raises(UserError, match="architecture 'gemma' is not supported"):
    weights.load_gguf(write_gguf(tmp_path / "g.gguf", CONFIG, params, architecture="gemma"))
  for scaling, message in (("dynamic", "scaling 'dynamic' is not read"), ("yarn", "rope.scaling.factor is missing")):
    with pytest.raises(UserError, match=message):
      weights.load_gguf(write_gguf(tmp_path / "y.gguf", CONFIG, params, llama__rope__scaling__type=scaling))
  with pytest.raises(UserError, match="no such GGUF file"):
    weights.load_gguf(tmp_path / "absent.gguf")
  whole = write_gguf(tmp_path / "m.gguf", CONFIG, params).read_bytes()
  for size, message in (
    (10, "too few"),
    (300, "announces 30 tensors and 9 values, more than 300 bytes"),
    (1500, "cut off or damaged"),
    (len(whole) - 200, "the file ends inside tensor"),
  ):
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(UserError, match=message):
      weights.load_gguf(tmp_path / "cut.gguf")
  (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
  with pytest.raises(UserError, match="not a GGUF file"):
    weights.load_gguf(tmp_path / "zip.gguf")


def test_header_agrees_with_the_gguf_package(tmp_path):
  path = write_gguf(tmp_path / "m.gguf", CONFIG, make_params(CONFIG), general__note="a text")
  ours, theirs = gguf_file.read_gguf(path), gguf.GGUFReader(path)
  expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
  assert ours.metadata == expected and ours.metadata["tokenizer.ggml.tokens"][3] == "token 3 é"
  assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
  for tensor in theirs.tensors:
    np.testing.assert_array_equal(ours.read(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))


# --- random weights, specs, assets


def test_random_weights_follow_the_seed(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps(hf_config.write_config(CONFIG, "float32")))
  config, params = weights.load_random(path, seed=3)
  assert config == CONFIG
  assert_same(params, weights.load_random(path, seed=3)[1])
  other = weights.load_random(path, seed=4, dtype="bfloat16")[1]
  assert other["embed"]["embedding"].dtype == ml_dtypes.bfloat16
  assert (
    np.abs(np.asarray(params["embed"]["embedding"]) - np.asarray(other["embed"]["embedding"], np.float32)).max() > 0.01
  )


@pytest.mark.parametrize("spec", ["", "gpt2", "hf:", "gguf", "torch:x", "smollm2:x"])
def test_unknown_model_specs_list_the_forms(spec):
  with pytest.raises(
    UserError,
    match="use smollm2, gemma3, hf:DIR, gguf:FILE, hub:ORG/NAME, random:CONFIG.json or truncated:MODEL:LAYERS",
  ):
    weights.load_model(spec)


def test_random_model_needs_room_for_the_embedded_tokenizer(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps(hf_config.write_config(CONFIG, "float32")))
  with pytest.raises(UserError, match="vocab_size 40 is smaller than the 49152"):
    weights.load_model(f"random:{path}")
  wide = dataclasses.replace(CONFIG, vocab_size=49152, num_layers=1)
  path.write_text(json.dumps(hf_config.write_config(wide, "float32")))
  config, params, tokenizer, digest = weights.load_model(f"random:{path}", seed=1)
  assert (config, len(tokenizer)) == (wide, 49152)
  assert params["embed"]["embedding"].shape == (49152, 32)
  weights.save_hf_dir(tmp_path / "hf", config, params, tokenizer)
  again, loaded, tokenizer_again, _ = weights.load_model(f"hf:{tmp_path / 'hf'}")
  assert again == config and tokenizer_again("Hi 42")["input_ids"] == tokenizer("Hi 42")["input_ids"]
  np.testing.assert_array_equal(loaded["lm_head"]["kernel"], params["lm_head"]["kernel"])
  assert digest != weights.load_model(f"random:{path}", seed=2)[3]


def test_assets_are_what_the_manifest_says():
  manifest = json.loads(assets.MANIFEST.read_text())["assets"]
  assert {"origin", "version", "licence", "files"} <= manifest["chatterbot-english"].keys()
  corpus = assets.asset_path("chatterbot-english")
  assert len(list(corpus.glob("*.yml"))) == len(manifest["chatterbot-english"]["files"]) == 21
  assert assets.asset_path("smollm2-135m-instruct-q4_1").stat().st_size > 90_000_000
  assert sum(part.stat().st_size for part in assets.asset_parts("gemma-3-270m-q4_k_m")) == 253_113_024
  with pytest.raises(
    UserError, match="'smollm3' is not in manifest.json; known: chatterbot-english, gemma-3-270m-q4_k_m, smollm2"
  ):
    assets.asset_path("smollm3")


@pytest.fixture
def small_asset(tmp_path, monkeypatch):
  """A package with two data files and a manifest that describes it."""
  data = tmp_path / "in2core_asset_for_tests" / "data"
  data.mkdir(parents=True)
  (data.parent / "__init__.py").write_text("raise RuntimeError('assets must not import the package')")
  files = {}
  for name in ("a.yml", "b.yml"):
    (data / name).write_text(f"text of {name}")
    files[name] = {"bytes": 13, "sha256": hashlib.sha256(f"text of {name}".encode()).hexdigest()}
  asset = {"kind": "directory", "package": data.parent.name, "path": "data", "files": files}
  absent = asset | {"package": "in2core_asset_that_is_not_there"}
  whole = {"kind": "parts", "files": {f"{data.parent.name}/data/{name}": files[name] for name in ("b.yml", "a.yml")}}
  entries = {"small": asset, "absent": absent, "whole": whole}
  (tmp_path / "manifest.json").write_text(json.dumps({"assets": entries}))
  monkeypatch.setattr(assets, "MANIFEST", tmp_path / "manifest.json")
  monkeypatch.syspath_prepend(tmp_path)
  return data


def test_altered_assets_are_refused(small_asset):
  assert assets.asset_path("small") == small_asset
  (small_asset / "b.yml").write_text("text of c.yml")
  os.utime(small_asset / "b.yml", ns=(1, 1))  # a changed file has another time stamp, however coarse the clock
  with pytest.raises(UserError, match=r"b\.yml has sha256 .* altered"):
    assets.asset_path("small")
  (small_asset / "b.yml").write_text("longer than before")
  with pytest.raises(UserError, match=r"b\.yml has 18 bytes, but manifest\.json says 13"):
    assets.asset_path("small")
  (small_asset / "b.yml").unlink()
  with pytest.raises(UserError, match=r"b\.yml is missing: run \./run\.sh setup"):
    assets.asset_path("small")


def test_parts_come_in_the_order_of_the_manifest_and_checked(small_asset):
  assert assets.asset_parts("whole") == (small_asset / "b.yml", small_asset / "a.yml")
  with pytest.raises(UserError, match="comes in parts"):
    assets.asset_path("whole")
  (small_asset / "a.yml").write_text("text of z.yml")
  os.utime(small_asset / "a.yml", ns=(2, 2))
  with pytest.raises(UserError, match=r"'whole': .*a\.yml has sha256 .* altered"):
    assets.asset_parts("whole")
  with pytest.raises(UserError, match="'lost' is not in manifest"):
    assets.asset_parts("lost")


def test_unlisted_and_absent_assets_are_refused(small_asset):
  (small_asset / "c.yml").write_text("not ours")
  with pytest.raises(UserError, match=r"does not list: c\.yml"):
    assets.asset_path("small")
  with pytest.raises(UserError, match=r"not installed: run \./run\.sh setup"):
    assets.asset_path("absent")


@pytest.mark.slow
@pytest.mark.real
def test_embedded_gemma3():
  config, params, tokenizer, digest = weights.load_model("gemma3", "bfloat16")
  assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (18, 640, 4, 1)
  assert (config.head_dim, config.intermediate_size, config.vocab_size) == (256, 2048, 262144)
  assert (config.rope_theta, config.local_rope_theta, config.sliding_window, config.global_every) == (1e6, 1e4, 512, 6)
  assert (config.rms_eps, config.query_scalar, config.tie_embeddings) == (1e-6, 256.0, True)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 268_098_176
  assert digest in json.loads(assets.MANIFEST.read_text())["assets"]["gemma-3-270m-q4_k_m"]["origin"]
  assert (config, len(tokenizer)) == (weights.describe_model("gemma3")[0], 262144)


@pytest.mark.real
def test_embedded_model(tmp_path):
  config, params, tokenizer, digest = weights.load_model("smollm2", "bfloat16")
  assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
  assert (config.head_dim, config.intermediate_size, config.vocab_size) == (64, 1536, 49152)
  assert (config.rope_theta, config.rms_eps, config.tie_embeddings) == (100000.0, 1e-5, True)
  assert len(tokenizer) == 49152
  manifest = json.loads(assets.MANIFEST.read_text())["assets"][weights.EMBEDDED_MODEL]
  assert digest == next(iter(manifest["files"].values()))["sha256"]
  weights.save_hf_dir(tmp_path, config, params, tokenizer)
  again = weights.load_hf_dir(tmp_path, "bfloat16")
  assert again[0] == config
  assert_same(again[1], params)
