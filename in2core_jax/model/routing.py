"""Which experts a token goes through, and how their outputs are weighted.

softmax    gate_e = softmax of the scores, over all experts or over the chosen ones
sigmoid    gate_e = scale sigmoid(score_e), or over the sum of the chosen ones; chosen by sigmoid(score_e) + c_e, c a
           correction that training sets for balance, within the groups whose two best experts have the largest sums
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from in2core_jax.model.config import ModelConfig


def route(config: ModelConfig, scores: jax.Array, correction: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """(gates [..., E] of a token's experts, 0 for the others; which they are, int32 [..., K]) from the router's scores.

  Which experts these are is a constant, the router's choice at the present weights: gates have a derivative in the
  scores, the choice has none. Nothing is dropped, so what a token gets depends on no other token.
  """
  scores = nn.sigmoid(scores) if config.sigmoid_gates else scores
  order = jax.lax.top_k(_choice(config, jax.lax.stop_gradient(scores), correction), config.experts_per_token)[1]
  chosen = jnp.sum(jax.nn.one_hot(order, config.num_experts, dtype=scores.dtype), axis=-2) > 0
  if config.sigmoid_gates:
    gates = jnp.where(chosen, scores, 0)
    gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20) if config.norm_gates else gates
    return gates if config.gate_scale == 1 else gates * config.gate_scale, order
  if config.norm_gates:
    scores = jnp.where(chosen, scores, jnp.finfo(scores.dtype).min)
  return jnp.where(chosen, jax.nn.softmax(scores, axis=-1), 0), order


def _choice(config: ModelConfig, scores, correction):
  """What experts are chosen by, [..., E]: corrected scores, the lowest ones outside of the chosen groups."""
  scores = scores if correction is None else scores + correction
  if config.expert_groups == 1:
    return scores
  grouped = scores.reshape(*scores.shape[:-1], config.expert_groups, -1)
  best = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
  kept = jax.lax.top_k(best, config.groups_per_token)[1]
  kept = jnp.sum(jax.nn.one_hot(kept, config.expert_groups), axis=-2) > 0
  return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)
