"""The experts that tokens go through, and no others: pairs of token and expert, sorted and cut into blocks.

A block is m rows of one expert, some of them padding, so that a product with the experts' matrices is one with a matrix
for each block:

    pairs, sorted by expert     0 0 0 0 0 2 2 3 3 3
    blocks of m = 4             0 0 0 0 | 0 . . . | 2 2 . . | 3 3 3 .

Which pairs there are is a constant, as in `routing.route`; all else is gathers and matrix products, whose derivatives
of every order JAX knows. Sizes do not depend on the routing: there are blocks for the worst case.

Letters: G groups of tokens that are sorted by themselves, N tokens of a group, K experts of a token, E experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_LEAST, _MOST = 32, 128  # rows of a block
_GATHERED = "gathered matrices of experts"
_WORTH = 0.7  # of the rows of all experts: below it sorting pays


class Blocks(NamedTuple):
  """How the tokens of a batch are cut.

  Attributes:
    groups: G.
    rows: m, of a block.
    count: blocks of a group.
    together: blocks whose matrices are gathered at once.
  """

  groups: int
  rows: int
  count: int
  together: int


def blocks(batch: int, length: int, per_token: int, experts: int) -> Blocks | None:
  """How B rows of T tokens are cut; None where computing every expert for every token costs about as little."""
  groups = math.gcd(batch, jax.device_count())  # devices that share the rows of a batch exchange no tokens
  tokens = batch * length // groups
  pairs = tokens * per_token
  rows = min(_MOST, max(_LEAST, 2 ** int(math.log2(max(1, pairs / (4 * experts))))))
  count = -(-pairs // rows) + experts
  chunks = -(-count // max(1, experts // groups))  # each with the matrices of about one layer, over all groups
  together = -(-count // chunks)
  count = chunks * together
  return Blocks(groups, rows, count, together) if count * rows <= _WORTH * tokens * experts else None


def share(batch: int, length: int, per_token: int, experts: int) -> float:
  """Rows that are computed, over those of every expert for every token."""
  cut = blocks(batch, length, per_token, experts)
  return 1.0 if cut is None else cut.groups * cut.count * cut.rows / (batch * length * experts)


def apply(cut: Blocks, mlp: Callable[[Any, jax.Array], jax.Array], weights: Any, x: jax.Array, chosen: jax.Array):
  """Outputs of each token's experts, [B,T,K,D].

  Args:
    cut: how the tokens are cut.
    mlp: (weights, rows [c,m,D]) -> [c,m,D], with weights of a matrix for each of c blocks.
    weights: leaves [E, ...].
    x: [B,T,D].
    chosen: int32 [B,T,K], the experts of each token.
  """
  experts = jax.tree.leaves(weights)[0].shape[0]
  grouped = lambda leaf: leaf.reshape(cut.groups, -1, leaf.shape[-1])  # noqa: E731
  one = lambda tokens, of: _of_group(cut, mlp, weights, tokens, of, experts)  # noqa: E731
  return jax.vmap(one)(grouped(x), grouped(chosen)).reshape(*chosen.shape, -1)


def _of_group(cut: Blocks, mlp: Callable, weights: Any, x: jax.Array, chosen: jax.Array, experts: int) -> jax.Array:
  """The same of one group: x [N,D], chosen [N,K] -> [N,K,D]."""
  slots, owners = _places(cut, chosen.reshape(-1), experts)
  token_of = jnp.full(cut.count * cut.rows, len(x), jnp.int32)
  token_of = token_of.at[slots].set(jnp.arange(chosen.size, dtype=jnp.int32) // chosen.shape[1], unique_indices=True)
  rows = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])[token_of]

  # Kept for the backward pass, the gathered matrices would be as many as there are blocks.
  @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_anything_except_these_names(_GATHERED))
  def some(_, part):
    inputs, owner = part
    return None, mlp(jax.tree.map(lambda leaf: checkpoint_name(leaf[owner], _GATHERED), weights), inputs)

  shape = (-1, cut.together, cut.rows, x.shape[1])
  outputs = jax.lax.scan(some, None, (rows.reshape(shape), owners.reshape(-1, cut.together)))[1]
  return outputs.reshape(cut.count * cut.rows, -1)[slots].reshape(*chosen.shape, -1)


def _places(cut: Blocks, expert: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
  """(row of each pair among those of all blocks, int32 [N K]; expert of each block, int32 [count])."""
  order = jnp.argsort(expert, stable=True)
  counts = jnp.bincount(expert, length=experts)
  taken = -(-counts // cut.rows)  # blocks of each expert
  ends = jnp.cumsum(taken)
  ranks = jnp.arange(expert.size) - (jnp.cumsum(counts) - counts)[expert[order]]
  sorted_slots = (ends - taken)[expert[order]] * cut.rows + ranks
  slots = jnp.zeros(expert.size, jnp.int32).at[order].set(sorted_slots.astype(jnp.int32), unique_indices=True)
  owners = jnp.searchsorted(ends, jnp.arange(cut.count), side="right")
  return slots, jnp.minimum(owners, experts - 1).astype(jnp.int32)
