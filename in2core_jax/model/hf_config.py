"""The decoder's shape from, and to, a Hugging Face config.json; refuses what would not map exactly."""

import dataclasses
import difflib
import json
import pathlib
import re
from typing import Any

from in2core_jax.errors import UserError, how_many
from in2core_jax.model import hf_options, model_files, quantised, schema
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.families import FAMILIES, GEMMA3, TEXT_PARTS, Family
from in2core_jax.model.hf_rope import by_kind_of_layer, read_rope
from in2core_jax.model.schema import plain, shown

# Key -> the only values under which this decoder computes the same as the model (None: absent or null).
ONLY = {
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
  "n_shared_experts": (0, None),
  "first_k_dense_replace": (0, None),
  "scoring_func": ("softmax", None),
  "num_experts_per_tok": (0, None),
  "mlp_only_layers": ([], None),
  "decoder_sparse_step": (1, None),
  "swiglu_limit": (None,),
  "qk_norm": (False, None),
  "use_qk_norm": (False, None),
  "clip_qkv": (None,),
  "use_bias": (False, None),
  "qkv_bias": (False, None),
  "attention_out_bias": (False, None),
  "no_rope_layers": (None,),
  "no_rope_layer_interval": (None,),
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
# Keys that say nothing about what is computed; what is in no table is told.
HARMLESS = re.compile(
  r"(_.*|model_type|model_name|transformers.*|unsloth.*|.*(bos|eos|pad|sep|unk|cls|mask)_token_id|use_cache"
  r"|cache_implementation|attn_implementation|torchscript|output_.*|return_.*|id2label|label2id|problem_type|num_labels"
  r"|router_aux_loss_coef|router_jitter_noise|task_specific_params|finetuning_task|tokenizer_class|prefix|is_llama_config|is_decoder|use_bfloat16"
  r"|decoder_start_token_id|max_length|min_length|do_sample|temperature|top_k|top_p|repetition_penalty|num_beams"
  r"|residual_dropout|resid_pdrop|embd_pdrop|chunk_size_feed_forward|tie_encoder_decoder|max_window_layers|sliding_window|hidden_act|hidden_activation)"
)
_REMEDIES = {
  "quantization_config": ": a quantised checkpoint; use the unquantised one, or save it dequantised",
  "quantization": ": a quantised checkpoint; use the unquantised one, or save it dequantised",
  "text_config": ": a multimodal model; save its text part as a separate model",
  "vision_config": ": a multimodal model; save its text part as a separate model",
  "audio_config": ": a multimodal model; save its text part as a separate model",
}


def read_config(path: pathlib.Path) -> ModelConfig:
  """Reads a config.json.

  Raises:
    UserError: no such file, broken JSON, or a model that this decoder does not express exactly.
  """
  values = model_files.read_object(path, "a Hugging Face folder has a config.json beside its weights")
  config = parse_config(quantised.without(values, str(path)), str(path))
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
  values, origin = _text_part(values, origin)
  kind, family = _family(values, origin)
  given = hf_options.one_spelling(values, family, origin)
  values = family.defaults | given
  _check_values(values, kind, origin)
  heads, shared, head_dim = _heads(values, origin)
  fields = {
    "intermediate_size": values["intermediate_size"],
    **family.traits,
    **hf_options.read_options(values, family),
  }
  if fields.get("num_experts") == 0:
    raise UserError(f"{origin}: a model of the type {kind} without experts is not supported; save it as a dense one")
  if kind == "gemma3_text":
    values, more = _read_gemma3(values, origin)
  else:
    values, more = _layers(values, kind, origin)
  theta, scaling, rotary_dim = read_rope(values, family, head_dim, origin)
  return ModelConfig(
    vocab_size=values["vocab_size"],
    hidden_size=values["hidden_size"],
    num_layers=values["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=shared,
    head_dim=head_dim,
    rope_theta=theta,
    rms_eps=float(values["rms_norm_eps"]),
    tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    rope_scaling=scaling,
    rotary_dim=None if rotary_dim == head_dim else rotary_dim,
    carried=carry({key: given[key] for key in hf_options.kept(family) if key in given}, None),
    model_type=kind,
    **(fields | more),
  )


def _family(values: dict[str, Any], origin: str) -> tuple[str, Family]:
  """The model type and what is known of it."""
  kind = values.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise UserError(
      f"{origin}: model_type {shown(kind)} is not supported; known: {', '.join(FAMILIES)}{_hint(values, kind)}"
    )
  return kind, FAMILIES[kind]


def _check_values(values: dict[str, Any], kind: str, origin: str) -> None:
  """Refuses missing keys, values out of their range, and options that the decoder does not have."""
  need = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
  absent = [key for key in need if values.get(key) is None]
  if absent:
    raise UserError(f"{origin}: {', '.join(absent)} must be given as a whole number")
  schema.check(values, schema.CONFIG, origin)
  _refuse_others(values, kind, origin)


def _heads(values: dict[str, Any], origin: str) -> tuple[int, int, int]:
  """(query heads, key heads, entries of a head)."""
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
  return heads, shared, head_dim


def _text_part(values: dict[str, Any], origin: str) -> tuple[dict[str, Any], str]:
  """The keys of the language model in a model of several parts, and where they stand; other ones as they are."""
  part, kind = TEXT_PARTS.get(values.get("model_type") if isinstance(values.get("model_type"), str) else "", ("", ""))
  inner = values.get(part)
  if not part or inner is None:
    return values, origin
  if not isinstance(inner, dict):
    raise UserError(f"{origin}: {part} is {shown(inner)}; it must be an object")
  model_files.say(f"{origin}: of the multimodal model {values['model_type']} the text part alone is read")
  kept = {key: values[key] for key in (*hf_options.KEPT, "tie_word_embeddings", "quantization_config") if key in values}
  return kept | {"model_type": kind} | inner, f"{origin}: {part}"


def _hint(values: dict[str, Any], kind: Any) -> str:
  """What to do about a model type that is not read."""
  if "peft_type" in values:
    return "; it is a LoRA adapter: merge it into its base model"
  if "text_config" in values or "vision_config" in values:
    return "; it is a multimodal model: save its text part as a separate model"
  if isinstance(kind, str) and re.search("moe|deepseek|llama4|dbrx|minimax|dots1|bailing|grok", kind):
    near = [name for name, family in FAMILIES.items() if "num_experts_per_tok" in family.options]
    closest = difflib.get_close_matches(kind, near, n=1, cutoff=0)[0]
    if re.search("glm4_moe|dots1|ernie4_5_moe|afmoe|exaone_moe", kind):
      return (
        "; its first layers have no experts, and here all layers must be equal: the closest that works is solar_open"
      )
    return f"; of its mixture of experts this decoder lacks an option, and the closest that works is {closest}"
  near = difflib.get_close_matches(kind, FAMILIES, n=1, cutoff=0.5) if isinstance(kind, str) else []
  return f"; the closest that works is {near[0]}" if near else ""


def _refuse_others(values: dict[str, Any], kind: str, origin: str) -> None:
  """Refuses options that this decoder does not have; tells of keys that nobody here knows."""
  family = FAMILIES[kind]
  only = ONLY | {"hidden_act": (*family.activation, None)}
  if family.activation_key != "hidden_act":  # which is not read then
    only |= {"hidden_act": (*family.activation, "silu", None), family.activation_key: tuple(family.activation)}
  read = {*family.options, *(["partial_rotary_factor"] if family.partial_rotary else [])}
  read |= {"use_sliding_window"} if _may_use_window(family) else set()
  read |= {"no_rope_layers", "no_rope_layer_interval"} if family.window == "unrotated" else set()
  if family.traits.get("sigmoid_gates"):
    only |= {"scoring_func": ("sigmoid", None), "use_routing_bias": (True, None)}
  only = {key: allowed for key, allowed in only.items() if key not in read}
  for key, allowed in only.items():
    value = values.get(key)
    if value not in allowed or (isinstance(value, bool) and not any(value is one for one in allowed)):
      raise UserError(
        f"{origin}: {key} {shown(value)} is not supported; this decoder computes {key} {allowed[0]!r} "
        f"only{_REMEDIES.get(key, '')}"
      )
  _check_kind(values, kind, origin)
  known = schema.CONFIG.keys() | only.keys() | family.defaults.keys() | read
  strange = sorted(key for key in values if key not in known and not HARMLESS.fullmatch(key))
  if values.get("attention_dropout"):
    strange.append(f"attention_dropout {values['attention_dropout']} (nothing is dropped)")
  if kind == "llama" and values.get("sliding_window"):
    strange.append("sliding_window (the type llama has none)")
  if strange:
    more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
    names = ", ".join(map(plain, strange[:8]))
    model_files.say(f"{origin}: keys without effect here: {names}{more}")


def _may_use_window(family: Family) -> bool:
  """Whether a key says that the window is in use."""
  return family.window in ("late", "unrotated") or "use_sliding_window" in family.defaults


def _window(values: dict[str, Any], family: Family) -> int | None:
  """The window that is in use."""
  return None if _may_use_window(family) and not values.get("use_sliding_window") else values.get("sliding_window")


def _check_kind(values: dict[str, Any], kind: str, origin: str) -> None:
  """Refuses a class without language-model head and kinds of layers that the family does not have."""
  family, named = FAMILIES[kind], values.get("architectures")
  if named and family.architecture.lower() not in [name.lower() for name in named]:
    raise UserError(
      f"{origin}: architectures {shown(named)} is not {family.architecture}, the language model of "
      f"{kind}; save the model with its language-model head"
    )
  layers = values.get("layer_types")
  if layers is not None and len(layers) != values["num_hidden_layers"]:
    raise UserError(f"{origin}: layer_types names {how_many(len(layers), 'layer')} of {values['num_hidden_layers']}")
  if family.window in ("none", "all") and layers:
    if len(set(layers)) > 1:
      raise UserError(
        f"{origin}: layer_types mixes {sorted(set(layers))}; all layers must have the same kind of attention"
      )
    window = _window(values, family) if family.window == "all" else None
    if ("sliding_attention" in layers) != (window is not None):
      raise UserError(f"{origin}: layer_types says {layers[0]} of every layer, but the window of {kind} is {window}")


def _read_gemma3(values: dict[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """(values whose rotary keys are those of the global layers alone, the fields of `ModelConfig` that Llama lacks)."""
  values, local_theta = by_kind_of_layer(values, values["rope_local_base_freq"], origin)
  return values, GEMMA3 | {
    "sliding_window": values["sliding_window"],
    "global_every": _global_every(values, origin),
    "local_rope_theta": float(local_theta),
    "query_scalar": float(values["query_pre_attn_scalar"]),
  }


def _layers(values: dict[str, Any], kind: str, origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """(values whose rotary keys are those of the global layers, fields of `ModelConfig` about what differs by layer)."""
  family, count, fields, theta = FAMILIES[kind], values["num_hidden_layers"], {}, None
  if family.local_angles:
    values, theta = by_kind_of_layer(values, family.defaults["rope_theta"], origin)
  if family.window == "none":
    return values, fields
  window, unrotated = _window(values, family), [False] * count
  if family.window == "all":
    return values, {"sliding_window": window}
  if family.window == "unrotated":
    every, listed = values["no_rope_layer_interval"], values.get("no_rope_layers")
    unrotated = [(layer + 1) % every == 0 for layer in range(count)] if listed is None else [not one for one in listed]
    if len(unrotated) < count:
      raise UserError(f"{origin}: no_rope_layers names {how_many(len(unrotated), 'layer')} of {count}")
    fields["unrotated"] = tuple(unrotated)
  kinds = values.get("layer_types")
  if kinds is not None:
    local = [name == "sliding_attention" for name in kinds]
  elif window is None:
    local = [False] * count
  else:
    local = _local_by_rule(family, values, unrotated)
  if any(local) and window is None:
    raise UserError(f"{origin}: layer_types says sliding_attention, but there is no sliding_window in use; remove one")
  own = {"sliding_window": window, "local": tuple(local), "local_rope_theta": theta}
  return values, fields | (own if any(local) else {})


def _local_by_rule(family: Family, values: dict[str, Any], unrotated: list[bool]) -> list[bool]:
  """Which layers are local where layer_types does not say it."""
  layers = range(values["num_hidden_layers"])
  if family.window == "late":
    return [layer >= (values["max_window_layers"] or 0) for layer in layers]
  if family.window == "unrotated":
    return unrotated[: len(layers)]
  return [family.every == 0 or (layer + 1) % family.every != 0 for layer in layers]


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

  The model type is that of the source, or the first of `FAMILIES` whose keys mean this very configuration.

  Raises:
    UserError: a configuration that no known model type expresses.
  """
  lost: dict[str, list[str]] = {}
  names = [field.name for field in dataclasses.fields(ModelConfig) if field.compare]
  for kind in dict.fromkeys([*([config.model_type] if config.model_type else []), *FAMILIES]):
    values = _write(config, kind, dtype)
    try:
      read = parse_config(values, "export")
    except UserError:
      continue
    read, wanted = (_shortest_period(one) for one in (read, config))
    lost[kind] = [name for name in names if getattr(read, name) != getattr(wanted, name)]
    if not lost[kind]:
      return values
  near = min(lost, key=lambda kind: len(lost[kind]), default="llama")
  differ = ", ".join(lost.get(near, ["its sizes"]))
  raise UserError(f"export: no known model type has all options of this model; the closest, {near}, differs: {differ}")


def _shortest_period(config: ModelConfig) -> ModelConfig:
  """The same model, where it has fewer layers than the period of its global ones."""
  every = config.global_every and min(config.global_every, config.num_layers + 1)
  return dataclasses.replace(config, global_every=every)


def _write(config: ModelConfig, kind: str, dtype: str) -> dict[str, Any]:
  """What a config.json of that type can say of the configuration."""
  family = FAMILIES[kind]
  values = {
    "architectures": [family.architecture],
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
    "rope_scaling": None,
    "sliding_window": None if family.window == "none" else config.sliding_window,
    "tie_word_embeddings": config.tie_embeddings,
    "torch_dtype": dtype,
    **(json.loads(config.carried)["config"] if config.carried else {}),
  }
  if kind == "gemma3_text":
    values |= _write_gemma3(config)
  else:
    word = {ours: theirs for theirs, ours in reversed(family.activation.items())}.get(config.activation)
    values |= {family.activation_key: word or next(iter(family.activation))}
    values |= hf_options.write_options(config, family) | _write_layers(config, family)
  return values | _write_rope(config, family)


def _write_layers(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Keys about what differs by layer."""
  found: dict[str, Any] = {}
  if family.window == "unrotated":
    unrotated = config.unrotated or (False,) * config.num_layers
    found["no_rope_layers"] = [int(not one) for one in unrotated]
  local = config.local or (config.sliding_window is not None,) * config.num_layers
  if _may_use_window(family) and config.sliding_window is not None and any(local):
    found["use_sliding_window"] = True
  if family.window == "late" and any(local):
    found["max_window_layers"] = local.index(True)
  if family.window == "every" or (family.window != "all" and "use_sliding_window" in found):
    found["layer_types"] = ["sliding_attention" if one else "full_attention" for one in local]
  return found


def _write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Rotary keys, in the spelling that the family's own releases have."""
  scaling = {key: list(value) if isinstance(value, tuple) else value for key, value in config.rope_scaling or ()}
  found: dict[str, Any] = {}
  if scaling.get("rope_type") in ("dynamic", "longrope"):
    length = scaling.pop("max_position_embeddings", None)
    found |= {} if length is None else {"max_position_embeddings": length}
  if family.partial_rotary:
    rotated = config.rotary_dim or config.head_dim
    found |= {} if rotated == config.head_dim else {"partial_rotary_factor": rotated / config.head_dim}
    if scaling:
      found["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings", None)
      scaling["type"] = scaling.pop("rope_type")  # the one word that older readers of these models know
  if family.local_angles:
    near = {"rope_type": "default", "rope_theta": config.local_rope_theta if config.local else config.rope_theta}
    far = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    return {"rope_parameters": {"sliding_attention": near, "full_attention": far}, "rope_theta": config.rope_theta}
  return found | {"rope_scaling": scaling or None}


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
  """The keys that only Gemma 3 has."""
  scalar = config.query_scalar or config.head_dim
  return {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
    "layer_types": _layer_types(config.global_every or 1, config.num_layers),
    "rope_local_base_freq": config.local_rope_theta or config.rope_theta,
  }
