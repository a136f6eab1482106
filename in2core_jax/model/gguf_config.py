"""The decoder's shape from the metadata of a GGUF file; refuses what would not map exactly."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.model import hf_config
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.families import FAMILIES
from in2core_jax.model.gguf_file import GgufFile
from in2core_jax.model.gguf_rope import ROPE_KEYS, read_rope
from in2core_jax.model.model_files import say
from in2core_jax.model.schema import GGUF, check, plain, shown


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What files of one general.architecture mean.

  Attributes:
    known: models, for messages.
    model_type: of the config.json whose traits the models have and which export writes; "": the first that fits.
    traits: fields of `ModelConfig` that all models of it have.
    paired: rotary pairs of queries and keys are stored side by side.
    experts: traits of models with experts; None: it has none.
    fused: tensor name behind blk.N. -> leaves whose matrices lie in it.
    partial_rotary: heads may be rotated in part.
  """

  known: str
  model_type: str = ""
  traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  paired: bool = False
  experts: Mapping[str, Any] | None = None
  fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  partial_rotary: bool = False


ARCHITECTURES = {
  "llama": Architecture("Llama, Mistral, Mixtral, SmolLM2", paired=True, experts={"norm_gates": True}),
  "qwen2": Architecture("Qwen 2 and 2.5", "qwen2"),
  "qwen3": Architecture("Qwen 3", "qwen3"),
  "qwen3moe": Architecture("Qwen 3 with experts", "qwen3_moe", experts={"norm_gates": True}),
  "qwen2moe": Architecture("Qwen 2 with experts", "qwen2_moe", experts={"norm_gates": False}),
  "gemma3": Architecture("Gemma 3"),
  "phi3": Architecture(
    "Phi-3, Phi-4",
    "phi3",
    fused={
      "attn_qkv.weight": tuple(f"layers/attention/{name}_proj/kernel" for name in "qkv"),
      "ffn_up.weight": ("layers/mlp/gate_proj/kernel", "layers/mlp/up_proj/kernel"),
    },
    partial_rotary=True,
  ),
  "smollm3": Architecture("SmolLM3", "smollm3", paired=True),
}
_SHARED = "expert_shared_feed_forward_length"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Key of the architecture -> the only values under which this decoder computes the same as the model.
_ONLY: dict[str, tuple] = {
  "attn_logit_softcapping": (0.0,),
  "final_logit_softcapping": (0.0,),
  "expert_count": (0,),
  "expert_used_count": (0,),
  "expert_shared_count": (0,),
  "expert_group_count": (0, 1),
  "expert_gating_func": (0, 1),  # softmax
  "expert_weights_scale": (1.0, 0.0),
  "logit_scale": (1.0,),
  "embedding_scale": (1.0,),
  "residual_scale": (1.0,),
  "attention.causal": (True,),
  "attention.max_alibi_bias": (0.0,),
  "attention.clamp_kqv": (0.0,),
  "use_parallel_residual": (False,),
  "rope.scale_linear": (1.0,),
  "interleave_moe_layer_step": (1,),
  "leading_dense_block_count": (0,),
}
_LENGTHS = (
  "attention.value_length",
  "attention.key_length_swa",
  "attention.value_length_swa",
  "rope.dimension_count_swa",
)
_HARMLESS = {
  "tensor_data_layout",
  "attention.layer_norm_epsilon",
}


def gguf_config(file: GgufFile) -> ModelConfig:
  """The shape that a GGUF file of a known architecture states in its metadata."""
  values, origin = file.metadata, str(file.path)
  architecture, kind = _architecture(values, origin)
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
  experts = _experts(get, kind, origin) if values.get(f"{architecture}.expert_count") else {}
  read = {"expert_count", "expert_used_count", *([_SHARED] if "shared_size" in experts else [])} if experts else set()
  _refuse_others(values, architecture, read, head_dim, origin)
  theta, scaling, rotary_dim = read_rope(file, get, head_dim, kind.partial_rotary)
  return ModelConfig(
    vocab_size=embedding.shape[0],
    hidden_size=get("embedding_length"),
    intermediate_size=get("expert_feed_forward_length", get("feed_forward_length")),
    num_layers=get("block_count"),
    num_heads=heads,
    num_kv_heads=get("attention.head_count_kv", heads),
    head_dim=head_dim,
    rope_theta=theta,
    rms_eps=get("attention.layer_norm_rms_epsilon"),
    tie_embeddings=_HEAD not in file.tensors,
    rope_scaling=scaling,
    rotary_dim=None if rotary_dim == head_dim else rotary_dim,
    carried=_carried(values, architecture),
    model_type=kind.model_type,
    **(_traits(file, architecture, kind, get) | experts),
  )


def _architecture(values: dict[str, Any], origin: str) -> tuple[str, Architecture]:
  """The name of the architecture and what is known of it.

  Raises:
    UserError: the file is no whole model, or of an architecture that is not known.
  """
  architecture = values.get("general.architecture")
  if values.get("general.type", "model") != "model":
    raise UserError(f"{origin}: general.type is {shown(values['general.type'])}: an adapter or a part, not a model")
  if values.get("split.count", 0) > 1:
    raise UserError(
      f"{origin}: is one of {values['split.count']} files of a model; join them first: llama-gguf-split --merge"
    )
  kind = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
  if kind is None:
    known = ", ".join(f"{name} ({one.known})" for name, one in ARCHITECTURES.items())
    raise UserError(
      f"{origin}: architecture {shown(architecture)} is not supported; known: {known}; or use the model's hf: folder"
    )
  return architecture, kind


def _traits(file: GgufFile, architecture: str, kind: Architecture, get: Callable) -> dict[str, Any]:
  """Fields of `ModelConfig` that tell the architecture, or this model of it, from others."""
  traits = dict(FAMILIES[kind.model_type].traits) if kind.model_type else {}
  if architecture == "gemma3":
    traits |= _gemma3_traits(get, str(file.path))
  elif architecture == "smollm3":  # every fourth layer, as in llama.cpp
    traits |= {"unrotated": tuple((layer + 1) % 4 == 0 for layer in range(get("block_count")))}
  else:
    traits |= {"sliding_window": file.metadata.get(f"{architecture}.attention.sliding_window")}
  for field, tensor in (("attention_bias", "attn_q"), ("output_bias", "attn_output"), ("mlp_bias", "ffn_up")):
    traits |= {field: True} if f"blk.0.{tensor}.bias" in file.tensors else {}
  return traits


def _experts(get: Callable, kind: Architecture, origin: str) -> dict[str, Any]:
  """Fields of `ModelConfig` of a model with experts."""
  if kind.experts is None:
    raise UserError(f"{origin}: a mixture of experts of this architecture is not supported; use the model's hf: folder")
  found = {"num_experts": get("expert_count"), "experts_per_token": get("expert_used_count"), **kind.experts}
  return found | ({"shared_size": get(_SHARED)} if kind.model_type == "qwen2_moe" else {})


def _refuse_others(values: dict[str, Any], architecture: str, read: set[str], head_dim: int, origin: str) -> None:
  """Refuses metadata that would change what is computed; tells of keys of the architecture that nobody here knows."""
  inside = {key.removeprefix(f"{architecture}."): key for key in values if key.startswith(f"{architecture}.")}
  only = _ONLY | dict.fromkeys(_LENGTHS, (head_dim,))
  only = {key: allowed for key, allowed in only.items() if key not in read}
  only["attention.sliding_window_pattern"] = (6,) if architecture == "gemma3" else (0, 1)
  for key, allowed in only.items():
    if key in inside and values[inside[key]] not in allowed:
      raise UserError(
        f"{origin}: {inside[key]} {shown(values[inside[key]])} is not supported; this decoder computes {allowed[0]}"
      )
  scale = values.get(inside.get("attention.scale", ""))
  if scale is not None and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
    raise UserError(f"{origin}: attention.scale {scale} is not supported; this decoder computes 1 / sqrt({head_dim})")
  strange = sorted(inside[key] for key in inside.keys() - only.keys() - GGUF.keys() - ROPE_KEYS - read - _HARMLESS)
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
