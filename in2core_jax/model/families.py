"""The model types that are read and written, as data: what their config.json means and how their tensors are named."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """What a config.json of one model_type means.

  Attributes:
    architecture: class of transformers that has the language-model head.
    defaults: key -> what it means when it is absent (transformers' own defaults), as far as we read it.
    traits: field of `ModelConfig` -> what all models of the family have.
    options: key -> fields of `ModelConfig` that hold its value.
    activation: word of config.json -> word of `decoder.ACTIVATIONS`; other words are refused.
    window: which layers are local: none; all; late (from max_window_layers on, if use_sliding_window); every (all but
      every n-th); unrotated (those without rotary positions, if use_sliding_window). `layer_types` says it too.
    every: n of "every", where neither sliding_window_pattern nor layer_types says it.
    local_angles: rotary parameters come for each kind of layer, and those of local layers are not scaled.
    partial_rotary: heads may be rotated in part.
    rope_kinds: kinds of rotary scaling, where not all are known to the family.
    rope_words: other words for kinds of rotary scaling.
    interleaved: rotary pairs are stored side by side, (2j, 2j + 1), in place of (j, j + half).
    fused: tensor name behind model.layers.N. -> leaves whose matrices lie in it, one after the other.
    paired: fused tensors hold entries of their leaves in turn along the last axis, and matrices are [in, out] there.
    names: leaf -> tensor name behind model.layers.N., where it is not that of most families; {e} is the expert.
  """

  architecture: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  options: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  activation: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"silu": "silu", "swish": "silu"})
  window: str = "none"
  every: int = 0
  local_angles: bool = False
  partial_rotary: bool = False
  rope_kinds: tuple[str, ...] | None = None
  rope_words: Mapping[str, str] = dataclasses.field(default_factory=dict)
  interleaved: bool = False
  fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  paired: bool = False
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def activation_key(self) -> str:
    """Which key of config.json names the activation."""
    return "hidden_activation" if "hidden_activation" in self.defaults else "hidden_act"


_EPS = {"rms_norm_eps": 1e-6}
_BIAS = {"attention_bias": ("attention_bias", "output_bias")}
_MLP_BIAS = {"mlp_bias": ("mlp_bias",)}
_GELU = {"gelu_pytorch_tanh": "gelu_tanh"}
_GEMMA = {"activation": "gelu_tanh", "norm_offset": 1.0, "scaled_embeddings": True}
# What sets Gemma 3 apart from Llama in every one of its models, as fields of `ModelConfig`.
GEMMA3 = {
  "activation": "gelu_tanh",
  "norm_offset": 1.0,
  "post_norms": True,
  "query_key_norms": True,
  "scaled_embeddings": True,
}
_GEMMA_SIZES = {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256}
_GEMMA_SIZES |= {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_OLMO2 = {"pre_norms": False, "post_norms": True, "query_key_norms": True, "wide_query_key_norms": True}
_CAPS = {"final_logit_softcapping": ("logit_cap",), "attn_logit_softcapping": ("score_cap",)}

_GATE_UP = ("layers/mlp/gate_proj/experts", "layers/mlp/up_proj/experts")
_DOWN = "layers/mlp/down_proj/experts"
_SHARED = tuple(f"layers/mlp/shared_{name}_proj/kernel" for name in ("gate", "up", "down"))
_MIXTRAL = {
  "layers/mlp/router/kernel": "block_sparse_moe.gate.weight",
  "layers/mlp/gate_proj/experts": "block_sparse_moe.experts.{e}.w1.weight",
  "layers/mlp/up_proj/experts": "block_sparse_moe.experts.{e}.w3.weight",
  "layers/mlp/down_proj/experts": "block_sparse_moe.experts.{e}.w2.weight",
}
_PER_TOKEN = {"num_experts_per_tok": ("experts_per_token",)}
_EXPERTS = _PER_TOKEN | {"num_experts": ("num_experts",)}
_LOCAL_EXPERTS = _PER_TOKEN | {"num_local_experts": ("num_experts",)}
_GRANITE = {
  "embedding_multiplier": ("embedding_multiplier",),
  "logits_scaling": ("logits_divisor",),
  "residual_multiplier": ("residual_multiplier",),
  "attention_multiplier": ("attention_multiplier",),
}
_ONE = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0}

# The order is that of preference where several express a model (`hf_config.write_config`).
FAMILIES: dict[str, Family] = {
  "llama": Family("LlamaForCausalLM", _EPS | {"sliding_window": None}, options=_BIAS | _MLP_BIAS),
  "mistral": Family("MistralForCausalLM", _EPS | {"num_key_value_heads": 8, "sliding_window": 4096}, window="all"),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    _EPS | {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    {"attention_bias": True},
    window="late",
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    _EPS
    | _GEMMA_SIZES
    | {
      "vocab_size": 262208,
      "num_attention_heads": 8,
      "sliding_window_pattern": 6,
      "rope_theta": 1000000.0,
      "rope_local_base_freq": 10000.0,
    },
    GEMMA3,
    activation=_GELU,
    window="every",
    every=6,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    _EPS | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    {"query_key_norms": True},
    _BIAS,
    window="late",
  ),
  "phi3": Family(
    "Phi3ForCausalLM",
    {"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096},
    window="all",
    partial_rotary=True,
    rope_kinds=("default", "longrope"),
    rope_words={"su": "longrope", "yarn": "longrope"},
    fused={
      "self_attn.qkv_proj.weight": tuple(f"layers/attention/{name}_proj/kernel" for name in "qkv"),
      "mlp.gate_up_proj.weight": ("layers/mlp/gate_proj/kernel", "layers/mlp/up_proj/kernel"),
    },
  ),
  "smollm3": Family(
    "SmolLM3ForCausalLM",
    _EPS
    | {
      "num_key_value_heads": 4,
      "sliding_window": None,
      "tie_word_embeddings": True,
      "rope_theta": 2000000.0,
      "no_rope_layer_interval": 4,
    },
    options=_BIAS | _MLP_BIAS,
    window="unrotated",
  ),
  "granite": Family(
    "GraniteForCausalLM",
    _EPS | _ONE,
    options=_BIAS | _MLP_BIAS | _GRANITE,
  ),
  "olmo2": Family("Olmo2ForCausalLM", {"rms_norm_eps": 1e-5}, _OLMO2, _BIAS),
  "olmo3": Family(
    "Olmo3ForCausalLM",
    {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500000.0},
    _OLMO2,
    _BIAS,
    window="every",
    every=4,
    local_angles=True,
  ),
  "gemma": Family(
    "GemmaForCausalLM",
    _EPS
    | {
      "num_key_value_heads": 16,
      "head_dim": 256,
      "hidden_act": "gelu_pytorch_tanh",
      "tie_word_embeddings": True,
    },
    _GEMMA,
    _BIAS,
    _GELU | {"gelu": "gelu_tanh"},  # as transformers reads the first releases
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    _EPS | _GEMMA_SIZES | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    _GEMMA | {"post_norms": True},
    _BIAS | _CAPS | {"query_pre_attn_scalar": ("query_scalar",)},
    _GELU,
    window="every",
    every=2,
  ),
  "ministral": Family(
    "MinistralForCausalLM", _EPS | {"num_key_value_heads": 8, "sliding_window": 4096}, window="every"
  ),
  "seed_oss": Family(
    "SeedOssForCausalLM",
    _EPS | {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "attention_out_bias": False},
    options=_MLP_BIAS | {"attention_bias": ("attention_bias",), "attention_out_bias": ("output_bias",)},
  ),
  "helium": Family(
    "HeliumForCausalLM",
    {"rms_norm_eps": 1e-8, "num_key_value_heads": 20, "head_dim": 128, "rope_theta": 100000.0},
    options=_MLP_BIAS | {"attention_bias": ("attention_bias",)},
    interleaved=True,
  ),
  "ernie4_5": Family(
    "Ernie4_5ForCausalLM",
    {
      "rms_norm_eps": 1e-5,
      "num_key_value_heads": 2,
      "head_dim": 128,
      "rope_theta": 500000.0,
      "tie_word_embeddings": True,
    },
    options={"use_bias": ("attention_bias", "output_bias", "mlp_bias")},
    interleaved=True,
  ),
  "arcee": Family(
    "ArceeForCausalLM",
    {"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
    {"activation": "relu2", "gated_mlp": False},
    _BIAS | _MLP_BIAS,
    {"relu2": "relu2"},
  ),
  "mixtral": Family(
    "MixtralForCausalLM",
    {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "sliding_window": None, "rope_theta": 1000000.0}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    {"norm_gates": True},
    _LOCAL_EXPERTS,
    window="all",
    names=_MIXTRAL,
  ),
  "qwen2_moe": Family(
    "Qwen2MoeForCausalLM",
    _EPS
    | {"num_key_value_heads": 16, "qkv_bias": True, "moe_intermediate_size": 1408}
    | {"shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False},
    {"shared_gate": True},
    _EXPERTS
    | {"qkv_bias": ("attention_bias",), "norm_topk_prob": ("norm_gates",)}
    | {"moe_intermediate_size": ("intermediate_size",), "shared_expert_intermediate_size": ("shared_size",)},
    names={leaf: f"mlp.shared_expert.{leaf.split('_')[1]}_proj.weight" for leaf in _SHARED}
    | {"layers/mlp/shared_router/kernel": "mlp.shared_expert_gate.weight"},
  ),
  "qwen3_moe": Family(
    "Qwen3MoeForCausalLM",
    _EPS
    | {"num_key_value_heads": 4, "sliding_window": 4096, "use_sliding_window": False, "moe_intermediate_size": 768}
    | {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False},
    {"query_key_norms": True},
    _BIAS | _EXPERTS | {"norm_topk_prob": ("norm_gates",), "moe_intermediate_size": ("intermediate_size",)},
    window="all",
  ),
  "olmoe": Family(
    "OlmoeForCausalLM",
    {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    {"query_key_norms": True, "wide_query_key_norms": True},
    _BIAS | _EXPERTS | {"norm_topk_prob": ("norm_gates",), "clip_qkv": ("qkv_clip",)},
  ),
  "flex_olmo": Family(
    "FlexOlmoForCausalLM",
    _EPS | {"rope_theta": 500000.0, "num_experts": 7, "num_experts_per_tok": 5, "norm_topk_prob": False},
    _OLMO2,
    _BIAS | _EXPERTS | {"norm_topk_prob": ("norm_gates",)},
  ),
  "granitemoe": Family(
    "GraniteMoeForCausalLM",
    _EPS | _ONE | {"num_local_experts": 8, "num_experts_per_tok": 2},
    {"norm_gates": True},
    _BIAS | _GRANITE | _LOCAL_EXPERTS,
    names={
      "layers/mlp/router/kernel": "block_sparse_moe.router.layer.weight",
      _DOWN: "block_sparse_moe.output_linear.weight",
    },
    fused={"block_sparse_moe.input_linear.weight": _GATE_UP},
  ),
  "granitemoeshared": Family(
    "GraniteMoeSharedForCausalLM",
    _EPS | _ONE | {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 0},
    {"norm_gates": True},
    _BIAS | _GRANITE | _LOCAL_EXPERTS | {"shared_intermediate_size": ("shared_size",)},
    names={
      "layers/mlp/router/kernel": "block_sparse_moe.router.layer.weight",
      _DOWN: "block_sparse_moe.output_linear.weight",
      _SHARED[2]: "shared_mlp.output_linear.weight",
    },
    fused={"block_sparse_moe.input_linear.weight": _GATE_UP, "shared_mlp.input_linear.weight": _SHARED[:2]},
  ),
  "minimax_m2": Family(
    "MiniMaxM2ForCausalLM",
    _EPS
    | {"num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5000000.0, "use_qk_norm": True}
    | {"num_local_experts": 256, "num_experts_per_tok": 8},
    {"wide_query_key_norms": True, "norm_gates": True, "sigmoid_gates": True},
    _LOCAL_EXPERTS | {"use_qk_norm": ("query_key_norms",)},
    partial_rotary=True,
    rope_kinds=("default",),
    names=_MIXTRAL | {"layers/mlp/correction": "block_sparse_moe.e_score_correction_bias"},
  ),
  "solar_open": Family(
    "SolarOpenForCausalLM",
    {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1000000.0}
    | {"intermediate_size": 10240, "moe_intermediate_size": 1280, "n_shared_experts": 1, "n_routed_experts": 128}
    | {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    {"sigmoid_gates": True},
    _PER_TOKEN
    | {"attention_bias": ("attention_bias",), "n_routed_experts": ("num_experts",), "norm_topk_prob": ("norm_gates",)}
    | {"n_group": ("expert_groups",), "topk_group": ("groups_per_token",), "routed_scaling_factor": ("gate_scale",)}
    | {"moe_intermediate_size": ("intermediate_size",), "n_shared_experts": ("shared_size",)},
    names={leaf: f"mlp.shared_experts.{leaf.split('_')[1]}_proj.weight" for leaf in _SHARED},
  ),
  "gpt_oss": Family(
    "GptOssForCausalLM",
    {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "rope_theta": 150000.0}
    | {"num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0, "swiglu_alpha": 1.702}
    | {"attention_bias": True},
    {"norm_gates": True, "router_bias": True, "expert_bias": True, "attention_sinks": True},
    _BIAS | _LOCAL_EXPERTS | {"swiglu_limit": ("swiglu_limit",), "swiglu_alpha": ("swiglu_alpha",)},
    window="every",
    every=2,
    rope_kinds=("yarn",),  # where it is absent, transformers puts a yarn of its own there
    fused={
      "mlp.experts.gate_up_proj": _GATE_UP,
      "mlp.experts.gate_up_proj_bias": tuple(leaf.replace("experts", "expert_bias") for leaf in _GATE_UP),
      "mlp.experts.down_proj": (_DOWN,),
    },
    paired=True,
    names={
      "layers/mlp/router/kernel": "mlp.router.weight",
      "layers/mlp/router/bias": "mlp.router.bias",
      "layers/mlp/down_proj/expert_bias": "mlp.experts.down_proj_bias",
    },
  ),
}
# Models with several parts -> the key of config.json that holds the language model, and its model_type.
TEXT_PARTS = {"gemma3": ("text_config", "gemma3_text")}
