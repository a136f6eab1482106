"""Embeddings of examples by the model itself: what influence is compared with where texts alone are looked at.

  e_i = sum over the tokens t of example i, prompt and response, of w_t norm(h_it)    h: last hidden states
  "mean": w_t = 1 / T          "position": w_t = t / (1 + 2 + ... + T)          "last": w_T = 1

Weights by position are those of RDS+ (arXiv 2503.01807): a late token has seen more of the text. Padding counts
nothing, and examples that share a packed row do not see each other. Two embeddings are compared by their cosine.

Letters: N and Q examples, D width, W rows of a batch, T tokens of a row.
"""

from functools import partial
from typing import Any

import jax
import numpy as np

from in2core_jax.data import packed_rows, ragged
from in2core_jax.data.batches import rejected_starts
from in2core_jax.errors import UserError
from in2core_jax.model import decoder
from in2core_jax.model.hidden_cache import BoundaryCache, BoundaryJob
from in2core_jax.parallel import processes
from in2core_jax.params import quantisation
from in2core_jax.params.subtree import Subtree


def above_all(num_layers: int) -> Subtree:
  """The choice of no parameter, whose boundary is above the top layer: all layers run."""
  return Subtree((), num_layers, ())


POOLINGS = ("mean", "position", "last")


def pooled(job: BoundaryJob, dataset: Any, below: tuple[BoundaryCache, int] | None = None) -> dict[str, np.ndarray]:
  """Each example's last hidden states, after the final norm, in all poolings.

  Args:
    job: the model and how to run it; `job.subtree` is `above_all`, `job.frozen` are all parameters.
    dataset: has `tokens`, int32 [T_i] for each of N examples.
    below: hidden states of the very same examples that enter a layer, and which layer: those below it are not run
      again.

  Returns:
    {word of `POOLINGS`: float32 [N, D]}.

  Raises:
    UserError: a subtree whose boundary is below a layer (its hidden states are not the last), or an example without
      tokens.
  """
  if job.subtree.boundary != job.subtree.num_layers:
    raise UserError(f"embeddings need all layers below the boundary, which is {job.subtree.boundary}: use above_all")
  lengths = ragged.lengths_of(dataset.tokens).astype(np.int64)
  if not lengths.all():
    raise UserError(f"example {dataset.ids[int(np.argmin(lengths))]!r} has no token, so there is nothing to embed")
  found = {name: np.zeros((len(lengths), job.config.hidden_size), np.float32) for name in POOLINGS}
  plan = packed_rows.packed_plan(lengths, job.batch_tokens, job.multiple_of)
  for packed in job.track(packed_rows.packed_batches(dataset.tokens, plan, second=rejected_starts(dataset)), len(plan)):
    if below is None:
      tokens, offsets = job.place((packed.tokens, packed.offsets))
      hidden = processes.to_host(_last_hidden(job.config, job.subtree, job.frozen, tokens, offsets))
    else:
      cache, first = below
      entering = cache.lay_out(packed.examples, packed.places, packed.tokens.size).reshape(*packed.tokens.shape, -1)
      entering, offsets = job.place((entering, packed.offsets))
      hidden = processes.to_host(_last_from(job.config, first, job.frozen, entering, offsets))
    flat = hidden.reshape(-1, hidden.shape[-1])
    for example, place in zip(packed.examples, packed.places, strict=True):
      rows = flat[place : place + lengths[example]]
      found["mean"][example] = rows.mean(axis=0, dtype=np.float64)
      found["position"][example] = np.average(rows, axis=0, weights=np.arange(1.0, len(rows) + 1))
      found["last"][example] = rows[-1]
  return found


@partial(jax.jit, static_argnums=(0, 1))
def _last_hidden(config, subtree, params, tokens, offsets):
  """[W,T,D]."""
  h = decoder.run_below(config, subtree, params, tokens, offsets)
  return decoder.final_norm(config, params, h)


@partial(jax.jit, static_argnums=(0, 1))
def _last_from(config, first, params, hidden, offsets):
  """[W,T,D] from the hidden states that enter layer `first`."""
  above = quantisation.tree_map(lambda leaf: leaf[first:], params["layers"])
  h = hidden.astype(params["embed"]["embedding"].dtype)  # a cache may be narrower than the weights
  return decoder.final_norm(config, params, decoder.run_layers(config, above, h, offsets, first))
