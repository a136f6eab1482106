"""GGUF files of every architecture that is read, written by the gguf library from the models of the families' tests.

Names are those that the library's own table gives to the tensors of Hugging Face folders; layouts are those of
llama.cpp's converter, written again here.
"""

import math
import re

import gguf
import jax
import numpy as np
import pytest
import test_families
import tokenizers
from exported import TINY, tiny_tensors

from in2core_jax.errors import UserError
from in2core_jax.model import gguf_cuts, gguf_rope, hf_config, weights

_PLAIN = {"use_sliding_window": False, "sliding_window": None, "attention_bias": False, "layer_types": None}
# (reference model, architecture, what the format cannot say and is turned off)
CASES = [
  ("llama3", "llama", {}),
  ("llama biases yarn", "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
  ("mistral", "llama", {}),
  ("mixtral", "llama", {}),
  ("qwen2", "qwen2", {}),
  ("qwen2 sliding yarn", "qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}} | _PLAIN),
  ("qwen3", "qwen3", _PLAIN),
  ("qwen3 moe", "qwen3moe", _PLAIN),
  ("qwen2 moe", "qwen2moe", {"norm_topk_prob": False}),
  ("phi3", "phi3", {}),
  ("phi4 mini", "phi3", {}),
  ("smollm3", "smollm3", {"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4} | _PLAIN),
]


def source(folder, name, changes):
  """(config.json, tensors, config, params) of a reference model, without the biases that are turned off."""
  values = (TINY[name]["config"] if name in TINY else test_families.MODELS[name]["config"]) | changes
  if "original_max" not in str(values.get("rope_scaling")) and (values.get("rope_scaling") or {}).get("factor"):
    values["rope_scaling"] = values["rope_scaling"] | {"original_max_position_embeddings": 32}
  tensors = tiny_tensors(name) if name in TINY else test_families.tensors_of(name)
  for i in range(3, values["num_hidden_layers"]):  # more layers than the reference has
    tensors |= {k.replace("layers.0.", f"layers.{i}."): v + 1 for k, v in tensors.items() if "layers.0." in k}
  if changes.get("attention_bias") is False and values["model_type"] != "qwen2":
    tensors = {key: value for key, value in tensors.items() if not re.search(r"self_attn.*bias", key)}
  folder.mkdir()
  (folder / "config.json").write_text(test_families.json.dumps(values))
  test_families.safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  config, params = weights.load_hf_dir(folder)
  return values, tensors, config, params


def permute(array, heads):
  """Rows of a head's halves side by side, as the converter of Llama writes them."""
  return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def converted(architecture, values, tensors) -> dict[str, np.ndarray]:
  """Tensors under the library's names."""
  kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
  table = gguf.get_tensor_name_map(kind, values["num_hidden_layers"])
  heads = {"q_proj": values["num_attention_heads"], "k_proj": values["num_key_value_heads"]}
  found, experts = {}, {}
  for name, value in sorted(tensors.items()):
    part = name.split(".")[-2]
    value = permute(value, heads[part]) if part in heads and architecture in ("llama", "smollm3") else value
    one = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
    if one:
      experts.setdefault(f"{one[1]}.{one[3]}.weight", []).append(value)
    else:
      found[table.get_name(name, try_suffixes=(".weight", ".bias"))] = value.squeeze()
  for name, each in experts.items():
    found[table.get_name(name, try_suffixes=(".weight",))] = np.stack(each)
  assert None not in found
  return found


def llama3_factors(values) -> np.ndarray:
  """What the converter divides frequencies by."""
  scaling, size = values["rope_scaling"], values["head_dim"]
  low, high = (scaling["original_max_position_embeddings"] / scaling[f"{end}_freq_factor"] for end in ("low", "high"))
  factors = []
  for frequency in values["rope_theta"] ** (-np.arange(0, size, 2) / size):
    length = 2 * math.pi / frequency
    if length < high:
      factors.append(1)
    elif length > low:
      factors.append(scaling["factor"])
    else:
      smooth = (scaling["original_max_position_embeddings"] / length - scaling["low_freq_factor"]) / (
        scaling["high_freq_factor"] - scaling["low_freq_factor"]
      )
      factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
  return np.array(factors, np.float32)


def write(path, architecture, values, tensors, change=lambda writer: None):
  writer = gguf.GGUFWriter(path, architecture)
  head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
  writer.add_block_count(values["num_hidden_layers"])
  writer.add_context_length(values["max_position_embeddings"])
  writer.add_embedding_length(values["hidden_size"])
  writer.add_feed_forward_length(values["intermediate_size"])
  writer.add_head_count(values["num_attention_heads"])
  writer.add_head_count_kv(values["num_key_value_heads"])
  writer.add_key_length(head_dim)
  writer.add_value_length(head_dim)
  writer.add_rope_freq_base(values["rope_theta"])
  writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
  writer.add_rope_dimension_count(int(head_dim * values.get("partial_rotary_factor", 1)))
  if values.get("sliding_window"):
    writer.add_sliding_window(values["sliding_window"])
  experts = values.get("num_experts") or values.get("num_local_experts")
  if experts:
    writer.add_expert_count(experts)
    writer.add_expert_used_count(values["num_experts_per_tok"])
  if "moe_intermediate_size" in values:
    writer.add_expert_feed_forward_length(values["moe_intermediate_size"])
  if "shared_expert_intermediate_size" in values:
    writer.add_expert_shared_feed_forward_length(values["shared_expert_intermediate_size"])
  tensors, scaling = converted(architecture, values, tensors), values.get("rope_scaling") or {}
  kind = scaling.get("rope_type", scaling.get("type"))
  if kind == "yarn":
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
  elif kind == "llama3":
    tensors["rope_freqs.weight"] = llama3_factors(values)
  elif kind == "longrope":
    trained, length = values["original_max_position_embeddings"], values["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(trained)
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(length / trained) / math.log(trained)))
    for end in ("long", "short"):
      tensors[f"rope_factors_{end}.weight"] = np.array(scaling[f"{end}_factor"], np.float32)
  change(writer)
  for name, value in tensors.items():
    writer.add_tensor(name, np.ascontiguousarray(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize(("name", "architecture", "changes"), CASES, ids=[case[0] for case in CASES])
def test_a_file_is_the_same_model_as_the_folder(tmp_path, name, architecture, changes):
  """Equal configurations and equal parameters, bit for bit: equal logits."""
  values, tensors, config, params = source(tmp_path / "in", name, changes)
  found, loaded = weights.load_gguf(write(tmp_path / "m.gguf", architecture, values, tensors))
  assert found == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  if found.model_type:
    assert found.model_type == config.model_type
  assert hf_config.parse_config(hf_config.write_config(found, "float32"), "export") == config


REFUSED = [
  ({"rope.scaling.type": "dynamic"}, "rotary scaling 'dynamic' is not read from GGUF"),
  ({"rope.scaling.attn_factor": 2.0}, "attn_factor 2.0 is not supported with 'none' scaling"),
  ({"rope.dimension_count": 6}, "6 of 8 entries of a head are rotated"),
  ({"expert_count": 4, "expert_used_count": 2}, "mixture of experts of this architecture is not supported"),
  ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
]


@pytest.mark.parametrize(("metadata", "message"), REFUSED)
def test_metadata_that_would_not_map_is_refused(tmp_path, metadata, message):
  values, tensors, _, _ = source(tmp_path / "in", "qwen2", {})

  def change(writer):
    for key, value in metadata.items():
      writer.kv_data[0].pop(f"qwen2.{key}", None)
      add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
      add(f"qwen2.{key}", value)

  with pytest.raises(UserError, match=message):
    weights.load_gguf(write(tmp_path / "m.gguf", "qwen2", values, tensors, change))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_found_again(factor):
  scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
  scaling |= {"original_max_position_embeddings": 8192}
  for size in (64, 128):
    factors = llama3_factors({"rope_scaling": scaling, "head_dim": size, "rope_theta": 500000.0}).astype(np.float64)
    assert gguf_rope.llama3_scaling(factors, 500000.0, size, "file") == tuple(sorted(scaling.items()))
  with pytest.raises(UserError, match="of no scaling that is known"):
    gguf_rope.llama3_scaling(factors[::-1], 500000.0, 128, "file")
  assert gguf_rope.llama3_scaling(np.ones(8), 500000.0, 16, "file") is None


def test_texts_are_cut_as_transformers_cuts_them():
  from transformers.integrations.gguf import gguf_tokenizer_mapping

  text = "Don't I'LL HelloWORLD naïve e\u0301 12345 3.14  \n\n x/y...\r\n\tTab"
  for name, pattern in gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS.items():
    if name in gguf_cuts.CUTS:
      split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
      level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
      theirs = tokenizers.pre_tokenizers.Sequence([split, level]).pre_tokenize_str(text)
      assert gguf_cuts.CUTS[name].parts().pre_tokenize_str(text) == theirs, name
  assert set(gguf_cuts.CUTS) - set(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS) == {"smollm", "gpt-2"}
