"""One Flax decoder for the Llama family and Gemma 3, cut in two at the boundary.

Linen modules describe one layer; `jax.lax.scan` runs a stack of them whose parameters share a leading axis, so that
compile time does not grow with depth and "the chosen layers" are a slice of that axis. Parameters are plain nested
dicts and always arguments: `jax.vmap`, `jax.grad` and `jax.jvp` need no special case, and XLA folds no constant.

Letters: B batch, T tokens, R response slots, V vocabulary, D width, L layers, H query heads, K key heads, G = H / K.
Weights may be float32 or bfloat16; norms, rotary angles, softmax, logits and losses are computed in float32 at least
(float64 when given float64).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from in2core_jax import probes
from in2core_jax import subtree as subtree_lib
from in2core_jax.errors import UserError
from in2core_jax.gradients import Objective
from in2core_jax.model_config import ModelConfig, causal_mask, rotary_tables

# Positions whose [*, V] logits exist at the same time, and how many logits these may be: 512 x 49152 x 4 bytes are
# 100 MB; a vocabulary of 262144 gets 96 positions. Under `vmap` this holds for each mapped element, so there the
# microbatch bounds the memory: microbatch x min(R, head_chunk(V)) x V.
HEAD_CHUNK = 512
HEAD_LOGITS = 512 * 49152

# Each run of queries looks only at the keys up to its own end: what the causal mask would throw away is mostly not
# computed, 3/8 of the scores with four runs. More and shorter runs save little more and take longer to compile.
ATTENTION_RUNS = 4
SHORTEST_RUN = 128


def accumulation_dtype(dtype) -> jnp.dtype:
  """Float32 at least: the dtype of reductions for weights of `dtype`."""
  return jnp.promote_types(dtype, jnp.float32)


class Norm(nn.Module):
  """RMS norm: x / sqrt(mean(x^2) + eps) * (offset + scale), reduced in float32 at least."""

  eps: float
  offset: float = 0.0

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],))
    wide = x.astype(accumulation_dtype(x.dtype))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    if self.offset:
      scale = self.offset + scale.astype(wide.dtype)  # in the wide dtype: half precision would round 1 + scale
    return (wide * scale).astype(x.dtype)


def _norm(config: ModelConfig, name: str | None = None) -> Norm:
  return Norm(config.rms_eps, config.norm_offset, name=name)


class Projection(nn.Module):
  """y = x W (+ b), plus what the parameters hold beside the kernel.

  lora_a [in, r], lora_b [r, out]           adds (x A) B (the factor alpha / r is folded into B when it is exported)
  left [in, p], core [p, p], right [p, out]  adds ((x left) core) right with core = 0: the gradient in `core` is
                                             left^T (dL/dW) right^T, a two-sided projection of the kernel's gradient
  NAME_probe                                 beside any matrix NAME of these: moments of its input and of its output's
                                             gradient come out as the probe's gradient (`probes.observe`)
  """

  features: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
    y = self._times(x, "kernel", kernel)
    if self.use_bias:
      # Added in the wide dtype, because the gradient in the bias is a plain sum over positions.
      wide = accumulation_dtype(x.dtype)
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = (y.astype(wide) + bias.astype(wide)).astype(x.dtype)
    for factors in (("lora_a", "lora_b"), ("left", "core", "right")):
      if self.has_variable("params", factors[0]):
        low = x
        for name in factors:
          low = self._times(low, name, self.get_variable("params", name))
        y += low
    return y

  def _times(self, x, name, matrix):
    matrix = matrix.astype(x.dtype)
    if matrix.ndim == 2 and x.ndim > 2:
      # As one plain matrix product over all positions: its transposes, the backward pass, are a third faster on CPU.
      y = (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])
    else:
      y = x @ matrix  # a matrix for each example (`gradients.adapter_gradients`)
    if self.has_variable("params", f"{name}_probe"):
      y = probes.observe(x, y, self.get_variable("params", f"{name}_probe"))
    return y


def _runs(length: int) -> list[tuple[int, int]]:
  """Cuts T positions into at most `ATTENTION_RUNS` stretches (start, stop)."""
  size = max(SHORTEST_RUN, -(-length // ATTENTION_RUNS))
  return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend(config, q, k, v, mask):
  """Values [B,t,K,G,head_dim] that queries [B,t,K,G,head_dim] take from keys and values [B,s,K,head_dim]."""
  wide = accumulation_dtype(q.dtype)
  scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=wide) * config.score_scale
  weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(wide).min), axis=-1).astype(q.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", weights, v)


class Attention(nn.Module):
  """Causal grouped-query attention with rotary positions (half-rotation form); each head's q and k may be normed."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, rotary, mask):
    c = self.config
    batch, length, _ = x.shape
    bias = c.attention_bias
    q = Projection(c.num_heads * c.head_dim, bias, name="q_proj")(x).reshape(batch, length, c.num_heads, c.head_dim)
    k = Projection(c.num_kv_heads * c.head_dim, bias, name="k_proj")(x).reshape(
      batch, length, c.num_kv_heads, c.head_dim
    )
    v = Projection(c.num_kv_heads * c.head_dim, bias, name="v_proj")(x).reshape(
      batch, length, c.num_kv_heads, c.head_dim
    )
    if c.query_key_norms:
      q, k = _norm(c, "q_norm")(q), _norm(c, "k_norm")(k)
    q = _rotate(q, rotary).reshape(batch, length, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)
    k = _rotate(k, rotary)
    runs = [
      _attend(c, q[:, start:stop], k[:, :stop], v[:, :stop], mask[..., start:stop, :stop])
      for start, stop in _runs(length)
    ]
    mixed = jnp.concatenate(runs, axis=1).reshape(batch, length, c.num_heads * c.head_dim)
    return Projection(c.hidden_size, name="o_proj")(mixed)


ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


class Mlp(nn.Module):
  """Gated MLP: down(act(gate(x)) * up(x)), act one of `ACTIVATIONS`."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    gate = Projection(self.config.intermediate_size, name="gate_proj")(x)
    up = Projection(self.config.intermediate_size, name="up_proj")(x)
    return Projection(self.config.hidden_size, name="down_proj")(ACTIVATIONS[self.config.activation](gate) * up)


class Block(nn.Module):
  """One decoder layer: h + attention(norm(h)), then h + mlp(norm(h)); what is added may be normed once more."""

  config: ModelConfig

  @nn.compact
  def __call__(self, h, rotary, mask):
    c = self.config
    added = Attention(c, name="attention")(_norm(c, "attention_norm")(h), rotary, mask)
    h = h + (_norm(c, "attention_post_norm")(added) if c.post_norms else added)
    added = Mlp(c, name="mlp")(_norm(c, "mlp_norm")(h))
    return h + (_norm(c, "mlp_post_norm")(added) if c.post_norms else added)


def _rotate(x, rotary):
  cos, sin = (table[..., :, None, :] for table in rotary)  # [T, 1, half], or [B, T, 1, half] in packed rows
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _packed_mask(offsets, mask):
  """[B,1,1,T,T]: whether a position may look at another one of the same example (`packing`)."""
  example = jnp.cumsum(offsets == 0, axis=1)
  return (mask & (example[:, :, None] == example[:, None, :]))[:, None, None]


def _surroundings(config: ModelConfig, h, offsets, local: bool):
  """(rotary tables, mask) of a layer over h [B,T,D]: what it knows of positions."""
  rotary = rotary_tables(config, h.shape[1], accumulation_dtype(h.dtype), local)
  mask = causal_mask(config, h.shape[1], local)
  if offsets is not None:
    rotary, mask = tuple(table[offsets] for table in rotary), _packed_mask(offsets, mask)
  return rotary, mask


def run_layers(
  config: ModelConfig, layer_params, h: jax.Array, offsets: jax.Array | None = None, first: int = 0
) -> jax.Array:
  """Runs stacked layers (leading axis of every leaf) over hidden states h [B,T,D].

  Args:
    config: the model's shape.
    layer_params: leaves [layers, ...].
    h: [B,T,D].
    offsets: int32 [B,T], position of each token in its own example where rows hold several (`packing`); None: one
      example a row.
    first: which layer of the model the first one is; it matters where local and global layers take turns.
  """
  everywhere = _surroundings(config, h, offsets, local=False)
  is_local = config.local_layers(first, jax.tree.leaves(layer_params)[0].shape[0])
  nearby = None if is_local is None else _surroundings(config, h, offsets, local=True)

  def body(carry, layer):
    params, local = layer
    around = everywhere
    if local is not None:  # one program for both kinds of layers: which one it is comes with the layer's parameters
      around = jax.tree.map(lambda near, far: jnp.where(local, near, far), nearby, everywhere)
    return Block(config).apply({"params": params}, carry, *around), None

  return jax.lax.scan(body, h, (layer_params, is_local))[0]


def embed(config: ModelConfig, params, tokens: jax.Array) -> jax.Array:
  """Token embeddings [B,T,D], times sqrt(D) where the model has it so."""
  return _scaled(config, jnp.take(params["embed"]["embedding"], tokens, axis=0))


def _scaled(config: ModelConfig, h):
  # The factor is rounded to the dtype of the weights, as the model was trained.
  return h * jnp.asarray(config.hidden_size**0.5, h.dtype) if config.scaled_embeddings else h


def head_matrix(params) -> jax.Array:
  """The vocabulary projection as [V,D]: the embedding itself when tied."""
  return params["lm_head"]["kernel"].T if "lm_head" in params else params["embed"]["embedding"]


def run_below(
  config: ModelConfig, subtree: subtree_lib.Subtree, frozen, tokens: jax.Array, offsets: jax.Array | None = None
) -> jax.Array:
  """Hidden states [B,T,D] that enter the lowest chosen layer; constant while the subtree changes."""
  if subtree.boundary == 0:
    return embed(config, frozen, tokens)
  return run_layers(config, subtree_lib.below_params(frozen, subtree), embed(config, frozen, tokens), offsets)


def run_above(
  config: ModelConfig, subtree: subtree_lib.Subtree, sub, frozen, h: jax.Array, offsets: jax.Array | None = None
) -> jax.Array:
  """Runs the layers from the boundary up, a scan for each run of chosen or not chosen layers."""
  for start, stop, _ in subtree.segments():
    h = run_layers(config, subtree_lib.segment_params(sub, frozen, subtree, start, stop), h, offsets, start)
  return h


def final_norm(config: ModelConfig, params, h: jax.Array) -> jax.Array:
  """The norm above the top layer, of hidden states [..., D]; `params` has at least "final_norm"."""
  return _norm(config).apply({"params": params["final_norm"]}, h)


def logits(config: ModelConfig, params, tokens: jax.Array) -> jax.Array:
  """Logits of all positions, float32 [B,T,V]; for parity checks and small inputs."""
  h = run_layers(config, params["layers"], embed(config, params, tokens))
  return _logits(final_norm(config, params, h), head_matrix(params))


def init_params(config: ModelConfig, key: jax.Array, dtype=jnp.float32):
  """Random parameters: normal with deviation 0.02, factors of norms at one."""
  embed_key, layer_key, head_key = jax.random.split(key, 3)
  h = jnp.zeros((1, 2, config.hidden_size), dtype)
  around = _surroundings(config, h, None, local=False)
  init = lambda k: Block(config).init(k, h, *around)["params"]  # noqa: E731
  shape = (config.vocab_size, config.hidden_size)
  params = {
    "embed": {"embedding": 0.02 * jax.random.normal(embed_key, shape)},
    "layers": jax.vmap(init)(jax.random.split(layer_key, config.num_layers)),
    "final_norm": {"scale": jnp.full(config.hidden_size, 1 - config.norm_offset)},
  }
  if not config.tie_embeddings:
    params["lm_head"] = {"kernel": 0.02 * jax.random.normal(head_key, shape[::-1])}
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _logits(z, matrix):
  return jnp.einsum("...d,vd->...v", z, matrix, preferred_element_type=accumulation_dtype(z.dtype))


def _nll_of_logits(logits_, target):
  picked = jnp.take_along_axis(logits_, target[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_, axis=-1) - picked


@jax.custom_jvp
def token_nll(z: jax.Array, matrix: jax.Array, target: jax.Array) -> jax.Array:
  """Negative log-likelihood of `target` under softmax(z matrix^T), with logits alive for `head_chunk` rows at a time.

  The derivative rule forms (p - onehot) matrix beside the value, so that forward mode, reverse mode and
  forward-over-reverse all cost two vocabulary products a row and no [rows, V] array outlives its chunk. `matrix` is a
  constant here; a head that is itself chosen goes through its logits instead (`make_objective`).

  Args:
    z: [M, D] final hidden states after the last norm.
    matrix: [V, D] vocabulary projection.
    target: int32 [M].

  Returns:
    [M], float32 at least, nats.
  """
  return _by_chunk(len(matrix), lambda zc, tc: _nll_of_logits(_logits(zc, matrix), tc), z, target)


@token_nll.defjvp
def _token_nll_jvp(primals, tangents):
  z, matrix, target = primals
  dz = tangents[0]

  def value_and_slope(zc, tc):
    chunk = _logits(zc, matrix)
    probability = jax.nn.softmax(chunk, axis=-1)
    residual = probability - jax.nn.one_hot(tc, chunk.shape[-1], dtype=chunk.dtype)
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


def _head_ggn(z, dz, matrix):
  """W^T (diag(p) - p p^T) W dz per row: three vocabulary products, p = softmax(W z)."""
  logits_ = _logits(z, matrix)
  # p = e / total; the division comes after the last product, where rows are short: fewer passes over [rows, V].
  e = jnp.exp(logits_ - jnp.max(logits_, axis=-1, keepdims=True))
  total = jnp.sum(e, axis=-1, keepdims=True)
  return _moved_by_head(dz.astype(z.dtype), e, total, matrix)


def _moved(dz, e, total, matrix):
  moved = _logits(dz, matrix)
  moved = e * (moved - jnp.sum(e * moved, axis=-1, keepdims=True) / total)
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
  """The loss of METHOD: weighted response-token negative log-likelihood, as a function of the chosen subtree.

  `outputs` are the normed hidden states at the response slots [B,R,D] (logits [B,R,V] when the head itself is chosen).
  The head is linear and frozen, so the Gauss-Newton matrix with respect to these outputs equals the one with respect to
  the logits: J_z^T (W^T H_out W) J_z.

  Returns:
    An `Objective` over batches with the fields of `batches.Batch`; `hidden` [B,T,D] replaces the layers below the
    boundary when it is not None.
  """
  head_is_chosen = _head_is_chosen(config, subtree)

  def outputs(sub, frozen, batch):
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
    h = run_above(config, subtree, sub, frozen, h, batch.offsets)
    picked = _pick(h, batch)
    z = final_norm(config, sub if "final_norm" in subtree.extras else frozen, picked)
    return _logits(z, head_matrix(frozen | sub)) if head_is_chosen else z

  def losses(z, frozen, batch):
    return jnp.sum(_slot_losses(head_is_chosen, z, frozen, batch), axis=-1)

  def output_hvp(z, dz, frozen, batch):
    flat = functools.partial(jnp.reshape, shape=(-1, z.shape[-1]))
    matrix = head_matrix(frozen)
    product = _by_chunk(len(matrix), lambda zc, dzc: _head_ggn(zc, dzc, matrix), flat(z), flat(dz)).reshape(z.shape)
    return (product * _by_slot(batch.weight, batch)[..., None].astype(product.dtype)).astype(z.dtype)

  def separate(batch):
    if batch.offsets is not None:
      raise ValueError("rows that hold several examples cannot be mapped over examples: use batches.Batcher")
    return batch._replace(slots=None)

  return Objective(outputs, losses, None if head_is_chosen else output_hvp, separate)


def _pick(h, batch):
  """Hidden states [B,R,D] that predict the response slots, or [G,M,D] of the filled slots only."""
  if batch.slots is None and batch.offsets is None:
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


def _slot_losses(head_is_chosen: bool, z, frozen, batch):
  """Weighted negative log-likelihood [B,R] of every response slot, from the outputs z of the objective."""
  target, weight = _by_slot(batch.target, batch), _by_slot(batch.weight, batch)
  if head_is_chosen:
    nll = _nll_of_logits(z, target)
  else:
    nll = token_nll(z.reshape(-1, z.shape[-1]), head_matrix(frozen), target.reshape(-1)).reshape(target.shape)
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
    slots = jnp.arange(z.shape[1])
    wide = accumulation_dtype(z.dtype)
    draw = lambda key: jax.vmap(lambda r: jax.random.uniform(jax.random.fold_in(key, r), dtype=wide))(slots)  # noqa: E731

    def invert(zc, uniform):  # the least label whose cumulative probability exceeds u
      total = jnp.cumsum(jax.nn.softmax(zc if head_is_chosen else _logits(zc, matrix), axis=-1), axis=-1)
      below = jnp.sum(total <= uniform[:, None] * total[:, -1:], axis=-1)
      return jnp.minimum(below, total.shape[-1] - 1).astype(batch.target.dtype)

    target = _by_chunk(config.vocab_size, invert, z.reshape(-1, z.shape[-1]), jax.vmap(draw)(keys).reshape(-1))
    return batch._replace(target=target.reshape(batch.target.shape), weight=jnp.sqrt(batch.weight))

  return relabel


@functools.cache
def token_losses_fn(config: ModelConfig, subtree: subtree_lib.Subtree):
  """Makes token_losses(sub, frozen, batch) -> [B,R], the loss of METHOD apart for each response slot.

    token_losses[b, r] = weight[b, r] * nll(target[b, r] | hidden state at position[b, r]),

  whose sums over r are the losses of `make_objective`; exactly 0 on padding slots.
  """
  head_is_chosen, outputs = _head_is_chosen(config, subtree), make_objective(config, subtree).outputs

  def token_losses(sub, frozen, batch):
    return _slot_losses(head_is_chosen, outputs(sub, frozen, batch), frozen, batch)

  return token_losses


def token_nlls(config: ModelConfig, subtree: subtree_lib.Subtree, sub, frozen, batch) -> jax.Array:
  """Per-token negative log-likelihood [B,R] at the response slots; zero on padding slots."""
  filled = batch.weight > 0
  nlls = token_losses_fn(config, subtree)(sub, frozen, batch._replace(weight=filled))
  return jnp.where(filled, nlls, 0)
