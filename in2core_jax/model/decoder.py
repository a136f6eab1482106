"""One Flax decoder for the families of `families.py`, cut in two at the boundary; what they differ in is data.

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

from in2core_jax.model import experts
from in2core_jax.model.config import ModelConfig, causal_mask, packed_mask
from in2core_jax.model.rotary import rotary_tables, rotate
from in2core_jax.model.routing import route
from in2core_jax.params import moment_probes, quantisation
from in2core_jax.params import subtree as subtree_lib

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
    y = wide * scale
    if self.has_variable("params", "scale_probe"):
      y = moment_probes.observe_rows(wide, y, self.get_variable("params", "scale_probe"))
    return y.astype(x.dtype)


def _norm(config: ModelConfig, name: str | None = None) -> Norm:
  return Norm(config.rms_eps, config.norm_offset, name=name)


class Projection(nn.Module):
  """y = x W (+ b), plus what the parameters hold beside the kernel.

  lora_a [in, r], lora_b [r, out]           adds (x A) B, times the constant lora_scale [1] where there is one
  left [in, p], core [p, p], right [p, out]  adds ((x left) core) right with core = 0: the gradient in `core` is
                                             left^T (dL/dW) right^T, a two-sided projection of the kernel's gradient
  NAME_probe                                 beside any leaf NAME of these: moments of its input and of its output's
                                             gradient come out as the probe's gradient (`moment_probes.observe`)
  sketch_probe                               the gradient in `core` of each example, of several in a row
                                             (`moment_probes.sketched`), without `left`, `core` and `right`
  """

  features: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, x):
    kernel = _matrices(self, "kernel", (x.shape[-1], self.features))
    y = self._times(x, "kernel", kernel)
    if self.use_bias:
      # Added in the wide dtype, because the gradient in the bias is a plain sum over positions.
      wide = accumulation_dtype(x.dtype)
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y.astype(wide) + bias.astype(wide)
      if self.has_variable("params", "bias_probe"):
        y = moment_probes.observe_rows(jnp.ones(1, wide), y, self.get_variable("params", "bias_probe"))
      y = y.astype(x.dtype)
    if self.has_variable("params", "sketch_probe"):
      y = moment_probes.sketched(x, y, self.get_variable("params", "sketch_probe"))
    for factors in (("lora_a", "lora_b"), ("left", "core", "right")):
      if self.has_variable("params", factors[0]):
        low = x
        for name in factors:
          low = self._times(low, name, self.get_variable("params", name))
          if name == "lora_a" and self.has_variable("params", "lora_scale"):
            low = low * self.get_variable("params", "lora_scale").astype(low.dtype)
        y += low
    return y

  def _times(self, x, name, matrix):
    y = quantisation.applied(_product, x, matrix)
    if self.has_variable("params", f"{name}_probe"):
      y = moment_probes.observe(x, y, self.get_variable("params", f"{name}_probe"))
    return y


def _matrices(module: nn.Module, name: str, shape: tuple[int, ...]):
  """A parameter of a module, also where it is kept in few bits, which `nn.Module.param` would refuse for its shape."""
  there = module.get_variable("params", name) if module.has_variable("params", name) else None
  return there if quantisation.is_leaf(there) else module.param(name, nn.initializers.normal(0.02), shape)


def _product(x, matrix):
  matrix = matrix.astype(x.dtype)
  if matrix.ndim == 2 and x.ndim > 2:
    # As one plain matrix product over all positions: its transposes, the backward pass, are a third faster on CPU.
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])
  return x @ matrix  # a matrix for each example (`gradients.adapter_gradients`)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap tanh(x / cap): x where it is small, never beyond the cap; x itself without a cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def _runs(length: int) -> list[tuple[int, int]]:
  """Cuts T positions into at most `ATTENTION_RUNS` stretches (start, stop)."""
  size = max(SHORTEST_RUN, -(-length // ATTENTION_RUNS))
  return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend(config, q, k, v, mask, sinks=None):
  """Values [B,t,K,G,head_dim] that queries [B,t,K,G,head_dim] take from keys and values [B,s,K,head_dim].

  Sinks [K,G] are scores of one more position, whose value is 0.
  """
  wide = accumulation_dtype(q.dtype)
  scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=wide) * config.score_scale
  scores = soft_cap(scores, config.score_cap)
  scores = jnp.where(mask, scores, jnp.finfo(wide).min)
  if sinks is not None:
    scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[..., None, None], (*scores.shape[:-1], 1))], axis=-1)
  weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(q.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", weights, v)


class Attention(nn.Module):
  """Causal grouped-query attention with rotary positions (half-rotation form); each head's q and k may be normed."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, rotary, mask):
    c = self.config
    batch, length, _ = x.shape

    def project(name, heads):
      y = Projection(heads * c.head_dim, c.attention_bias, name=f"{name}_proj")(x)
      if c.query_key_norms and c.wide_query_key_norms and name != "v":
        y = _norm(c, f"{name}_norm")(y)
      y = y if c.qkv_clip is None else jnp.clip(y, -c.qkv_clip, c.qkv_clip)
      return y.reshape(batch, length, heads, c.head_dim)

    q, k, v = project("q", c.num_heads), project("k", c.num_kv_heads), project("v", c.num_kv_heads)
    if c.query_key_norms and not c.wide_query_key_norms:
      q, k = _norm(c, "q_norm")(q), _norm(c, "k_norm")(k)
    q = rotate(q, rotary).reshape(batch, length, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)
    k = rotate(k, rotary)
    sinks = None
    if c.attention_sinks:
      sinks = self.param("sinks", nn.initializers.normal(0.02), (c.num_heads,)).astype(accumulation_dtype(x.dtype))
      sinks = sinks.reshape(c.num_kv_heads, -1)
    runs = [
      _attend(c, q[:, start:stop], k[:, :stop], v[:, :stop], mask[..., start:stop, :stop], sinks)
      for start, stop in _runs(length)
    ]
    mixed = jnp.concatenate(runs, axis=1).reshape(batch, length, c.num_heads * c.head_dim)
    return Projection(c.hidden_size, c.output_bias, name="o_proj")(mixed)


ACTIVATIONS = {
  "silu": nn.silu,
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
  "relu2": lambda x: jnp.square(nn.relu(x)),
}


def gated(config: ModelConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
  """act(gate) * up, or with a limit (clip(up) + 1) min(gate, limit) sigmoid(alpha gate)."""
  if config.swiglu_limit is None:
    return ACTIVATIONS[config.activation](gate) * up
  gate = jnp.minimum(gate, config.swiglu_limit)
  return (jnp.clip(up, -config.swiglu_limit, config.swiglu_limit) + 1) * gate * nn.sigmoid(config.swiglu_alpha * gate)


class Mlp(nn.Module):
  """Gated MLP: down(act(gate(x)) * up(x)), act one of `ACTIVATIONS`; without gate: down(act(up(x)))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    gate = Projection(c.intermediate_size, c.mlp_bias, name="gate_proj")(x) if c.gated_mlp else None
    up = Projection(c.intermediate_size, c.mlp_bias, name="up_proj")(x)
    inner = ACTIVATIONS[c.activation](up) if gate is None else gated(c, gate, up)
    return Projection(c.hidden_size, c.mlp_bias, name="down_proj")(inner)


class ExpertProjection(nn.Module):
  """y_e = x W_e (+ b_e) of all E experts: x [B,T,in] or [B,E,T,in] -> [B,E,T,out].

  left [E, in, p], core [p, p], right [E, p, out]  add ((x left_e) core) right_e with core = 0 (`adapters.add_sketch`);
  a probe beside the matrices takes the moments of each expert, over the tokens that go through it.
  """

  features: int
  experts: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, width, x=None):
    """The outputs; without x the matrices and biases, of inputs [..., width]."""
    matrices = _matrices(self, "experts", (self.experts, width, self.features))
    if x is None:
      return matrices, self.get_variable("params", "expert_bias") if self.use_bias else None
    y = self._times(x, matrices)
    if self.has_variable("params", "experts_probe"):
      each = x if x.ndim == 4 else jnp.broadcast_to(x[:, None], (*y.shape[:3], x.shape[-1]))
      y = jax.vmap(moment_probes.observe, (1, 1, 0), 1)(each, y, self.get_variable("params", "experts_probe"))
    if self.use_bias:
      wide = accumulation_dtype(x.dtype)
      bias = self.param("expert_bias", nn.initializers.zeros, (self.experts, self.features))
      y = (y.astype(wide) + bias[:, None].astype(wide)).astype(x.dtype)
    if self.has_variable("params", "sketch_probe"):
      y = moment_probes.sketched(x, y, self.get_variable("params", "sketch_probe"))
    if self.has_variable("params", "core"):
      low, core = self._times(x, self.get_variable("params", "left")), self.get_variable("params", "core")
      low = low.reshape(low.shape[0], -1, low.shape[-1])
      moved = low @ core.astype(x.dtype)  # one core, or one for each example (`gradients.adapter_gradients`)
      if self.has_variable("params", "core_probe"):
        moved = moment_probes.observe(low, moved, self.get_variable("params", "core_probe"))
      y += self._times(moved.reshape(*y.shape[:3], -1), self.get_variable("params", "right"))
    return y

  def _times(self, x, matrices):
    how = "btd,edo->beto" if x.ndim == 3 else "betd,edo->beto"
    return quantisation.applied(lambda x, own: jnp.einsum(how, x, own.astype(x.dtype)), x, matrices)


class Mixture(nn.Module):
  """Mixture of experts: sum over a token's experts of gate_e down_e(act(gate_e(x)) * up_e(x)), as `route` chooses.

  A token's experts alone are computed (`experts.apply`), where that is less work and nothing stands beside their
  matrices. Otherwise every expert is computed for every token, and the others have the gate 0.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    width, inner = c.hidden_size, c.intermediate_size
    sizes = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    of = {name: ExpertProjection(size[1], c.num_experts, c.expert_bias, name=name) for name, size in sizes.items()}
    project = lambda name, *x: of[name](sizes[name][0], *x)  # noqa: E731
    scores = Projection(c.num_experts, c.router_bias, name="router")(x)
    scores, correction = scores.astype(accumulation_dtype(x.dtype)), None
    if c.sigmoid_gates:
      correction = self.param("correction", nn.initializers.zeros, (c.num_experts,)).astype(scores.dtype)
    gates, chosen = route(c, scores, correction)
    gates = gates.astype(x.dtype)
    cut = experts.blocks(*x.shape[:2], c.experts_per_token, c.num_experts)
    there = self.variables.get("params", {})
    if cut is None or not all(there.get(name, {"core": None}).keys() <= {"experts", "expert_bias"} for name in sizes):
      inner = gated(c, project("gate_proj", x), project("up_proj", x))
      mixed = jnp.einsum("beto,bte->bto", project("down_proj", inner), gates)
    else:
      weights = {name: project(name) for name in sizes}
      outputs = experts.apply(cut, functools.partial(_expert_mlp, c), weights, x, chosen)
      mixed = jnp.einsum("btkd,btk->btd", outputs, jnp.take_along_axis(gates, chosen, axis=-1))
    return mixed + self._shared(x) if c.shared_size else mixed

  def _shared(self, x):
    """What the MLP adds that every token goes through."""
    c = self.config
    project = lambda features, name: Projection(features, name=f"shared_{name}")  # noqa: E731
    inner = gated(c, project(c.shared_size, "gate_proj")(x), project(c.shared_size, "up_proj")(x))
    y = project(c.hidden_size, "down_proj")(inner)
    if not c.shared_gate:
      return y
    return y * nn.sigmoid(project(1, "router")(x).astype(accumulation_dtype(x.dtype))).astype(x.dtype)


def _expert_mlp(config: ModelConfig, weights, x):
  """An MLP for each block of rows x [c,m,D]; weights are (matrices, biases or None) by name."""

  def project(name, x):
    matrices, bias = weights[name]
    y = quantisation.applied(lambda x, own: x @ own.astype(x.dtype), x, matrices)
    wide = accumulation_dtype(x.dtype)
    return y if bias is None else (y.astype(wide) + bias[:, None].astype(wide)).astype(x.dtype)

  return project("down_proj", gated(config, project("gate_proj", x), project("up_proj", x)))


class Block(nn.Module):
  """One decoder layer: h + attention(norm(h)), then h + mlp(norm(h)).

  What is added may be normed once more or instead, and multiplied by a constant.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, h, rotary, mask):
    c = self.config
    attention = lambda x: Attention(c, name="attention")(x, rotary, mask)  # noqa: E731
    mlp = Mixture(c, name="mlp") if c.num_experts else Mlp(c, name="mlp")
    for name, inner in (("attention", attention), ("mlp", mlp)):
      added = inner(_norm(c, f"{name}_norm")(h) if c.pre_norms else h)
      added = _norm(c, f"{name}_post_norm")(added) if c.post_norms else added
      h = h + (added if c.residual_multiplier == 1 else added * c.residual_multiplier)
    return h


def _surroundings(config: ModelConfig, h, offsets, local: bool):
  """(rotary tables, mask) of a layer over h [B,T,D]: what it knows of positions."""
  rotary = rotary_tables(config, h.shape[1], accumulation_dtype(h.dtype), local)
  mask = causal_mask(config, h.shape[1], local)
  if offsets is not None:
    rotary, mask = tuple(table[offsets] for table in rotary), packed_mask(offsets, mask)
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
  count = quantisation.num_layers(layer_params)
  everywhere = _surroundings(config, h, offsets, local=False)
  is_local, is_unrotated = config.local_layers(first, count), config.unrotated_layers(first, count)
  nearby = None if is_local is None else _surroundings(config, h, offsets, local=True)

  def body(carry, layer):
    params, local, unrotated = layer
    around = everywhere
    if local is not None:  # one program for both kinds of layers: which one it is comes with the layer's parameters
      around = jax.tree.map(lambda near, far: jnp.where(local, near, far), nearby, everywhere)
    if unrotated is not None:
      (cos, sin), mask = around
      around = (jnp.where(unrotated, 1, cos), jnp.where(unrotated, 0, sin)), mask
    return Block(config).apply({"params": params}, carry, *around), None

  for start, stop, leaves in quantisation.runs(layer_params):
    kinds = (kind if kind is None else kind[start:stop] for kind in (is_local, is_unrotated))
    h = jax.lax.scan(body, h, (leaves, *kinds))[0]
  return h


def embed(config: ModelConfig, params, tokens: jax.Array) -> jax.Array:
  """Token embeddings [B,T,D], times sqrt(D) or another constant where the model has it so."""
  return _scaled(config, jnp.take(params["embed"]["embedding"], tokens, axis=0))


def _scaled(config: ModelConfig, h):
  # The factor is rounded to the dtype of the weights, as the model was trained.
  h = h * jnp.asarray(config.hidden_size**0.5, h.dtype) if config.scaled_embeddings else h
  return h if config.embedding_multiplier == 1 else h * config.embedding_multiplier


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


def head_input(config: ModelConfig, params, h: jax.Array) -> jax.Array:
  """What the vocabulary projection is applied to: the final norm of [..., D], over the divisor of the logits."""
  z = final_norm(config, params, h)
  return z if config.logits_divisor == 1 else z / config.logits_divisor


def logits(config: ModelConfig, params, tokens: jax.Array) -> jax.Array:
  """Logits of all positions, float32 [B,T,V]; for parity checks and small inputs."""
  h = run_layers(config, params["layers"], embed(config, params, tokens))
  return _logits(head_input(config, params, h), head_matrix(params), config.logit_cap)


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


def _logits(z, matrix, cap: float | None = None):
  product = jnp.einsum("...d,vd->...v", z, matrix, preferred_element_type=accumulation_dtype(z.dtype))
  return soft_cap(product, cap)
