"""The decoder's shape from the metadata of a GGUF file; refuses what would not map exactly."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.model import hf_config
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.gguf_file import GgufFile
from in2core_jax.model.model_files import say
from in2core_jax.model.schema import GGUF, check, plain, shown

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Key of the architecture -> the only values under which this decoder computes the same as the model.
_ONLY: dict[str, tuple] = {
  "attn_logit_softcapping": (0.0,),
  "final_logit_softcapping": (0.0,),
  "expert_count": (0,),
  "expert_used_count": (0,),
  "logit_scale": (1.0,),
  "embedding_scale": (1.0,),
  "residual_scale": (1.0,),
  "attention.causal": (True,),
  "attention.max_alibi_bias": (0.0,),
  "attention.clamp_kqv": (0.0,),
  "use_parallel_residual": (False,),
  "rope.scale_linear": (1.0,),
  "rope.scaling.attn_factor": (1.0,),
}
_LENGTHS = (
  "attention.value_length",
  "attention.key_length_swa",
  "attention.value_length_swa",
  "rope.dimension_count_swa",
)
_HARMLESS = {
  "rope.scaling.original_context_length",
  "rope.scaling.finetuned",
  "tensor_data_layout",
  "attention.layer_norm_epsilon",
}


def gguf_config(file: GgufFile) -> ModelConfig:
  """The shape that a GGUF file of a known architecture states in its metadata."""
  values, origin = file.metadata, str(file.path)
  architecture = values.get("general.architecture")
  if values.get("general.type", "model") != "model":
    raise UserError(f"{origin}: general.type is {shown(values['general.type'])}: an adapter or a part, not a model")
  if values.get("split.count", 0) > 1:
    raise UserError(
      f"{origin}: is one of {values['split.count']} files of a model; join them first: llama-gguf-split --merge"
    )
  if architecture not in ("llama", "gemma3"):
    raise UserError(
      f"{origin}: architecture {shown(architecture)} is not supported; known: llama (Llama, Mistral, SmolLM2), gemma3"
    )
  check(values, GGUF, origin, f"{architecture}.")
  embedding = file.tensors.get(_EMBEDDING)
  if embedding is None:
    raise UserError(f"{origin}: tensor {_EMBEDDING} is missing; the file is incomplete")

  def get(key: str, default=None):
    value = values.get(f"{architecture}.{key}", default)
    if value is None:
      raise UserError(f"{origin}: metadata {architecture}.{key} is missing; the file is incomplete")
    # The file holds float32: 9.99999975e-06 was written as 1e-05.
    return float(str(np.float32(value))) if isinstance(value, float) else value

  heads = get("attention.head_count")
  head_dim = get("attention.key_length", get("embedding_length") // heads)
  scaling = values.get(f"{architecture}.rope.scaling.type", "none")
  partial_rotary = get("rope.dimension_count", head_dim) != head_dim
  if scaling not in ("none", "linear") or "rope_freqs.weight" in file.tensors or partial_rotary:
    raise UserError(
      f"{origin}: its rotary frequencies are scaled in a way that is not read from GGUF; use the model's hf: folder"
    )
  _refuse_others(values, architecture, head_dim, origin)
  factor = (("factor", get("rope.scaling.factor")), ("rope_type", "linear")) if scaling == "linear" else None
  if architecture == "llama":
    family = {"sliding_window": values.get("llama.attention.sliding_window")}
  else:
    family = _gemma3_traits(get, origin)
  return ModelConfig(
    vocab_size=embedding.shape[0],
    hidden_size=get("embedding_length"),
    intermediate_size=get("feed_forward_length"),
    num_layers=get("block_count"),
    num_heads=heads,
    num_kv_heads=get("attention.head_count_kv", heads),
    head_dim=head_dim,
    rope_theta=get("rope.freq_base", 10000.0),
    rms_eps=get("attention.layer_norm_rms_epsilon"),
    tie_embeddings=_HEAD not in file.tensors,
    rope_scaling=factor,
    carried=_carried(values, architecture),
    **family,
  )


def _refuse_others(values: dict[str, Any], architecture: str, head_dim: int, origin: str) -> None:
  """Refuses metadata that would change what is computed; tells of keys of the architecture that nobody here knows."""
  inside = {key.removeprefix(f"{architecture}."): key for key in values if key.startswith(f"{architecture}.")}
  only = _ONLY | dict.fromkeys(_LENGTHS, (head_dim,))
  only["attention.sliding_window_pattern"] = (6,) if architecture == "gemma3" else (0, 1)
  for key, allowed in only.items():
    if key in inside and values[inside[key]] not in allowed:
      raise UserError(
        f"{origin}: {inside[key]} {shown(values[inside[key]])} is not supported; this decoder computes {allowed[0]}"
      )
  scale = values.get(inside.get("attention.scale", ""))
  if scale is not None and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
    raise UserError(f"{origin}: attention.scale {scale} is not supported; this decoder computes 1 / sqrt({head_dim})")
  strange = sorted(inside[key] for key in inside.keys() - only.keys() - GGUF.keys() - _HARMLESS)
  if strange:
    say(f"{origin}: metadata without effect here: {', '.join(map(plain, strange[:8]))}")


def _carried(values: dict[str, Any], architecture: str) -> str:
  """What an export of the model says of its positions and of the tokens that end a text."""
  ids = {
    f"{name}_token_id": values[f"tokenizer.ggml.{key}_token_id"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    if f"tokenizer.ggml.{key}_token_id" in values
  }
  ends = {values[key]: None for key in (f"tokenizer.ggml.{e}_token_id" for e in ("eos", "eot")) if key in values}
  generation = ids | ({"eos_token_id": list(ends)} if len(ends) > 1 else {})
  length = values.get(f"{architecture}.context_length")
  config = ids if length is None else {"max_position_embeddings": length} | ids
  return hf_config.carry(config, generation or None)


def _gemma3_traits(get: Callable, origin: str) -> dict[str, Any]:
  """What files of the architecture gemma3 leave to the program that reads them (llama.cpp holds the same constants)."""
  if get("block_count") == 62:
    raise UserError(f"{origin}: Gemma 3 27B is not read from GGUF; use the model's hf: folder")
  return hf_config.GEMMA3 | {
    "sliding_window": get("attention.sliding_window"),
    "global_every": 6,
    "local_rope_theta": get("rope.freq_base_swa", 10000.0),
    "query_scalar": float(get("attention.key_length")),
  }
