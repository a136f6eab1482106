"""How files name and lay out the tensors of the parameter tree: tables of names, and what families store otherwise."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

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
  "layers/attention/q_proj/bias": "blk.{i}.attn_q.bias",
  "layers/attention/k_proj/bias": "blk.{i}.attn_k.bias",
  "layers/attention/v_proj/bias": "blk.{i}.attn_v.bias",
  "layers/attention/o_proj/bias": "blk.{i}.attn_output.bias",
  "layers/mlp/gate_proj/bias": "blk.{i}.ffn_gate.bias",
  "layers/mlp/up_proj/bias": "blk.{i}.ffn_up.bias",
  "layers/mlp/down_proj/bias": "blk.{i}.ffn_down.bias",
  "layers/mlp/router/kernel": "blk.{i}.ffn_gate_inp.weight",
  "layers/mlp/gate_proj/experts": "blk.{i}.ffn_gate_exps.weight",
  "layers/mlp/up_proj/experts": "blk.{i}.ffn_up_exps.weight",
  "layers/mlp/down_proj/experts": "blk.{i}.ffn_down_exps.weight",
  "layers/mlp/shared_gate_proj/kernel": "blk.{i}.ffn_gate_shexp.weight",
  "layers/mlp/shared_up_proj/kernel": "blk.{i}.ffn_up_shexp.weight",
  "layers/mlp/shared_down_proj/kernel": "blk.{i}.ffn_down_shexp.weight",
  "layers/mlp/shared_router/kernel": "blk.{i}.ffn_gate_inp_shexp.weight",
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
  "layers/attention/sinks": "model.layers.{i}.self_attn.sinks",
  "layers/mlp/router/kernel": "model.layers.{i}.mlp.gate.weight",
  "layers/mlp/correction": "model.layers.{i}.mlp.gate.e_score_correction_bias",
  "layers/mlp/gate_proj/experts": "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
  "layers/mlp/up_proj/experts": "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
  "layers/mlp/down_proj/experts": "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
}
# With norms behind attention and MLP, Llama's name for the norm before the MLP means the one behind attention.
HF_POST_NORM_NAMES = HF_NAMES | {
  "layers/attention_post_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
  "layers/mlp_norm/scale": "model.layers.{i}.pre_feedforward_layernorm.weight",
  "layers/mlp_post_norm/scale": "model.layers.{i}.post_feedforward_layernorm.weight",
}
# Tensors that old exports carry and that follow from the configuration.
HF_IGNORED = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
# Of folders with several parts: how tensors of the language model are called there, and what belongs to other parts.
_TEXT_PREFIXES = {
  "language_model.model.": "model.",
  "model.language_model.": "model.",
  "language_model.lm_head": "lm_head",
}
_OTHER_PARTS = r"(model\.)?(vision_tower|multi_modal_projector)\."
# Leaf -> field of `ModelConfig` with its heads: what is rotated in pairs.
GGUF_ROTARY = {"layers/attention/q_proj/kernel": "num_heads", "layers/attention/k_proj/kernel": "num_kv_heads"}


def hf_names(config: ModelConfig, kind: str = "") -> dict[str, str]:
  """Path of a leaf -> the tensor's name in Hugging Face files, by where the model's norms are and what the type says.

  Args:
    config: the model's shape.
    kind: model_type of the files; that of the configuration where it is not given.
  """
  names = HF_POST_NORM_NAMES if config.post_norms else HF_NAMES
  family = FAMILIES.get(kind or config.model_type)
  if family is None:
    return names
  own = family.names | piece_names(family.fused)
  return names | {leaf: f"model.layers.{{i}}.{end}" for leaf, end in own.items()}


def piece_names(fused: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
  """Leaf -> what its part of a fused tensor is called, as `fused_pieces` does."""
  return {leaf: f"{end}:{leaf}" for end, leaves in fused.items() for leaf in leaves}


def text_names(where: Iterable[str]) -> dict[str, str | None]:
  """Stored name -> name in a folder of the language model alone; None: of another part, or it follows from config."""
  found: dict[str, str | None] = {}
  for name in where:
    prefix = next((prefix for prefix in _TEXT_PREFIXES if name.startswith(prefix)), None)
    found[name] = name if prefix is None else _TEXT_PREFIXES[prefix] + name.removeprefix(prefix)
  if any(found[name] != name for name in found):
    found |= {name: None for name in found if re.match(_OTHER_PARTS, name)}
  return found | {name: None for name in found if re.fullmatch(HF_IGNORED, name)}


@dataclasses.dataclass(frozen=True)
class Piece:
  """A leaf's part of a tensor that holds several.

  Attributes:
    whole: name of the tensor.
    part: which part it is, of how many.
    paired: their entries take turns along the last axis, and matrices are [in, out]; without: [out, in] matrices, one
      after the other.
    start, stop: rows of the part, where not paired.
  """

  whole: str
  part: int
  parts: int
  paired: bool
  start: int
  stop: int

  def of(self, array: np.ndarray, leaf: str) -> np.ndarray:
    """The part, as [..., out, in] or [..., out]."""
    if not self.paired:
      return array[..., self.start : self.stop, :]
    array = array[..., self.part :: self.parts]
    return array.swapaxes(-1, -2) if is_matrix(leaf) else array


def is_matrix(leaf: str) -> bool:
  """Whether a leaf is [..., in, out], which files store as [..., out, in]."""
  return leaf.endswith(("/kernel", "/experts"))


def places(name: str, leaf: str, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], str]]:
  """(index into a leaf, name of the tensor that stands there): by layer, and by expert where the name says so."""
  if not leaf.startswith("layers/"):
    return [((), name)]
  if "{e}" not in name:
    return [((i,), name.format(i=i)) for i in range(shape[0])]
  return [((i, e), name.format(i=i, e=e)) for i in range(shape[0]) for e in range(shape[1])]


def fused_pieces(
  fused: Mapping[str, tuple[str, ...]],
  stored: dict[str, tuple[int, ...]],
  shapes: Mapping[str, tuple[int, ...]],
  paired: bool = False,
  prefix: str = "model.layers.{i}.",
) -> dict[str, Piece]:
  """Name of a leaf's tensor -> where it lies among others; `stored` gets the pieces in place of whole tensors.

  Args:
    fused: end of a tensor's name -> its leaves.
    stored: name -> shape of what the files hold; changed.
    shapes: leaf -> shape in the parameter tree.
    paired: see `families.Family`.
    prefix: of the names.
  """
  pieces: dict[str, Piece] = {}
  for end, leaves in fused.items():
    if leaves[0] not in shapes:  # of an option that this model does without
      continue
    parts = [_as_stored(leaf, shapes[leaf][1:]) for leaf in leaves]  # [..., out, in] or [..., out]
    matrix = is_matrix(leaves[0])
    sizes = [part[-2 if matrix else -1] for part in parts]
    wanted = _whole_shape(parts[0], sum(sizes), paired, matrix)
    for i in range(shapes[leaves[0]][0]):
      whole, start = f"{prefix.format(i=i)}{end}", 0
      if whole not in stored:
        continue
      if stored[whole] != wanted:
        raise UserError(
          f"tensor {whole} is {stored[whole]}, the configuration asks for {wanted}; "
          "file and configuration do not belong together"
        )
      del stored[whole]
      for number, (leaf, size, shape) in enumerate(zip(leaves, sizes, parts, strict=True)):
        name = f"{whole}:{leaf}"
        stored[name] = shape
        pieces[name] = Piece(whole, number, len(leaves), paired, start, start + size)
        start += size
  return pieces


def _as_stored(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  return (*shape[:-2], shape[-1], shape[-2]) if is_matrix(leaf) else shape


def _whole_shape(part: tuple[int, ...], size: int, paired: bool, matrix: bool) -> tuple[int, ...]:
  """Shape of a tensor that holds several [..., out, in] or [..., out], `size` outputs in all."""
  if not matrix:
    return (*part[:-1], size)
  return (*part[:-2], part[-1], size) if paired else (*part[:-2], size, part[-1])


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
  """Puts matrices that the family stores as one into one: the inverse of `Piece.of`."""
  for end, leaves in family.fused.items():
    for i in range(num_layers):
      whole = f"model.layers.{i}.{end}"
      if f"{whole}:{leaves[0]}" not in tensors:
        continue
      parts = [tensors.pop(f"{whole}:{leaf}") for leaf in leaves]
      if not family.paired:
        tensors[whole] = np.concatenate(parts, axis=-2)
        continue
      parts = [part.swapaxes(-1, -2) if is_matrix(leaf) else part for part, leaf in zip(parts, leaves, strict=True)]
      joined = np.stack(parts, axis=-1)
      tensors[whole] = np.ascontiguousarray(joined.reshape(*joined.shape[:-2], -1))
