"""The shape of a decoder, and what follows from it and the number of positions alone: which layers differ, masks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.errors import UserError, how_many


@dataclasses.dataclass(frozen=True, repr=False)
class ModelConfig:
  """Shape of a decoder; field names follow Hugging Face's Llama configuration where one exists there.

  Attributes:
    sliding_window: a position sees itself and so many less one before it; in all layers, or in the local ones.
    attention_bias: of the projections to queries, keys and values.
    activation: of the MLP, a word of `decoder.ACTIVATIONS`.
    norm_offset: what norms add to their scale: 1 where files store the factor less one, which keeps half precision.
    post_norms: norms behind attention and MLP too, before their outputs are added.
    query_key_norms: norms of each head's queries and keys.
    scaled_embeddings: embeddings are multiplied by sqrt(D).
    query_scalar: attention scores are divided by its square root; None: head_dim.
    global_every: every so many layers a global one, with `rope_theta`, `rope_scaling` and no window; the layers between
      are local, with `local_rope_theta` and `sliding_window`. None: all layers are alike.
    local_rope_theta: of local layers, whose angles are not scaled; None: they have the angles of the global ones.
    carried: JSON text of what came with the model and export writes back (`hf_config.carry`): no computation uses it,
      so it is no part of the model's identity.
    model_type: of the config.json that it was read from, which export prefers and whose tensor names it uses; no
      computation uses it.
    output_bias: of the attention's projection back to D.
    mlp_bias: of all projections of the MLP.
    gated_mlp: down(act(gate(x)) * up(x)); without: down(act(up(x))).
    pre_norms: norms before attention and MLP.
    wide_query_key_norms: `query_key_norms` over the queries of all heads at once, and over the keys.
    rotary_dim: how many entries of a head are rotated, the first ones; None: all.
    embedding_multiplier, residual_multiplier: embeddings, and what attention and MLP add, are multiplied by it.
    attention_multiplier: attention scores are multiplied by it; None: see `query_scalar`.
    logits_divisor: logits are divided by it.
    score_cap, logit_cap: soft caps c tanh(x / c) of attention scores and of logits; None: none.
    local: which layers are local, by index, in place of `global_every`; entries beyond the layers are cut off.
    unrotated: which layers have no rotary positions, by index.
    num_experts: E, MLPs of a layer (`intermediate_size` is the inner width of one); 0: one MLP, and no router.
    experts_per_token: how many of them a token goes through, those that the router scores highest.
    norm_gates: the gates of a token's experts add up to 1 (softmax over their scores; without: over all scores).
    router_bias, expert_bias: of the router, and of all projections of the experts.
    swiglu_limit: MLPs compute (clip(up, limit) + 1) min(gate, limit) sigmoid(swiglu_alpha gate); None: `activation`.
    attention_sinks: a number for each query head takes part in its softmax over positions, and has no value.
    shared_size: inner width of one more MLP beside the experts, which every token goes through; 0: there is none.
    shared_gate: its output is multiplied by a sigmoid of a score of its own.
    qkv_clip: queries, keys and values are clipped to its magnitude; None: they are not.
    sigmoid_gates: gates are sigmoids of the router's scores (with `norm_gates` over their sum), and a correction of its
      own for each expert is added to them for the choice alone.
    expert_groups, groups_per_token: experts are chosen within the groups of which the two best experts have the largest
      sums.
    gate_scale: gates are multiplied by it.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rms_eps: float = 1e-5
  tie_embeddings: bool = True
  rope_scaling: tuple[tuple[str, object], ...] | None = None
  attention_bias: bool = False
  sliding_window: int | None = None
  activation: str = "silu"
  norm_offset: float = 0.0
  post_norms: bool = False
  query_key_norms: bool = False
  scaled_embeddings: bool = False
  query_scalar: float | None = None
  global_every: int | None = None
  local_rope_theta: float | None = 10000.0
  carried: str = dataclasses.field(default="", compare=False)
  model_type: str = dataclasses.field(default="", compare=False)
  output_bias: bool = False
  mlp_bias: bool = False
  gated_mlp: bool = True
  pre_norms: bool = True
  wide_query_key_norms: bool = False
  rotary_dim: int | None = None
  embedding_multiplier: float = 1.0
  residual_multiplier: float = 1.0
  attention_multiplier: float | None = None
  logits_divisor: float = 1.0
  score_cap: float | None = None
  logit_cap: float | None = None
  local: tuple[bool, ...] | None = None
  unrotated: tuple[bool, ...] | None = None
  num_experts: int = 0
  experts_per_token: int = 0
  norm_gates: bool = False
  router_bias: bool = False
  expert_bias: bool = False
  swiglu_limit: float | None = None
  swiglu_alpha: float = 1.702
  attention_sinks: bool = False
  qkv_clip: float | None = None
  shared_size: int = 0
  shared_gate: bool = False
  sigmoid_gates: bool = False
  expert_groups: int = 1
  groups_per_token: int = 1
  gate_scale: float = 1.0

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise UserError(f"model config: {self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")
    if self.head_dim % 2:
      raise UserError(f"model config: head_dim {self.head_dim} is odd, rotary embeddings need pairs")
    if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
      raise UserError(f"model config: rotary_dim {self.rotary_dim} must be even and at most head_dim {self.head_dim}")
    if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
      raise UserError(f"model config: a token cannot go through {self.experts_per_token} of {self.num_experts} experts")
    if self.num_experts % self.expert_groups or not 1 <= self.groups_per_token <= self.expert_groups:
      raise UserError(
        f"model config: {self.num_experts} experts cannot be in {self.expert_groups} groups of which a token takes "
        f"{self.groups_per_token}"
      )
    if self.experts_per_token > self.groups_per_token * (self.num_experts // self.expert_groups):
      raise UserError(
        f"model config: {self.groups_per_token} of {self.expert_groups} groups have fewer than the "
        f"{self.experts_per_token} experts of a token"
      )
    if (self.global_every or self.local) and not self.sliding_window:
      raise UserError("model config: local layers need a sliding_window")
    for name in ("local", "unrotated"):
      listed = getattr(self, name)
      if listed is not None and len(listed) < self.num_layers:
        raise UserError(f"model config: {name} names {how_many(len(listed), 'layer')} of {self.num_layers}")
      kept = listed and tuple(listed[: self.num_layers])
      object.__setattr__(self, name, kept if kept and any(kept) else None)  # one way to write the same model
      if name == "local" and listed and not any(kept):
        object.__setattr__(self, "sliding_window", None)
    if self.local and all(self.local) and self.local_rope_theta is None:
      object.__setattr__(self, "local", None)
    if self.local is None and self.local_rope_theta is None:
      object.__setattr__(self, "local_rope_theta", 10000.0)

  def __repr__(self):
    shown = ", ".join(f"{name}={value!r}" for name, value in self.stated().items() if name != "carried")
    return f"ModelConfig({shown})"

  def stated(self) -> dict[str, Any]:
    """Fields by name, without the options that the model does not use: what identities of stored results are made of.

    A field that comes to this class later is left out at its default, so that it changes no identity.
    """
    fields = dataclasses.fields(self)
    first = next(i for i, field in enumerate(fields) if field.name == "model_type")
    used = [field for i, field in enumerate(fields) if i < first or getattr(self, field.name) != field.default]
    return {field.name: getattr(self, field.name) for field in used if field.name != "model_type"}

  @property
  def score_scale(self) -> float:
    """What attention scores are multiplied by."""
    if self.attention_multiplier is not None:
      return self.attention_multiplier
    return (self.query_scalar or self.head_dim) ** -0.5

  def local_layers(self, first: int, count: int) -> np.ndarray | None:
    """bool [count], which of the layers from `first` on are local; None where all layers of the model are alike."""
    if self.local is not None:
      return np.array(self.local[first : first + count])
    if self.global_every is None:
      return None
    return (np.arange(first, first + count) + 1) % self.global_every != 0

  def unrotated_layers(self, first: int, count: int) -> np.ndarray | None:
    """bool [count], which of the layers from `first` on have no rotary positions; None where all of them have."""
    return None if self.unrotated is None else np.array(self.unrotated[first : first + count])


def causal_mask(config: ModelConfig, length: int, local: bool = False) -> jax.Array:
  """Whether a position (row) may look at another one (column): bool [T,T].

  Args:
    config: the model's shape.
    length: T.
    local: that of local layers.
  """
  # Padding stands on the right, so a real token never looks at it: the causal mask is all that is needed.
  row, column = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
  mask = column <= row
  all_alike = config.global_every is None and config.local is None
  if config.sliding_window is None or not (all_alike or local):
    return mask
  return mask & (row - column < config.sliding_window)


def packed_mask(offsets: jax.Array, mask: jax.Array) -> jax.Array:
  """[B,1,1,T,T]: whether a position may look at another one of the same example (`packing`)."""
  example = jnp.cumsum(offsets == 0, axis=1)
  return (mask & (example[:, :, None] == example[:, None, :]))[:, None, None]
