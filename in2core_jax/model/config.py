"""The shape of a decoder, and what follows from it and the number of positions alone: rotary angles and masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a decoder; field names follow Hugging Face's Llama configuration where one exists there.

  Attributes:
    sliding_window: a position sees itself and so many less one before it; in all layers, or in the local ones.
    activation: of the gated MLP, silu or gelu_tanh.
    norm_offset: what norms add to their scale: 1 where files store the factor less one, which keeps half precision.
    post_norms: norms behind attention and MLP too, before their outputs are added.
    query_key_norms: norms of each head's queries and keys.
    scaled_embeddings: embeddings are multiplied by sqrt(D).
    query_scalar: attention scores are divided by its square root; None: head_dim.
    global_every: every so many layers a global one, with `rope_theta`, `rope_scaling` and no window; the layers between
      are local, with `local_rope_theta` and `sliding_window`. None: all layers are alike.
    local_rope_theta: of local layers.
    carried: JSON text of what came with the model and export writes back (`hf_config.carry`): no computation uses it,
      so it is no part of the model's identity.
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
  local_rope_theta: float = 10000.0
  carried: str = dataclasses.field(default="", repr=False, compare=False)

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise UserError(f"model config: {self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")
    if self.head_dim % 2:
      raise UserError(f"model config: head_dim {self.head_dim} is odd, rotary embeddings need pairs")
    if self.global_every and not self.sliding_window:
      raise UserError("model config: local layers need a sliding_window")

  @property
  def score_scale(self) -> float:
    """What attention scores are multiplied by."""
    return (self.query_scalar or self.head_dim) ** -0.5

  def local_layers(self, first: int, count: int) -> np.ndarray | None:
    """bool [count], which of the layers from `first` on are local; None where all layers of the model are alike."""
    if self.global_every is None:
      return None
    return (np.arange(first, first + count) + 1) % self.global_every != 0


def rotary_tables(config: ModelConfig, length: int, dtype, local: bool = False) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [T, head_dim / 2] of the rotary angles, with Llama 3's frequency scaling when configured.

  Args:
    config: the model's shape.
    length: T.
    dtype: of the tables.
    local: those of local layers, which are never scaled.
  """
  exponent = jnp.arange(0, config.head_dim, 2, dtype=dtype) / config.head_dim
  frequency = 1.0 / ((config.local_rope_theta if local else config.rope_theta) ** exponent)
  scaling = {} if local else dict(config.rope_scaling or ())
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind == "linear":
    frequency = frequency / scaling["factor"]
  elif kind == "llama3":
    wavelength = 2 * jnp.pi / frequency
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = jnp.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
  elif kind != "default":
    raise UserError(f"model config: rope scaling {kind!r} is not supported; known: default, linear, llama3")
  angle = jnp.arange(length, dtype=dtype)[:, None] * frequency[None, :]
  return jnp.cos(angle), jnp.sin(angle)


def causal_mask(config: ModelConfig, length: int, local: bool = False) -> jax.Array:
  """Whether a position (row) may look at another one (column): bool [T,T]; for arguments see `rotary_tables`."""
  # Padding stands on the right, so a real token never looks at it: the causal mask is all that is needed.
  row, column = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
  mask = column <= row
  if config.sliding_window is None or (config.global_every is not None and not local):
    return mask
  return mask & (row - column < config.sliding_window)
