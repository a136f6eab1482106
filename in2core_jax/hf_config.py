"""The decoder's shape from, and to, a Hugging Face config.json; refuses what would not map exactly."""

import dataclasses
import json
import pathlib
from typing import Any

from in2core_jax.errors import UserError
from in2core_jax.model_config import ModelConfig

# What a config.json of that type means when the key is absent (transformers' own defaults), as far as we read it.
DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {"rms_norm_eps": 1e-6, "sliding_window": None},
  "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
  "qwen2": {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": None},
  "gemma3_text": {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
  },
}
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}
# What sets Gemma 3 apart from Llama in every one of its models, as fields of `ModelConfig`.
GEMMA3 = {
  "activation": "gelu_tanh",
  "norm_offset": 1.0,
  "post_norms": True,
  "query_key_norms": True,
  "scaled_embeddings": True,
}
# Key -> the only values under which this decoder computes the same as the model (None: absent or null).
ONLY = {
  "hidden_act": ("silu", "swish", None),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "partial_rotary_factor": (1, 1.0, None),
  "use_sliding_window": (False, None),
  "quantization_config": (None,),
}
ONLY_GEMMA3 = {
  "hidden_activation": ("gelu_pytorch_tanh",),
  "final_logit_softcapping": (None,),
  "attn_logit_softcapping": (None,),
  "use_bidirectional_attention": (False, None),
}
ROPE_KINDS = ("default", "linear", "llama3")
ROPE_KEYS = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(path: pathlib.Path) -> ModelConfig:
  """Reads a config.json.

  Raises:
    UserError: no such file, broken JSON, or a model that this decoder does not express exactly.
  """
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path}: no such file; a Hugging Face folder has a config.json beside its weights") from None
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror}); give a config.json, not its folder") from error
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: broken JSON ({error}); correct it or fetch it again") from error
  if not isinstance(values, dict):
    raise UserError(
      f"{path}: holds a JSON {type(values).__name__}, expected an object with the keys of a model configuration"
    )
  return parse_config(values, str(path))


def parse_config(values: dict[str, Any], origin: str) -> ModelConfig:
  """The decoder's shape from the keys of a config.json (either spelling of the rotary keys).

  Args:
    values: the parsed JSON.
    origin: where it came from, for messages.

  Raises:
    UserError: unknown model type, missing keys, or options that the decoder does not have.
  """
  kind = values.get("model_type")
  if kind not in DEFAULTS:
    raise UserError(f"{origin}: model_type {kind!r} is not supported; known: {', '.join(DEFAULTS)}")
  values = DEFAULTS[kind] | values
  only = ONLY | (ONLY_GEMMA3 if kind == "gemma3_text" else {})
  for key, allowed in only.items():
    if values.get(key) not in allowed:
      raise UserError(
        f"{origin}: {key} {values[key]!r} is not supported; this decoder computes {key} {allowed[0]!r} only"
      )
  if kind != "gemma3_text" and len(set(values.get("layer_types") or ())) > 1:
    raise UserError(f"{origin}: layer_types mixes {sorted(set(values['layer_types']))}; all layers must attend alike")
  need = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
  absent = [key for key in need if not isinstance(values.get(key), int)]
  if absent:
    raise UserError(f"{origin}: {', '.join(absent)} must be given as a whole number")
  heads = values["num_attention_heads"]
  # Llama ignores the key; Qwen2 uses it only with use_sliding_window, which is refused above.
  family = {"sliding_window": values["sliding_window"] if kind == "mistral" else None}
  if kind == "gemma3_text":
    values, family = _read_gemma3(values, origin)
  theta, scaling = _rope(values, origin)
  return ModelConfig(
    vocab_size=values["vocab_size"],
    hidden_size=values["hidden_size"],
    intermediate_size=values["intermediate_size"],
    num_layers=values["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=values.get("num_key_value_heads") or heads,
    head_dim=values.get("head_dim") or values["hidden_size"] // heads,
    rope_theta=theta,
    rms_eps=float(values["rms_norm_eps"]),
    tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    rope_scaling=scaling,
    attention_bias=kind == "qwen2",
    **family,
  )


def _read_gemma3(values: dict[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """(values whose rotary keys are those of the global layers alone, the fields of `ModelConfig` that Llama lacks)."""
  local_theta, rope = values["rope_local_base_freq"], values.get("rope_parameters") or {}
  if rope:  # the newer spelling has a dictionary for each kind of layer
    near, far = (rope.get(kind) or {} for kind in ("sliding_attention", "full_attention"))
    strange = set(rope) - {"sliding_attention", "full_attention"} or set(near) - {"rope_type", "rope_theta"}
    if strange or near.get("rope_type", "default") != "default" or values.get("rope_scaling"):
      raise UserError(
        f"{origin}: rope_parameters {rope} is not supported; it must have sliding_attention, unscaled, and "
        "full_attention, and no rope_scaling beside it"
      )
    local_theta = near.get("rope_theta", local_theta)
    values = values | {"rope_parameters": {"rope_theta": values["rope_theta"]} | far}
  return values, GEMMA3 | {
    "sliding_window": values["sliding_window"],
    "global_every": _global_every(values, origin),
    "local_rope_theta": float(local_theta),
    "query_scalar": float(values["query_pre_attn_scalar"]),
  }


def _global_every(values: dict[str, Any], origin: str) -> int:
  """The number n for which every n-th layer is global and no other."""
  kinds, count = values.get("layer_types"), values["num_hidden_layers"]
  if kinds is None:
    return values["sliding_window_pattern"]
  for every in range(1, count + 2):
    if kinds == _layer_types(every, count):
      return every
  raise UserError(
    f"{origin}: layer_types {kinds} is not supported; every n-th of {count} layers must be full_attention"
  )


def _layer_types(every: int, count: int) -> list[str]:
  return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(count)]


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """The keys of a config.json that `parse_config` and transformers read as `config`.

  Raises:
    UserError: a configuration that no known model type expresses.
  """
  gemma3 = _write_gemma3(config)
  if config.attention_bias and config.sliding_window:
    raise UserError("export: no known model type has both attention biases and a sliding window in all layers")
  kind = "qwen2" if config.attention_bias else "mistral" if config.sliding_window else "llama"
  kind = "gemma3_text" if gemma3 else kind
  scaling = dict(config.rope_scaling) if config.rope_scaling else None
  return {
    "architectures": [ARCHITECTURES[kind]],
    "model_type": kind,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "rms_norm_eps": config.rms_eps,
    "rope_theta": config.rope_theta,
    "rope_scaling": scaling,
    "sliding_window": config.sliding_window,
    "tie_word_embeddings": config.tie_embeddings,
    # Rotary positions have no end; the key only bounds what other programs allow.
    "max_position_embeddings": _max_positions(scaling or {}),
    "torch_dtype": dtype,
    **(gemma3 or {"hidden_act": "silu"}),
  }


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
  """The keys that only Gemma 3 has; none for other decoders."""
  plain = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
  traits = {name for name in (*GEMMA3, "global_every", "query_scalar") if getattr(config, name) != plain[name]}
  if not traits:
    return {}
  missing = [name for name, value in GEMMA3.items() if getattr(config, name) != value]
  if missing or config.attention_bias or not config.global_every:
    raise UserError(
      f"export: no known model type has {', '.join(sorted(traits))} without {', '.join(missing) or 'local layers'}"
    )
  return {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": config.query_scalar or config.head_dim,
    "layer_types": _layer_types(config.global_every, config.num_layers),
    "rope_local_base_freq": config.local_rope_theta,
  }


def _max_positions(scaling: dict[str, Any]) -> int:
  return int(scaling.get("original_max_position_embeddings", 8192) * scaling.get("factor", 1))


def _rope(values: dict[str, Any], origin: str) -> tuple[float, tuple[tuple[str, object], ...] | None]:
  """Rotary base and scaling; `rope_parameters` is the newer spelling of `rope_theta` and `rope_scaling`."""
  given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
  theta = float(given.pop("rope_theta", None) or values.get("rope_theta") or 10000.0)
  kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
  if kind not in ROPE_KINDS or any(isinstance(value, dict) for value in given.values()):
    raise UserError(f"{origin}: rotary scaling {kind!r} is not supported; known: {', '.join(ROPE_KINDS)}")
  absent = [key for key in ROPE_KEYS[kind] if key not in given]
  if absent:
    raise UserError(f"{origin}: rotary scaling {kind} needs {', '.join(absent)}")
  if given.get("partial_rotary_factor", 1) != 1:
    raise UserError(f"{origin}: partial_rotary_factor {given['partial_rotary_factor']} is not supported; it must be 1")
  if kind == "default":
    return theta, None
  return theta, tuple(sorted([("rope_type", kind), *((key, given[key]) for key in ROPE_KEYS[kind])]))
