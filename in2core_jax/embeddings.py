"""Embeddings of examples by the model itself: what influence is compared with where texts alone are looked at.

  e_i = sum over the tokens t of example i, prompt and response, of w_t norm(h_it)    h: last hidden states
  "mean": w_t = 1 / T          "position": w_t = t / (1 + 2 + ... + T)          "last": w_T = 1

Weights by position are those of RDS+ (arXiv 2503.01807): a late token has seen more of the text. Padding counts
nothing, and examples that share a packed row do not see each other. Two embeddings are compared by their cosine.

Letters: N and Q examples, D width, W rows of a batch, T tokens of a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from in2core_jax import model, packing, processes
from in2core_jax.boundary import BoundaryCache, BoundaryJob
from in2core_jax.errors import UserError
from in2core_jax.subtree import Subtree


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
  lengths = np.array([len(tokens) for tokens in dataset.tokens], np.int64)
  if not lengths.all():
    raise UserError(f"example {dataset.ids[int(np.argmin(lengths))]!r} has no token, so there is nothing to embed")
  found = {name: np.zeros((len(lengths), job.config.hidden_size), np.float32) for name in POOLINGS}
  plan = packing.packed_plan(lengths, job.batch_tokens, job.multiple_of)
  for packed in job.track(packing.packed_batches(dataset.tokens, plan), len(plan)):
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
  h = model.run_below(config, subtree, params, tokens, offsets)
  return model.final_norm(config, params, h)


@partial(jax.jit, static_argnums=(0, 1))
def _last_from(config, first, params, hidden, offsets):
  """[W,T,D] from the hidden states that enter layer `first`."""
  above = jax.tree.map(lambda leaf: leaf[first:], params["layers"])
  h = hidden.astype(params["embed"]["embedding"].dtype)  # a cache may be narrower than the weights
  return model.final_norm(config, params, model.run_layers(config, above, h, offsets, first))


def cosine_to(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a_q . b_i / (|a_q| |b_i|) of every pair.

  Args:
    a: [Q, D].
    b: [N, D].

  Returns:
    float32 [Q, N], within [-1, 1]; 0 with a vector of zeros.

  Raises:
    UserError: vectors of different widths, or not finite.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
    raise UserError(f"cosines of embeddings {a.shape} and {b.shape}: both must be [examples, width] of one width")
  if not (np.isfinite(a).all() and np.isfinite(b).all()):
    raise UserError("cosines of embeddings that are not finite: look for NaN in the weights")
  return np.clip(unit(a) @ unit(b).T, -1, 1).astype(np.float32)


def whitening(vectors: np.ndarray, damping_ratio: float) -> Callable[[np.ndarray], np.ndarray]:
  """A map to where some vectors have no direction in common: x -> (C + damping I)^-1/2 (x - mean).

  C is their covariance, damping a share of its largest eigenvalue. Cosines of such images do not see what all texts
  share, which rules those of plain embeddings.

  Args:
    vectors: [N, D], which mean and C are of.
    damping_ratio: positive.

  Returns:
    [M, D] -> float64 [M, D].

  Raises:
    UserError: a ratio that is not positive, or vectors that are all the same.
  """
  vectors = np.asarray(vectors, np.float64)
  if not np.isfinite(vectors).all():
    raise UserError("whitening of embeddings that are not finite: look for NaN in the weights")
  center = vectors.mean(axis=0)
  values, directions = np.linalg.eigh(np.cov(vectors.T, bias=True))
  if not damping_ratio > 0 or not values[-1] > 0:
    raise UserError(f"whitening of {len(vectors)} embeddings with ratio {damping_ratio}: need different ones, above 0")
  scale = 1 / np.sqrt(np.maximum(values, 0) + damping_ratio * values[-1])
  return lambda x: (np.asarray(x, np.float64) - center) @ directions * scale


def unit(vectors: np.ndarray) -> np.ndarray:
  """Rows [N, D] scaled to length 1; rows of zeros stay."""
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.where(lengths > 0, lengths, 1)
