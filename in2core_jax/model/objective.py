"""The decoder's losses per response slot and per example, and the products with their curvature: its Objective."""

import functools

import jax
import jax.numpy as jnp

from in2core_jax.errors import UserError
from in2core_jax.gradients import HIGHEST, Objective
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.decoder import (
  _logits,
  _scaled,
  accumulation_dtype,
  final_norm,
  head_input,
  head_matrix,
  run_above,
  run_below,
)
from in2core_jax.params import subtree as subtree_lib

# Positions whose [*, V] logits exist at the same time, and how many logits these may be: 512 x 49152 x 4 bytes are
# 100 MB; a vocabulary of 262144 gets 96 positions. Under `vmap` this holds for each mapped element, so there the
# microbatch bounds the memory: microbatch x min(R, head_chunk(V)) x V.
HEAD_CHUNK = 512


HEAD_LOGITS = 512 * 49152


def _nll_of_logits(logits_, target):
  picked = jnp.take_along_axis(logits_, target[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_, axis=-1) - picked


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def token_nll(z: jax.Array, matrix: jax.Array, target: jax.Array, cap: float | None = None) -> jax.Array:
  """Negative log-likelihood of `target` under softmax(z matrix^T), with logits alive for `head_chunk` rows at a time.

  The derivative rule forms (p - onehot) matrix beside the value, so that forward mode, reverse mode and
  forward-over-reverse all cost two vocabulary products a row and no [rows, V] array outlives its chunk. `matrix` is a
  constant here; a head that is itself chosen goes through its logits instead (`make_objective`).

  Args:
    z: [M, D] final hidden states after the last norm.
    matrix: [V, D] vocabulary projection.
    target: int32 [M].
    cap: soft cap of the logits (`decoder.soft_cap`).

  Returns:
    [M], float32 at least, nats.
  """
  return _by_chunk(len(matrix), lambda zc, tc: _nll_of_logits(_logits(zc, matrix, cap), tc), z, target)


@token_nll.defjvp
def _token_nll_jvp(cap, primals, tangents):
  z, matrix, target = primals
  dz = tangents[0]

  def value_and_slope(zc, tc):
    chunk = _logits(zc, matrix, cap)
    probability = jax.nn.softmax(chunk, axis=-1)
    residual = probability - jax.nn.one_hot(tc, chunk.shape[-1], dtype=chunk.dtype)
    residual = residual if cap is None else residual * _cap_slope(chunk, cap)
    slope = jnp.einsum("mv,vd->md", residual.astype(matrix.dtype), matrix, preferred_element_type=chunk.dtype)
    return _nll_of_logits(chunk, tc), slope

  value, slope = _by_chunk(len(matrix), value_and_slope, z, target)
  return value, jnp.sum(slope * dz.astype(slope.dtype), axis=-1)


def head_chunk(vocab_size: int) -> int:
  """Positions whose logits exist at the same time."""
  return min(HEAD_CHUNK, max(1, HEAD_LOGITS // vocab_size))


def _by_chunk(vocab_size: int, fn, z, *rest):
  rows, chunk = z.shape[0], head_chunk(vocab_size)
  if rows <= chunk:
    return fn(z, *rest)
  chunks = -(-rows // chunk)
  size = -(-rows // chunks)
  pad = chunks * size - rows
  cut = [jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(chunks, size, *a.shape[1:]) for a in (z, *rest)]
  out = jax.lax.map(lambda args: fn(*args), tuple(cut))
  return jax.tree.map(lambda a: a.reshape(chunks * size, *a.shape[2:])[:rows], out)


def _cap_slope(capped, cap: float):
  """Derivative of the soft cap at the logits whose capped values these are: 1 - tanh^2."""
  return 1 - jnp.square(capped / cap)


def head_ggn(z, dz, matrix, cap: float | None = None):
  """W^T D (diag(p) - p p^T) D W dz per row: three vocabulary products, p = softmax(c(W z)).

  c is the soft cap of the logits and D = diag(c'(W z)) its slope; without a cap c(x) = x and D = I. The Gauss-Newton
  matrix takes the *capped* logits as the model's output, in which the loss is convex: it stays positive semi-definite
  and equals the covariance of the gradients D (p - onehot) under labels drawn from p. The term with c'' is left out,
  as that of every other nonlinearity of the model is.
  """
  logits_ = _logits(z, matrix, cap)
  # p = e / total; the division comes after the last product, where rows are short: fewer passes over [rows, V].
  e = jnp.exp(logits_ - jnp.max(logits_, axis=-1, keepdims=True))
  total = jnp.sum(e, axis=-1, keepdims=True)
  slope = () if cap is None else (_cap_slope(logits_, cap),)
  return _moved_by_head(dz.astype(z.dtype), e, total, matrix, *slope)


def _moved(dz, e, total, matrix, slope=None):
  moved = _logits(dz, matrix) if slope is None else slope * _logits(dz, matrix)
  moved = e * (moved - jnp.sum(e * moved, axis=-1, keepdims=True) / total)
  moved = moved if slope is None else slope * moved
  return jnp.einsum("mv,vd->md", moved.astype(matrix.dtype), matrix, preferred_element_type=moved.dtype) / total


_moved_by_head = jax.custom_batching.custom_vmap(_moved)


@_moved_by_head.def_vmap
def _moved_by_head_of_queries(size, batched, *operands):
  """Some queries after the others, so that `head_chunk` bounds the logits of all of them together.

  [queries, rows, V] at once takes gigabytes, and from 11 queries on XLA's CPU compiler (jaxlib 0.10.2) cuts this
  expression up by itself: what came out was false for all queries but the first.
  """
  rows, matrix = operands[0].shape[-2], operands[3]
  mapped = tuple(value for value, mine in zip(operands, batched, strict=True) if mine)

  def one(own):
    own = iter(own)
    return _moved(*(next(own) if mine else value for value, mine in zip(operands, batched, strict=True)))

  at_once = max(1, head_chunk(matrix.shape[-2]) // rows)
  return jax.lax.map(one, mapped, batch_size=min(size, at_once)), True


@functools.cache  # equal choices give the same functions, so `jax.jit` compiles them once
def make_objective(config: ModelConfig, subtree: subtree_lib.Subtree) -> Objective:
  """The loss (method.md section 1): weighted response-token negative log-likelihood, a function of the chosen subtree.

  `outputs` are the normed hidden states at the response slots [B,R,D] (logits [B,R,V] when the head itself is chosen).
  The head is linear and frozen, so the Gauss-Newton matrix with respect to these outputs equals the one with respect to
  the logits: J_z^T (W^T H_out W) J_z. A divisor of the logits is part of z, a soft cap part of H_out (`head_ggn`).

  Batches of preference pairs (`batch.reference`) have the DPO loss (section 1.1). Their outputs are the scaled margins
  u [B], in which that loss is convex: the Gauss-Newton matrix is sum_i s(u_i) s(-u_i) grad u_i grad u_i^T with the
  logistic function s, whatever the head.

  Returns:
    An `Objective` over batches with the fields of `batches.Batch`; `hidden` [B,T,D] replaces the layers below the
    boundary when it is not None.
  """
  head_is_chosen = _head_is_chosen(config, subtree)

  def outputs(sub, frozen, batch):
    z = token_outputs(sub, frozen, batch)
    if batch.reference is None:
      return z
    return _margins(_slot_losses(config, head_is_chosen, z, frozen, batch), batch)

  def token_outputs(sub, frozen, batch):
    h = _last_hidden(config, subtree, sub, frozen, batch)
    picked = _pick(h, batch)
    z = head_input(config, sub if "final_norm" in subtree.extras else frozen, picked)
    return _logits(z, head_matrix(frozen | sub), config.logit_cap) if head_is_chosen else z

  def losses(z, frozen, batch):
    if batch.reference is not None:
      return _pair_losses(z, batch)
    return jnp.sum(_slot_losses(config, head_is_chosen, z, frozen, batch), axis=-1)

  def output_hvp(z, dz, frozen, batch):
    if batch.reference is not None:
      return _has_sides(batch) * jax.nn.sigmoid(z) * jax.nn.sigmoid(-z) * dz
    flat = functools.partial(jnp.reshape, shape=(-1, z.shape[-1]))
    matrix = head_matrix(frozen)
    ggn = lambda zc, dzc: head_ggn(zc, dzc, matrix, config.logit_cap)  # noqa: E731
    product = _by_chunk(len(matrix), ggn, flat(z), flat(dz)).reshape(z.shape)
    return (product * _by_slot(batch.weight, batch)[..., None].astype(product.dtype)).astype(z.dtype)

  def separate(batch):
    if batch.slots is None and batch.reference is not None:
      return batch  # a pair is one row, of two sequences
    if batch.offsets is not None:
      raise ValueError("rows that hold several examples cannot be mapped over examples: use batches.Batcher")
    return batch._replace(slots=None)

  return Objective(outputs, losses, None if head_is_chosen else output_hvp, separate, reads_probes=True)


def _margins(slot_losses, batch):
  """u [B] of preference pairs: beta ((log pi_w - log ref_w) - (log pi_l - log ref_l)), 0 where there is no response."""
  # The weights are beta on the chosen side and -beta on the rejected one, and a loss is -log pi.
  return (-jnp.sum(slot_losses, axis=-1) - batch.reference.astype(slot_losses.dtype)) * _has_sides(batch)


def _pair_losses(margins, batch):
  """-log sigmoid(u) [B], exactly 0 on padding rows and on pairs without response."""
  return _has_sides(batch) * jax.nn.softplus(-margins)


def _has_sides(batch):
  """1 for pairs that have a response, else 0, [B]."""
  return jnp.any(batch.weight != 0, axis=-1).astype(batch.weight.dtype)


def _last_hidden(config: ModelConfig, subtree: subtree_lib.Subtree, sub, frozen, batch):
  """Hidden states [B,T,D] above the top layer, before the final norm."""
  if "embed" in subtree.extras:
    if batch.hidden is not None:
      raise UserError(
        "the embedding is in the subtree, so hidden states above it are no constants: use no boundary cache"
      )
    matrix = sub["embed"]["embedding"]
    # A token's gradient is a sum over its positions: scattered in the wide dtype, a copy only for half precision.
    wide = matrix.astype(accumulation_dtype(matrix.dtype))
    h = _scaled(config, jnp.take(wide, batch.tokens, axis=0).astype(matrix.dtype))
  elif batch.hidden is not None:
    h = batch.hidden.astype(frozen["embed"]["embedding"].dtype)  # a cache may be narrower than the weights
  else:
    h = jax.lax.stop_gradient(run_below(config, subtree, frozen, batch.tokens, batch.offsets))
  return run_above(config, subtree, sub, frozen, h, batch.offsets)


@functools.cache
def losses_and_hidden_fn(config: ModelConfig, subtree: subtree_lib.Subtree):
  """Makes losses_and_hidden(sub, frozen, batch, spots, most) -> ([E], f32 [E,2,D]): one pass for losses and embeddings.

  The losses are those of `make_objective`; the embeddings are `embeddings.pooled`'s "mean" and "last", for subtrees
  without top-level modules. No gradient goes through them.

  Args of the function made:
    batch: of packed rows.
    spots: where its examples lie, a `spots.Spots`. most: S, how many a row holds at most.
  """
  head_is_chosen = _head_is_chosen(config, subtree)

  def losses_and_hidden(sub, frozen, batch, spots, most):
    h = _last_hidden(config, subtree, sub, frozen, batch)
    z = head_input(config, frozen, _pick(h, batch))
    losses = jnp.sum(_slot_losses(config, head_is_chosen, z, frozen, batch), axis=-1)
    normed = jax.lax.stop_gradient(final_norm(config, frozen, h)).astype(jnp.float32)
    (groups, size), width = spots.place.shape, normed.shape[-1]
    total = jnp.einsum("wts,wtd->wsd", jax.nn.one_hot(spots.members, most), normed, precision=HIGHEST)
    taken = lambda values, where: jnp.take_along_axis(  # noqa: E731
      values.reshape(groups, -1, width), where[..., None], axis=1
    ).reshape(groups * size, width)
    mean = taken(total, spots.place) / spots.lengths[:, None]
    return losses, jnp.stack([mean, taken(normed, spots.last)], axis=1)

  return losses_and_hidden


def _pick(h, batch):
  """Hidden states [B,R,D] that predict the response slots, or [G,M,D] of the filled slots only."""
  if batch.slots is None:
    return jnp.take_along_axis(h, batch.position[..., None], axis=1)
  groups, position = batch.slots.shape[0], batch.position
  if batch.offsets is None:  # a row for each example; packed batches count from the group's first token themselves
    position += jnp.arange(position.shape[0])[:, None] % (position.shape[0] // groups) * h.shape[1]
  place = _by_slot(position, batch)
  return jnp.take_along_axis(h.reshape(groups, -1, h.shape[-1]), place[..., None], axis=1)


def _by_slot(values, batch):
  """Entries [G,M] of an array [B,R] at the filled slots, zero on padding; the array itself without slots."""
  if batch.slots is None:
    return values
  flat = values.reshape(batch.slots.shape[0], -1)
  return jnp.take_along_axis(flat, batch.slots, axis=1, mode="fill", fill_value=0)


def _by_example(values, batch):
  """Inverse of `_by_slot`, zero elsewhere; a slot is written once, so what is summed over it has a fixed order."""
  if batch.slots is None:
    return values
  groups, size = batch.slots.shape[0], batch.target.size // batch.slots.shape[0]
  rows = jnp.arange(groups)[:, None]
  values = jnp.zeros((groups, size), values.dtype).at[rows, batch.slots].set(values, mode="drop", unique_indices=True)
  return values.reshape(batch.target.shape)


def _slot_losses(config: ModelConfig, head_is_chosen: bool, z, frozen, batch):
  """Weighted negative log-likelihood [B,R] of every response slot, from the outputs z of the objective."""
  target, weight = _by_slot(batch.target, batch), _by_slot(batch.weight, batch)
  if head_is_chosen:
    nll = _nll_of_logits(z, target)
  else:
    flat = z.reshape(-1, z.shape[-1])
    nll = token_nll(flat, head_matrix(frozen), target.reshape(-1), config.logit_cap).reshape(target.shape)
  return _by_example(nll * weight.astype(nll.dtype), batch)


def _head_is_chosen(config: ModelConfig, subtree: subtree_lib.Subtree) -> bool:
  return "lm_head" in subtree.extras or ("embed" in subtree.extras and config.tie_embeddings)


@functools.cache
def sample_labels_fn(config: ModelConfig, subtree: subtree_lib.Subtree):
  """Makes relabel(sub, frozen, batch, keys) -> the batch for which the mean of g_i g_i^T is the Gauss-Newton matrix.

  Targets are drawn from the model's own softmax, y_r ~ p_r, and weights become their square roots: with
  s_r = d nll_r(y_r) / dsub, E[s_r s_r^T] = J_r^T H_out,r J_r and E[s_r] = 0, so that slots do not mix and

    E[(sum_r sqrt(w_r) s_r) (sum_r sqrt(w_r) s_r)^T] = sum_r w_r J_r^T H_out,r J_r,

  the `ggn` of the loss sum_r w_r nll_r. (With w_r itself a mean over R tokens would come out R times too small.)

  Returns:
    relabel; keys is a key array [B], one for each example, from which the labels of its slots are drawn one by one: how
    examples are put into batches does not change them.
  """
  head_is_chosen = _head_is_chosen(config, subtree)
  objective = make_objective(config, subtree)

  def relabel(sub, frozen, batch, keys):
    z = objective.outputs(sub, frozen, batch._replace(slots=None))
    matrix = None if head_is_chosen else head_matrix(frozen)
    logits_of = lambda zc: _logits(zc, matrix, config.logit_cap)  # noqa: E731
    slots = jnp.arange(z.shape[1])
    wide = accumulation_dtype(z.dtype)
    draw = lambda key: jax.vmap(lambda r: jax.random.uniform(jax.random.fold_in(key, r), dtype=wide))(slots)  # noqa: E731

    def invert(zc, uniform):  # the least label whose cumulative probability exceeds u
      total = jnp.cumsum(jax.nn.softmax(zc if head_is_chosen else logits_of(zc), axis=-1), axis=-1)
      below = jnp.sum(total <= uniform[:, None] * total[:, -1:], axis=-1)
      return jnp.minimum(below, total.shape[-1] - 1).astype(batch.target.dtype)

    target = _by_chunk(config.vocab_size, invert, z.reshape(-1, z.shape[-1]), jax.vmap(draw)(keys).reshape(-1))
    return batch._replace(target=target.reshape(batch.target.shape), weight=jnp.sqrt(batch.weight))

  return relabel


@functools.cache
def token_losses_fn(config: ModelConfig, subtree: subtree_lib.Subtree):
  """Makes token_losses(sub, frozen, batch) -> [B,R], the loss (method.md section 1) apart for each response slot.

    token_losses[b, r] = weight[b, r] * nll(target[b, r] | hidden state at position[b, r]),

  whose sums over r are the losses of `make_objective`; exactly 0 on padding slots. Of preference pairs it is that times
  sigmoid(-u) of the pair, taken as a constant: no shares of the loss, but their derivatives are shares of its own.
  """
  head_is_chosen, outputs = _head_is_chosen(config, subtree), make_objective(config, subtree).outputs

  def token_losses(sub, frozen, batch):
    found = _slot_losses(config, head_is_chosen, outputs(sub, frozen, batch._replace(reference=None)), frozen, batch)
    if batch.reference is None:
      return found
    return jax.lax.stop_gradient(jax.nn.sigmoid(-_margins(found, batch)))[:, None] * found

  return token_losses
