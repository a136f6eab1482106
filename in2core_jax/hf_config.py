"""The decoder's shape from, and to, a Hugging Face config.json; refuses what would not map exactly."""

import json
import pathlib
from typing import Any

from in2core_jax.errors import UserError
from in2core_jax.model import ModelConfig

# What a config.json of that type means when the key is absent (transformers' own defaults), as far as we read it.
DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {"rms_norm_eps": 1e-6, "sliding_window": None},
  "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
  "qwen2": {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": None},
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Key -> the only values under which this decoder computes the same as the model (None: absent or null).
ONLY = {
  "hidden_act": ("silu", "swish", None),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "partial_rotary_factor": (1, 1.0, None),
  "use_sliding_window": (False, None),
  "quantization_config": (None,),
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
  for key, allowed in ONLY.items():
    if values.get(key) not in allowed:
      raise UserError(
        f"{origin}: {key} {values[key]!r} is not supported; this decoder computes {key} {allowed[0]!r} only"
      )
  if len(set(values.get("layer_types") or ())) > 1:
    raise UserError(f"{origin}: layer_types mixes {sorted(set(values['layer_types']))}; all layers must attend alike")
  need = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
  absent = [key for key in need if not isinstance(values.get(key), int)]
  if absent:
    raise UserError(f"{origin}: {', '.join(absent)} must be given as a whole number")
  values = DEFAULTS[kind] | values
  heads = values["num_attention_heads"]
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
    # Llama ignores the key; Qwen2 uses it only with use_sliding_window, which is refused above.
    sliding_window=values["sliding_window"] if kind == "mistral" else None,
  )


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """The keys of a config.json that `parse_config` and transformers read as `config`.

  Raises:
    UserError: a configuration that no known model type expresses.
  """
  if config.attention_bias and config.sliding_window:
    raise UserError("export: no known model type has both attention biases and a sliding window in all layers")
  kind = "qwen2" if config.attention_bias else "mistral" if config.sliding_window else "llama"
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
    "hidden_act": "silu",
    "rms_norm_eps": config.rms_eps,
    "rope_theta": config.rope_theta,
    "rope_scaling": scaling,
    "sliding_window": config.sliding_window,
    "tie_word_embeddings": config.tie_embeddings,
    # Rotary positions have no end; the key only bounds what other programs allow.
    "max_position_embeddings": _max_positions(scaling or {}),
    "torch_dtype": dtype,
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
