"""Rotary angles: the frequency of each pair of a head's entries, in every kind of scaling, and their cosines and sines.

Kinds, as `rope_type` of a config.json: default, linear, llama3; dynamic, yarn and longrope extend a model to more
positions than it was trained with. Two of these give other numbers to examples longer than that ("dynamic" recomputes
its base, "longrope" takes its long factors), and would do so for all rows of a batch at once: `longest_example` bounds
them, so that an example's numbers do not depend on its neighbours.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.model.config import ModelConfig

# Kind -> keys that it needs, keys that it may have.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "default": ((), ()),
  "linear": (("factor",), ()),
  "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
  "dynamic": (("factor", "max_position_embeddings"), ()),
  "yarn": (
    ("factor", "original_max_position_embeddings"),
    ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
  ),
  "longrope": (
    ("original_max_position_embeddings", "short_factor", "long_factor"),
    ("factor", "max_position_embeddings", "attention_factor"),  # the second stands for the first where it is absent
  ),
}


def longest_example(config: ModelConfig) -> int | None:
  """How many tokens an example may have before its angles depend on its length; None: any number."""
  scaling = dict(config.rope_scaling or ())
  key = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
  return scaling.get(key.get(scaling.get("rope_type"), ""))


def check_length(config: ModelConfig, length: int, what: str) -> None:
  """Refuses examples beyond `longest_example`.

  Args:
    config: the model's shape.
    length: tokens of the longest example.
    what: whose longest example that is, for messages.

  Raises:
    UserError: it is too long.
  """
  most = longest_example(config)
  if most is not None and length > most:
    raise UserError(
      f"{what} has an example of {length} tokens, and the model's rotary angles are those of every example only up to "
      f"{most} tokens ({dict(config.rope_scaling or ())['rope_type']} scaling): --max_length={most}"
    )


def rotary_tables(config: ModelConfig, length: int, dtype, local: bool = False) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [T, rotated / 2] of the rotary angles, scaled as the model was trained.

  Args:
    config: the model's shape.
    length: T.
    dtype: of the tables.
    local: those of local layers, which are never scaled (where they have angles of their own).

  Raises:
    UserError: a kind of scaling that is not in `KINDS`.
  """
  own = local and config.local_rope_theta is not None
  rotated = config.rotary_dim or config.head_dim
  exponent = jnp.arange(0, rotated, 2, dtype=dtype) / rotated
  frequency = 1.0 / ((config.local_rope_theta if own else config.rope_theta) ** exponent)
  scaling = {} if own else dict(config.rope_scaling or ())
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind == "linear":
    frequency = frequency / scaling["factor"]
  elif kind == "llama3":
    wavelength = 2 * jnp.pi / frequency
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = jnp.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
  elif kind == "yarn":
    share = jnp.asarray(_yarn_share(scaling, rotated, config.rope_theta), dtype)
    frequency = (1 - share) * frequency / scaling["factor"] + share * frequency
  elif kind == "longrope":
    frequency = frequency / jnp.asarray(scaling["short_factor"], dtype)
  elif kind not in KINDS:
    raise UserError(f"model config: rope scaling {kind!r} is not supported; known: {', '.join(KINDS)}")
  angle = jnp.arange(length, dtype=dtype)[:, None] * frequency[None, :]
  factor = attention_factor(scaling)
  if factor == 1.0:
    return jnp.cos(angle), jnp.sin(angle)
  return factor * jnp.cos(angle), factor * jnp.sin(angle)


def attention_factor(scaling: Mapping[str, Any]) -> float:
  """What cosines and sines are multiplied by, so that scores keep their spread over more positions."""
  kind = scaling.get("rope_type")
  if kind not in ("yarn", "longrope"):
    return 1.0
  if scaling.get("attention_factor") is not None:
    return scaling["attention_factor"]
  factor = scaling.get("factor") or scaling["max_position_embeddings"] / scaling["original_max_position_embeddings"]
  if factor <= 1:
    return 1.0
  if kind == "longrope":
    return math.sqrt(1 + math.log(factor) / math.log(scaling["original_max_position_embeddings"]))
  spread = lambda weight: 0.1 * weight * math.log(factor) + 1.0  # noqa: E731
  if scaling.get("mscale") and scaling.get("mscale_all_dim"):
    return spread(scaling["mscale"]) / spread(scaling["mscale_all_dim"])
  return spread(1)


def _yarn_share(scaling: Mapping[str, Any], rotated: int, theta: float) -> np.ndarray:
  """Of each frequency, float64 [rotated / 2]: the share that stays as it is, 1 for pairs that turn often enough."""
  original = scaling["original_max_position_embeddings"]
  bounds = []
  for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1):
    bounds.append(rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)))
  if scaling.get("truncate") is not False:
    bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
  low, high = max(bounds[0], 0), min(bounds[1], rotated - 1)
  high += 0.001 if low == high else 0
  return 1 - np.clip((np.arange(rotated // 2) - low) / (high - low), 0, 1)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Heads [B,T,heads,head_dim] turned by their positions' angles; `rotary` is of `rotary_tables`."""
  cos, sin = (table[..., :, None, :] for table in rotary)  # [T, 1, half], or [B, T, 1, half] in packed rows
  rotated = 2 * cos.shape[-1]
  if rotated < x.shape[-1]:
    return jnp.concatenate([rotate(x[..., :rotated], rotary), x[..., rotated:]], axis=-1)
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
