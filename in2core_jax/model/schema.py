"""What the keys of a config.json and of a GGUF header may hold: one table each, checked before anything is allocated.

A key that is in no table is for `hf_config` and `gguf_config`: refused where it changes what a model computes, told
where nobody here knows it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from in2core_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a value must be: `test` says whether it is, `words` says it to a person."""

  words: str
  test: Callable[[Any], bool]


def _is_whole(value: Any, low: int, high: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_real(value: Any, low: float, high: float) -> bool:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  return low <= value <= high and math.isfinite(value)


def whole(low: int, high: int) -> Kind:
  """A whole number in a range; no bool, no float."""
  return Kind(f"a whole number from {low} to {high}", lambda value: _is_whole(value, low, high))


def real(low: float, high: float) -> Kind:
  """A finite number in a range; no bool."""
  return Kind(f"a number from {low:g} to {high:g}", lambda value: _is_real(value, low, high))


def or_null(kind: Kind) -> Kind:
  """The same, or null."""
  return Kind(f"{kind.words}, or null", lambda value: value is None or kind.test(value))


def list_of(kind: Kind, words: str) -> Kind:
  """A list of it."""
  return Kind(words, lambda value: isinstance(value, list) and all(map(kind.test, value)))


def one_of(*words: str) -> Kind:
  """One of some words."""
  return Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


TEXT = Kind("a text", lambda value: isinstance(value, str))
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
_WIDTH, _LAYERS, _HEADS, _VOCABULARY = 2**20, 2**12, 2**14, 2**24
_POSITIONS = whole(1, 2**40)
_THETA = real(1, 1e15)
_EPSILON = real(1e-30, 0.999)
_MULTIPLIER = real(1e-6, 1e6)
_ID = whole(-1, _VOCABULARY)  # -1: none, in old exports
_IDS = Kind(
  "a token id, a list of token ids, or null",
  lambda value: value is None or _ID.test(value) or (isinstance(value, list) and all(map(_ID.test, value))),
)
_DTYPE = or_null(one_of("float32", "float16", "bfloat16", "float64", "auto", "torch.float32", "torch.bfloat16"))

CONFIG: dict[str, Kind] = {
  "vocab_size": whole(1, _VOCABULARY),
  "hidden_size": whole(1, _WIDTH),
  "intermediate_size": whole(1, _VOCABULARY),
  "num_hidden_layers": whole(1, _LAYERS),
  "num_attention_heads": whole(1, _HEADS),
  "num_key_value_heads": or_null(whole(1, _HEADS)),
  "head_dim": or_null(whole(2, _HEADS)),
  "rms_norm_eps": _EPSILON,
  "rope_theta": or_null(_THETA),
  "rope_local_base_freq": _THETA,
  "rope_scaling": or_null(OBJECT),
  "rope_parameters": or_null(OBJECT),
  "sliding_window": or_null(_POSITIONS),
  "sliding_window_pattern": whole(1, _LAYERS),
  "max_window_layers": or_null(whole(0, _LAYERS)),
  "query_pre_attn_scalar": real(1e-3, _WIDTH),
  "max_position_embeddings": or_null(_POSITIONS),
  "tie_word_embeddings": TRUTH,
  "attention_bias": or_null(TRUTH),
  "mlp_bias": or_null(TRUTH),
  "use_sliding_window": or_null(TRUTH),
  "use_bidirectional_attention": or_null(TRUTH),
  "partial_rotary_factor": or_null(real(0, 1)),
  "original_max_position_embeddings": or_null(_POSITIONS),
  "embedding_multiplier": or_null(_MULTIPLIER),
  "residual_multiplier": or_null(_MULTIPLIER),
  "attention_multiplier": or_null(_MULTIPLIER),
  "logits_scaling": or_null(_MULTIPLIER),
  "final_logit_softcapping": or_null(_MULTIPLIER),
  "attn_logit_softcapping": or_null(_MULTIPLIER),
  "attention_out_bias": or_null(TRUTH),
  "use_bias": or_null(TRUTH),
  "qkv_bias": or_null(TRUTH),
  "num_experts": or_null(whole(0, _HEADS)),
  "num_local_experts": or_null(whole(0, _HEADS)),
  "num_experts_per_tok": or_null(whole(0, _HEADS)),
  "shared_expert_intermediate_size": whole(0, _VOCABULARY),
  "shared_intermediate_size": whole(0, _VOCABULARY),
  "moe_intermediate_size": whole(1, _VOCABULARY),
  "norm_topk_prob": or_null(TRUTH),
  "n_routed_experts": or_null(whole(0, _HEADS)),
  "n_shared_experts": or_null(whole(0, _HEADS)),
  "n_group": or_null(whole(1, _HEADS)),
  "topk_group": or_null(whole(1, _HEADS)),
  "routed_scaling_factor": or_null(_MULTIPLIER),
  "rotary_dim": or_null(whole(2, _HEADS)),
  "use_qk_norm": or_null(TRUTH),
  "clip_qkv": or_null(_MULTIPLIER),
  "swiglu_limit": or_null(_MULTIPLIER),
  "swiglu_alpha": or_null(_MULTIPLIER),
  "no_rope_layers": or_null(list_of(whole(0, 1), "a list of 0 and 1")),
  "no_rope_layer_interval": whole(1, _LAYERS),
  "layer_types": or_null(
    list_of(one_of("full_attention", "sliding_attention"), "a list of full_attention and sliding_attention")
  ),
  "architectures": or_null(list_of(TEXT, "a list of names")),
  "hidden_act": TEXT,
  "hidden_activation": TEXT,
  "torch_dtype": _DTYPE,
  "dtype": _DTYPE,
  "bos_token_id": _IDS,
  "eos_token_id": _IDS,
  "pad_token_id": _IDS,
  "initializer_range": or_null(real(0, 1e3)),
  "attention_dropout": or_null(real(0, 1)),
  "pretraining_tp": or_null(whole(1, _HEADS)),
  "use_cache": or_null(TRUTH),
}
ROPE: dict[str, Kind] = {
  "rope_type": or_null(TEXT),
  "type": or_null(TEXT),
  "rope_theta": or_null(_THETA),
  "factor": real(1e-6, 1e6),
  "low_freq_factor": real(1e-6, 1e6),
  "high_freq_factor": real(1e-6, 1e6),
  "original_max_position_embeddings": _POSITIONS,
  "max_position_embeddings": or_null(_POSITIONS),
  "partial_rotary_factor": or_null(real(0, 1)),
  "attention_factor": or_null(real(1e-6, 1e6)),
  "beta_fast": or_null(real(1e-6, 1e6)),
  "beta_slow": or_null(real(1e-6, 1e6)),
  "mscale": or_null(real(0, 1e6)),
  "mscale_all_dim": or_null(real(0, 1e6)),
  "truncate": or_null(TRUTH),
  "short_factor": list_of(real(1e-6, 1e6), "a list of numbers"),
  "long_factor": list_of(real(1e-6, 1e6), "a list of numbers"),
}
# Keys of a GGUF header behind "ARCHITECTURE.".
GGUF: dict[str, Kind] = {
  "block_count": whole(1, _LAYERS),
  "embedding_length": whole(1, _WIDTH),
  "feed_forward_length": whole(1, _VOCABULARY),
  "context_length": _POSITIONS,
  "vocab_size": whole(1, _VOCABULARY),
  "attention.head_count": whole(1, _HEADS),
  "attention.head_count_kv": whole(1, _HEADS),
  "attention.key_length": whole(2, _HEADS),
  "attention.value_length": whole(2, _HEADS),
  "attention.key_length_swa": whole(2, _HEADS),
  "attention.value_length_swa": whole(2, _HEADS),
  "attention.layer_norm_rms_epsilon": _EPSILON,
  "attention.sliding_window": _POSITIONS,
  "attention.scale": real(1e-9, 1e3),
  "rope.dimension_count": whole(2, _HEADS),
  "rope.dimension_count_swa": whole(2, _HEADS),
  "rope.freq_base": _THETA,
  "rope.freq_base_swa": _THETA,
  "rope.scaling.type": TEXT,
  "rope.scaling.factor": real(1e-6, 1e6),
  "rope.scaling.original_context_length": _POSITIONS,
  "rope.scaling.attn_factor": real(1e-6, 1e6),
  "expert_count": whole(0, _HEADS),
  "expert_used_count": whole(0, _HEADS),
  "expert_feed_forward_length": whole(1, _VOCABULARY),
  "expert_shared_feed_forward_length": whole(1, _VOCABULARY),
}
_TEXTS = list_of(TEXT, "a list of texts")
_TOKEN = whole(0, _VOCABULARY)
# Keys of a GGUF header under their full names.
GGUF_GENERAL: dict[str, Kind] = {
  "general.architecture": TEXT,
  "general.type": TEXT,
  "general.alignment": Kind(
    "a multiple of 8 up to 1048576", lambda value: _is_whole(value, 8, 2**20) and value % 8 == 0
  ),
  "split.count": whole(0, 2**16),
  "tokenizer.ggml.model": TEXT,
  "tokenizer.ggml.pre": TEXT,
  "tokenizer.ggml.tokens": _TEXTS,
  "tokenizer.ggml.merges": _TEXTS,
  "tokenizer.ggml.token_type": list_of(whole(0, 255), "a list of kinds of tokens"),
  "tokenizer.ggml.scores": list_of(real(-1e30, 1e30), "a list of finite numbers"),
  "tokenizer.ggml.bos_token_id": _TOKEN,
  "tokenizer.ggml.eos_token_id": _TOKEN,
  "tokenizer.ggml.eot_token_id": _TOKEN,
  "tokenizer.ggml.padding_token_id": _TOKEN,
  "tokenizer.ggml.unknown_token_id": _TOKEN,
  "tokenizer.ggml.add_space_prefix": TRUTH,
  "tokenizer.chat_template": TEXT,
}


def check(values: Mapping[str, Any], table: Mapping[str, Kind], origin: str, prefix: str = "") -> None:
  """Refuses the first value that is not what its row of the table says; keys without a row are not looked at.

  Args:
    values: key -> value.
    table: key without `prefix` -> kind.
    origin: where the values came from, for messages.
    prefix: of the keys in `values`.

  Raises:
    UserError: it names key, value and what would be right.
  """
  for key, kind in table.items():
    if prefix + key in values and not kind.test(values[prefix + key]):
      raise UserError(
        f"{origin}: {prefix}{key} is {shown(values[prefix + key])}; it must be {kind.words}: correct it or fetch the "
        "file again"
      )


def shown(value: Any) -> str:
  """A value of a file, short enough for a line and without control characters."""
  if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**200:
    return "a whole number of more than 60 digits"
  text = ascii(value[:3] if isinstance(value, list) else value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def plain(name: str) -> str:
  """A name of a file, as it is where it can be printed."""
  return name if name.isprintable() else ascii(name)
