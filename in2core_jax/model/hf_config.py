"""The decoder's shape from, and to, a Hugging Face config.json; refuses what would not map exactly."""

import dataclasses
import json
import pathlib
import re
from typing import Any

from in2core_jax.errors import UserError
from in2core_jax.model import model_files, schema
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.schema import plain, shown

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
  "quantization": (None,),
  # Of other families. transformers' own classes of the types above do not read them: who wrote them meant something.
  "rope_interleaved": (False, None),
  "embedding_multiplier": (1, None),
  "residual_multiplier": (1, None),
  "logits_scaling": (1, None),
  "logit_scale": (1, None),
  "attention_multiplier": (None,),
  "num_experts": (0, None),
  "num_local_experts": (0, None),
  "n_routed_experts": (0, None),
  "num_experts_per_tok": (0, None),
  "qk_norm": (False, None),
  "use_qk_norm": (False, None),
  "clip_qkv": (None,),
  "alibi": (False, None),
  "is_encoder_decoder": (False, None),
  "is_causal": (True, None),
  "add_cross_attention": (False, None),
  "pruned_heads": ({}, None),
  "final_logit_softcapping": (None,),
  "attn_logit_softcapping": (None,),
  "use_bidirectional_attention": (False, None),
  "text_config": (None,),
  "vision_config": (None,),
  "audio_config": (None,),
}
ONLY_GEMMA3 = {"hidden_activation": ("gelu_pytorch_tanh",)}
# Keys that say nothing about what is computed; what is in no table is told.
HARMLESS = re.compile(
  r"(_.*|model_type|model_name|transformers.*|unsloth.*|.*(bos|eos|pad|sep|unk|cls|mask)_token_id|use_cache"
  r"|cache_implementation|attn_implementation|torchscript|output_.*|return_.*|id2label|label2id|problem_type|num_labels"
  r"|task_specific_params|finetuning_task|tokenizer_class|prefix|is_llama_config|is_decoder|use_bfloat16"
  r"|decoder_start_token_id|max_length|min_length|do_sample|temperature|top_k|top_p|repetition_penalty|num_beams"
  r"|chunk_size_feed_forward|tie_encoder_decoder|max_window_layers|sliding_window|hidden_act|hidden_activation)"
)
KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # no computation uses them
_REMEDIES = {
  "quantization_config": ": a quantised checkpoint; use the unquantised one, or save it dequantised",
  "quantization": ": a quantised checkpoint; use the unquantised one, or save it dequantised",
  "text_config": ": a multimodal model; save its text part as a model of its own",
  "vision_config": ": a multimodal model; save its text part as a model of its own",
  "audio_config": ": a multimodal model; save its text part as a model of its own",
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
  values = model_files.read_object(path, "a Hugging Face folder has a config.json beside its weights")
  config = parse_config(values, str(path))
  beside = path.parent / "generation_config.json"
  if path.name == "config.json" and beside.is_file():
    generation = model_files.read_object(beside, "fetch it")
    config = dataclasses.replace(config, carried=carry(json.loads(config.carried)["config"], generation))
  return config


def carry(config: dict[str, Any], generation: dict[str, Any] | None) -> str:
  """What export writes back, as `ModelConfig.carried`: keys of config.json, and generation_config.json or None."""
  return json.dumps({"config": config, "generation_config": generation})


def parse_config(values: dict[str, Any], origin: str) -> ModelConfig:
  """The decoder's shape from the keys of a config.json (either spelling of the rotary keys).

  Args:
    values: the parsed JSON.
    origin: where it came from, for messages.

  Raises:
    UserError: unknown model type, missing keys, or options that the decoder does not have.
  """
  kind = values.get("model_type")
  if not isinstance(kind, str) or kind not in DEFAULTS:
    parts = "text_config" in values or "vision_config" in values
    hint = "; it is a multimodal model: save its text part as a model of its own" if parts else ""
    hint = "; it is a LoRA adapter: merge it into its base model" if "peft_type" in values else hint
    raise UserError(f"{origin}: model_type {shown(kind)} is not supported; known: {', '.join(DEFAULTS)}{hint}")
  given, values = values, DEFAULTS[kind] | values
  need = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
  absent = [key for key in need if values.get(key) is None]
  if absent:
    raise UserError(f"{origin}: {', '.join(absent)} must be given as a whole number")
  schema.check(values, schema.CONFIG, origin)
  _refuse_others(values, kind, origin)
  heads = values["num_attention_heads"]
  if values.get("head_dim") is None and values["hidden_size"] % heads:
    raise UserError(f"{origin}: hidden_size {values['hidden_size']} is not a multiple of {heads} heads; give head_dim")
  shared, head_dim = (
    values.get("num_key_value_heads") or heads,
    values.get("head_dim") or values["hidden_size"] // heads,
  )
  if heads % shared:
    raise UserError(f"{origin}: num_key_value_heads: {heads} heads cannot share {shared} key-value heads evenly")
  if head_dim % 2:
    raise UserError(f"{origin}: head_dim {head_dim} is odd; rotary embeddings need pairs")
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
    num_kv_heads=shared,
    head_dim=head_dim,
    rope_theta=theta,
    rms_eps=float(values["rms_norm_eps"]),
    tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    rope_scaling=scaling,
    attention_bias=kind == "qwen2",
    carried=carry({key: given[key] for key in KEPT if key in given}, None),
    **family,
  )


def _refuse_others(values: dict[str, Any], kind: str, origin: str) -> None:
  """Refuses options that this decoder does not have; tells of keys that nobody here knows."""
  only = ONLY | (ONLY_GEMMA3 if kind == "gemma3_text" else {})
  for key, allowed in only.items():
    value = values.get(key)
    if value not in allowed or (isinstance(value, bool) and not any(value is one for one in allowed)):
      raise UserError(
        f"{origin}: {key} {shown(value)} is not supported; this decoder computes {key} {allowed[0]!r} "
        f"only{_REMEDIES.get(key, '')}"
      )
  named = values.get("architectures")
  if named and ARCHITECTURES[kind].lower() not in [name.lower() for name in named]:
    raise UserError(
      f"{origin}: architectures {shown(named)} is not {ARCHITECTURES[kind]}, the language model of "
      f"{kind}; save the model with its language-model head"
    )
  layers = values.get("layer_types")
  if layers is not None and len(layers) != values["num_hidden_layers"]:
    raise UserError(f"{origin}: layer_types names {len(layers)} layers of {values['num_hidden_layers']}")
  if kind != "gemma3_text" and len(set(layers or ())) > 1:
    raise UserError(f"{origin}: layer_types mixes {sorted(set(layers))}; all layers must attend alike")
  window = values["sliding_window"] if kind == "mistral" else None
  if kind != "gemma3_text" and layers and ("sliding_attention" in layers) != (window is not None):
    raise UserError(f"{origin}: layer_types says {layers[0]} of every layer, but the window of {kind} is {window}")
  known = schema.CONFIG.keys() | only.keys() | DEFAULTS[kind].keys()
  strange = sorted(key for key in values if key not in known and not HARMLESS.fullmatch(key))
  if values.get("attention_dropout"):
    strange.append(f"attention_dropout {values['attention_dropout']} (nothing is dropped)")
  if kind == "llama" and values.get("sliding_window"):
    strange.append("sliding_window (the type llama has none)")
  if strange:
    more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
    names = ", ".join(map(plain, strange[:8]))
    model_files.say(f"{origin}: keys without effect here: {names}{more}")


def _read_gemma3(values: dict[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """(values whose rotary keys are those of the global layers alone, the fields of `ModelConfig` that Llama lacks)."""
  local_theta, rope = values["rope_local_base_freq"], values.get("rope_parameters") or {}
  if rope:  # the newer spelling has a dictionary for each kind of layer
    near, far = (rope.get(kind) or {} for kind in ("sliding_attention", "full_attention"))
    if not isinstance(near, dict) or not isinstance(far, dict):
      raise UserError(f"{origin}: rope_parameters {shown(rope)} must hold an object for each kind of layer")
    schema.check(near, schema.ROPE, f"{origin}: sliding_attention")
    strange = set(rope) - {"sliding_attention", "full_attention"} or set(near) - {"rope_type", "rope_theta"}
    if strange or near.get("rope_type", "default") != "default" or values.get("rope_scaling"):
      raise UserError(
        f"{origin}: rope_parameters {shown(rope)} is not supported; it must have sliding_attention, unscaled, and "
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
  every = (kinds.index("full_attention") if "full_attention" in kinds else count) + 1
  if kinds == _layer_types(every, count):
    return every
  raise UserError(
    f"{origin}: layer_types {shown(kinds)} is not supported; every n-th of {count} layers must be full_attention"
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
    "torch_dtype": dtype,
    **(json.loads(config.carried)["config"] if config.carried else {}),
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
  scalar = config.query_scalar or config.head_dim
  if scalar != int(scalar):
    raise UserError(f"export: query_pre_attn_scalar {scalar} is no whole number, which Gemma 3 asks for")
  return {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": int(scalar),
    "layer_types": _layer_types(config.global_every, config.num_layers),
    "rope_local_base_freq": config.local_rope_theta,
  }


def _rope(values: dict[str, Any], origin: str) -> tuple[float, tuple[tuple[str, object], ...] | None]:
  """Rotary base and scaling; `rope_parameters` is the newer spelling of `rope_theta` and `rope_scaling`."""
  old, new = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
  given = dict(new or old)
  if any(isinstance(value, dict) for value in given.values()):
    raise UserError(f"{origin}: rotary scaling that differs between layers is not supported for this model type")
  schema.check(given, schema.ROPE, f"{origin}: rotary scaling")
  if old and new and any(old[key] != new[key] for key in old if key in new):
    raise UserError(f"{origin}: rope_scaling and rope_parameters say different things; remove one of them")
  theta = float(given.pop("rope_theta", None) or values.get("rope_theta") or 10000.0)
  kinds = {given.pop(key) for key in ("rope_type", "type") if key in given} - {None} or {"default"}
  kind = kinds.pop()
  if kind not in ROPE_KINDS or kinds:
    raise UserError(
      f"{origin}: rotary scaling {' and '.join(map(shown, [kind, *kinds]))} is not supported; known: "
      f"{', '.join(ROPE_KINDS)}"
    )
  absent = [key for key in ROPE_KEYS[kind] if key not in given]
  if absent:
    raise UserError(f"{origin}: rotary scaling {kind} needs {', '.join(absent)}")
  if given.get("partial_rotary_factor", 1) != 1:
    raise UserError(f"{origin}: partial_rotary_factor {given['partial_rotary_factor']} is not supported; it must be 1")
  strange = set(given) - {*ROPE_KEYS[kind], "partial_rotary_factor", "original_max_position_embeddings"}
  if strange:
    raise UserError(
      f"{origin}: rotary scaling {kind} has no {', '.join(map(ascii, sorted(strange)))}; known: {ROPE_KEYS[kind]}"
    )
  if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
    raise UserError(f"{origin}: rotary scaling llama3 needs a low_freq_factor below its high_freq_factor")
  if kind == "default":
    return theta, None
  return theta, tuple(sorted([("rope_type", kind), *((key, given[key]) for key in ROPE_KEYS[kind])]))
