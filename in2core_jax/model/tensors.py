"""How files name and lay out the tensors of the parameter tree: tables of names, and what families store otherwise."""

import re
from collections.abc import Iterable

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.families import FAMILIES, Family

# Leaf path in the parameter tree -> tensor name; {i} is the layer.
GGUF_NAMES = {
  "embed/embedding": "token_embd.weight",
  "final_norm/scale": "output_norm.weight",
  "lm_head/kernel": "output.weight",
  "layers/attention_norm/scale": "blk.{i}.attn_norm.weight",
  "layers/attention/q_proj/kernel": "blk.{i}.attn_q.weight",
  "layers/attention/k_proj/kernel": "blk.{i}.attn_k.weight",
  "layers/attention/v_proj/kernel": "blk.{i}.attn_v.weight",
  "layers/attention/o_proj/kernel": "blk.{i}.attn_output.weight",
  "layers/mlp_norm/scale": "blk.{i}.ffn_norm.weight",
  "layers/mlp/gate_proj/kernel": "blk.{i}.ffn_gate.weight",
  "layers/mlp/up_proj/kernel": "blk.{i}.ffn_up.weight",
  "layers/mlp/down_proj/kernel": "blk.{i}.ffn_down.weight",
  "layers/attention/q_norm/scale": "blk.{i}.attn_q_norm.weight",
  "layers/attention/k_norm/scale": "blk.{i}.attn_k_norm.weight",
  "layers/attention_post_norm/scale": "blk.{i}.post_attention_norm.weight",
  "layers/mlp_post_norm/scale": "blk.{i}.post_ffw_norm.weight",
}
HF_NAMES = {
  "embed/embedding": "model.embed_tokens.weight",
  "final_norm/scale": "model.norm.weight",
  "lm_head/kernel": "lm_head.weight",
  "layers/attention_norm/scale": "model.layers.{i}.input_layernorm.weight",
  "layers/attention/q_proj/kernel": "model.layers.{i}.self_attn.q_proj.weight",
  "layers/attention/k_proj/kernel": "model.layers.{i}.self_attn.k_proj.weight",
  "layers/attention/v_proj/kernel": "model.layers.{i}.self_attn.v_proj.weight",
  "layers/attention/o_proj/kernel": "model.layers.{i}.self_attn.o_proj.weight",
  "layers/attention/q_proj/bias": "model.layers.{i}.self_attn.q_proj.bias",
  "layers/attention/k_proj/bias": "model.layers.{i}.self_attn.k_proj.bias",
  "layers/attention/v_proj/bias": "model.layers.{i}.self_attn.v_proj.bias",
  "layers/attention/o_proj/bias": "model.layers.{i}.self_attn.o_proj.bias",
  "layers/mlp_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
  "layers/mlp/gate_proj/bias": "model.layers.{i}.mlp.gate_proj.bias",
  "layers/mlp/up_proj/bias": "model.layers.{i}.mlp.up_proj.bias",
  "layers/mlp/down_proj/bias": "model.layers.{i}.mlp.down_proj.bias",
  "layers/mlp/gate_proj/kernel": "model.layers.{i}.mlp.gate_proj.weight",
  "layers/mlp/up_proj/kernel": "model.layers.{i}.mlp.up_proj.weight",
  "layers/mlp/down_proj/kernel": "model.layers.{i}.mlp.down_proj.weight",
  "layers/attention/q_norm/scale": "model.layers.{i}.self_attn.q_norm.weight",
  "layers/attention/k_norm/scale": "model.layers.{i}.self_attn.k_norm.weight",
}
# With norms behind attention and MLP, Llama's name for the norm before the MLP means the one behind attention.
HF_POST_NORM_NAMES = HF_NAMES | {
  "layers/attention_post_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
  "layers/mlp_norm/scale": "model.layers.{i}.pre_feedforward_layernorm.weight",
  "layers/mlp_post_norm/scale": "model.layers.{i}.post_feedforward_layernorm.weight",
}
# Tensors that old exports carry and that follow from the configuration.
HF_IGNORED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
# Of folders with several parts: how tensors of the language model are called there, and what belongs to other parts.
_TEXT_PREFIXES = {
  "language_model.model.": "model.",
  "model.language_model.": "model.",
  "language_model.lm_head": "lm_head",
}
_OTHER_PARTS = r"(model\.)?(vision_tower|multi_modal_projector)\."
# Leaf -> field of `ModelConfig` with its heads: what is rotated in pairs.
GGUF_ROTARY = {"layers/attention/q_proj/kernel": "num_heads", "layers/attention/k_proj/kernel": "num_kv_heads"}


def hf_names(config: ModelConfig) -> dict[str, str]:
  """Path of a leaf -> the tensor's name in Hugging Face files, by where the model's norms are."""
  return HF_POST_NORM_NAMES if config.post_norms else HF_NAMES


def text_names(where: Iterable[str]) -> dict[str, str | None]:
  """Stored name -> name in a folder of the language model alone; None: of another part, or it follows from config."""
  found: dict[str, str | None] = {}
  for name in where:
    prefix = next((prefix for prefix in _TEXT_PREFIXES if name.startswith(prefix)), None)
    found[name] = name if prefix is None else _TEXT_PREFIXES[prefix] + name.removeprefix(prefix)
  if any(found[name] != name for name in found):
    found |= {name: None for name in found if re.match(_OTHER_PARTS, name)}
  return found | {name: None for name in found if re.fullmatch(HF_IGNORED, name)}


def fused_pieces(config: ModelConfig, stored: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, slice]]:
  """Name of a leaf's matrix -> (tensor that holds it among others, its rows); `stored` gets the pieces in its place."""
  pieces: dict[str, tuple[str, slice]] = {}
  if not config.model_type:
    return pieces
  rows = {f"layers/attention/{name}_proj/kernel": config.num_kv_heads * config.head_dim for name in "kv"}
  rows |= {"layers/attention/q_proj/kernel": config.num_heads * config.head_dim}
  for end, leaves in FAMILIES[config.model_type].fused.items():
    for i in range(config.num_layers):
      whole, start = f"model.layers.{i}.{end}", 0
      sizes = [rows.get(leaf, config.intermediate_size) for leaf in leaves]
      if whole not in stored:
        continue
      if stored[whole] != (sum(sizes), config.hidden_size):
        raise UserError(
          f"tensor {whole} is {stored[whole]}, the configuration asks for {(sum(sizes), config.hidden_size)}; "
          "file and configuration do not belong together"
        )
      del stored[whole]
      for leaf, size in zip(leaves, sizes, strict=True):
        name = HF_NAMES[leaf].format(i=i)
        stored[name], pieces[name] = (size, config.hidden_size), (whole, slice(start, start + size))
        start += size
  return pieces


def rotated_heads(config: ModelConfig, leaf: str) -> int:
  """How many heads a rotated leaf has; 0 for other leaves."""
  field = GGUF_ROTARY.get(leaf.replace("/bias", "/kernel"))
  return getattr(config, field) if field else 0


def pairs_apart(array: np.ndarray, heads: int) -> np.ndarray:
  """Rows of rotary pairs from (2j, 2j + 1) to (j, half + j) in every head; [heads * head_dim, ...]."""
  return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def pairs_together(array: np.ndarray, heads: int) -> np.ndarray:
  """Inverse of `_pairs_apart`."""
  return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def fuse(tensors: dict[str, np.ndarray], family: Family, num_layers: int) -> None:
  """Puts matrices that the family stores as one into one."""
  for end, leaves in family.fused.items():
    for i in range(num_layers):
      parts = [tensors.pop(HF_NAMES[leaf].format(i=i)) for leaf in leaves]
      tensors[f"model.layers.{i}.{end}"] = np.concatenate(parts)
