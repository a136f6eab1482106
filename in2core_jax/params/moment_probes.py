"""Probes: leaves beside a matrix whose "gradient" is a moment of what the matrix sees in the backward pass.

Second moments of a layer's inputs and output gradients are no derivatives of the loss, but everything that they need
meets in the backward pass of y = x W: the input x, which is kept for it anyway, and the output gradient dl/dy. A probe
is a small tree of arrays that the model hands to `observe`; it does not change y, and reverse mode returns the moment
where the probe's gradient would stand. So one `jax.grad` in the probes, through any `vjp`, `lax.scan` or boundary,
gives the moments of all chosen layers; no hook, no stored activation, no per-example gradient.

Letters: B batch, T tokens (or nothing), a_t input [in] of a token, g_t gradient [out] of the *sum* of the examples'
losses in the token's output, so that of its own example's loss. G_i = sum_t a_t g_t^T is example i's gradient in W.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from in2core_jax import gradients

# A token counts when its gradient exceeds this many roundings of its example's largest one. Zeros by cancellation (the
# query of the first token, which sees only itself) come out as zero or as rounding, depending on the batch's shape.
ROUNDING = 64
# Examples whose rotated gradients [in, out] exist at the same time.
EXAMPLES_AT_ONCE = 4
LEAVES = r"layers/.*/(kernel|lora_a|lora_b|scale|bias)"  # beside which the decoder reads probes of single examples


def beside_all(sub: Any) -> bool:
  """Whether every leaf of a subtree, arrays or shapes, is one of `LEAVES`."""
  return all(re.fullmatch(LEAVES, path) for path in traverse_util.flatten_dict(sub, sep="/"))


def covariance_probe(leaf: jax.Array) -> dict[str, jax.Array]:
  """Zeros to hold the moments of a matrix leaf [..., in, out]; see `observe`."""
  lead, (inputs, outputs), dtype = leaf.shape[:-2], leaf.shape[-2:], _wide(leaf.dtype)
  shapes = {"inputs": (inputs, inputs), "outputs": (outputs, outputs), "tokens": ()}
  return {name: jnp.zeros(lead + shape, dtype) for name, shape in shapes.items()}


def square_probe(left: jax.Array, right: jax.Array) -> dict[str, jax.Array]:
  """Zeros to hold squared gradients in the bases left [..., in, in], right [..., out, out]; see `observe`."""
  squares = jnp.zeros((*left.shape[:-2], left.shape[-1], right.shape[-1]), left.dtype)
  return {"left": left, "right": right, "squares": squares}


@jax.custom_vjp
def observe(x: jax.Array, y: jax.Array, probe: dict[str, jax.Array]) -> jax.Array:
  """Returns y = x W unchanged; in reverse mode the probe's cotangent is what was observed, summed over the batch.

  A covariance probe receives, over the tokens that the loss reaches (g_t not 0 up to rounding: neither padding nor a
  prompt token on which no response token depends),

    inputs = sum_t a_t a_t^T     outputs = sum_t g_t g_t^T     tokens = how many they are

  A square probe receives squares = sum_i (left^T G_i right)^2, entry by entry, exact per example.

  Args:
    x: [B, ..., in].
    y: [B, ..., out], made of x by the matrix.
    probe: from `covariance_probe` or `square_probe`, without leading layer axes (`lax.scan` has taken them off).
  """
  del x, probe
  return y


def _forward(x, y, probe):
  return y, (x, probe)


def _backward(kept, cotangent):
  x, probe = kept
  wide = jax.tree.leaves(probe)[0].dtype
  size = x.shape[0]
  a = x.astype(wide).reshape(size, -1, x.shape[-1])
  g = cotangent.astype(wide).reshape(size, -1, cotangent.shape[-1])
  if "peak" in probe:
    seen = _measures_of_matrix(a, g, probe)
  elif "norms" in probe:
    seen = _blocks(a, g, probe)
  else:
    seen = _squares(a, g, probe) if "squares" in probe else _covariances(a, g)
  return None, cotangent, seen


observe.defvjp(_forward, _backward)


def _covariances(a, g) -> dict[str, jax.Array]:
  size = jnp.max(jnp.abs(g), axis=-1)
  reached = ~(size <= ROUNDING * jnp.finfo(g.dtype).eps * jnp.max(size, axis=1, keepdims=True))  # NaN counts: it shows
  a = a * reached[..., None]
  gram = lambda z: jnp.einsum("bti,btj->ij", z, z, precision="highest")  # noqa: E731
  return {"inputs": gram(a), "outputs": gram(g), "tokens": jnp.sum(reached, dtype=a.dtype)}


def _squares(a, g, probe) -> dict[str, jax.Array | None]:
  a = jnp.matmul(a, probe["left"], precision="highest")
  g = jnp.matmul(g, probe["right"], precision="highest")

  def add(total, pair):
    gradients = jnp.einsum("bti,btj->bij", *pair, precision="highest")
    return total + jnp.sum(gradients * gradients, axis=0), None

  short = -a.shape[0] % EXAMPLES_AT_ONCE  # filled up with examples of zeros
  cut = lambda z: jnp.pad(z, ((0, short), (0, 0), (0, 0))).reshape(-1, EXAMPLES_AT_ONCE, *z.shape[1:])  # noqa: E731
  squares = jax.lax.scan(add, jnp.zeros_like(probe["squares"]), (cut(a), cut(g)))[0]
  return {"left": None, "right": None, "squares": squares}


# ---- DataInf's sums ------------------------------------------------------------------


def block_probe(v: jax.Array | None, damping: jax.Array | None, layers: int, size: int, dtype) -> dict[str, jax.Array]:
  """Zeros to hold what DataInf takes of the examples' gradients G_i in a leaf; see `observe` and `observe_rows`.

    norms = |G_i|^2 of each example     sums = sum_i (G_i . v_q / (damping + |G_i|^2)) G_i

  Args:
    v: right-hand sides [Q, k, ...] of the leaf; None: only norms are asked for.
    damping: [k], of each layer's block.
    layers: k. size: B. dtype: of the sums.
  """
  norms = {"norms": jnp.zeros((layers, size), dtype)}
  if v is None:
    return norms
  v = jnp.swapaxes(v, 0, 1).astype(dtype)
  return norms | {"v": v, "damping": damping.astype(dtype), "sums": jnp.zeros_like(v)}


def _blocks(a, g, probe) -> dict[str, jax.Array | None]:
  """Of a matrix: inputs a [B, n, in] and output gradients g [B, n, out], G_i = a_i^T g_i never kept."""
  length, (inputs, outputs) = a.shape[1], (a.shape[2], g.shape[2])
  if length * (inputs + outputs) < inputs * outputs:
    pairs = jnp.einsum("bti,bsi->bts", a, a, precision="highest")
    norms = jnp.sum(pairs * jnp.einsum("bto,bso->bts", g, g, precision="highest"), axis=(1, 2))
  else:
    norms = _one_by_one(lambda a, g: jnp.sum(jnp.matmul(a.T, g, precision="highest") ** 2), a, g)
  if "sums" not in probe:
    return {"norms": norms}

  def of_query(v):
    along = jnp.matmul(a.reshape(-1, inputs), v, precision="highest").reshape(g.shape)
    weights = jnp.sum(along * g, axis=(1, 2)) / (probe["damping"] + norms)
    weighted = (a * weights[:, None, None]).reshape(-1, inputs)
    return jnp.matmul(weighted.T, g.reshape(-1, outputs), precision="highest")

  return {"v": None, "damping": None, "sums": jax.lax.map(of_query, probe["v"]), "norms": norms}


@jax.custom_vjp
def observe_rows(factor: jax.Array, y: jax.Array, probe: dict[str, jax.Array]) -> jax.Array:
  """Returns y unchanged; y = factor * w + ... of a leaf w [d] whose gradient of an example is sum_t factor_t g_t.

  Args:
    factor: [B, ..., d], or [1] for a bias.
    y: [B, ..., d].
    probe: of `block_probe`, without the layer axis.
  """
  del factor, probe
  return y


def _rows_backward(kept, cotangent):
  factor, probe = kept
  wide = jax.tree.leaves(probe)[0].dtype
  each = (cotangent.astype(wide) * factor).reshape(cotangent.shape[0], -1, cotangent.shape[-1])
  gradients = jnp.sum(each, axis=1)
  if "peak" in probe:
    return None, cotangent, _measures_of_rows(gradients, probe)
  norms = jnp.sum(gradients**2, axis=1)
  seen = {"norms": norms}
  if "sums" in probe:
    weights = jnp.matmul(probe["v"], gradients.T, precision="highest") / (probe["damping"] + norms)
    seen |= {"v": None, "damping": None, "sums": jnp.matmul(weights, gradients, precision="highest")}
  return None, cotangent, seen


observe_rows.defvjp(lambda factor, y, probe: (y, (factor, probe)), _rows_backward)


# ---- lengths, products and self-influence --------------------------------------------


def measure_probe(
  r: jax.Array | None, inverse: dict[str, jax.Array] | None, layers: int, size: int, dtype
) -> dict[str, jax.Array]:
  """Zeros to hold what `normalize` measures of the examples' gradients G_i in a leaf; see `observe`, `observe_rows`.

    peak_i, the size of the output gradients, and over it: norm = |G_i|, along = G_i . r_q, and with an inverse M
    own = sqrt(G_i . M G_i), mapped = |M G_i|: so that nothing underflows where gradients are small

  M is diagonal, or diagonal in a basis: M G = left ((left^T G right) / (values + damping)) right^T.

  Args:
    r: directions [Q, k, ...] of the leaf; None: no products.
    inverse: values [k, ...] like the leaf and damping [], in a basis also left [k, in, in] and right [k, out, out];
      None: the identity.
    layers: k. size: B. dtype: of what is measured.
  """
  zeros = jnp.zeros((layers, size), dtype)
  probe = {"peak": zeros, "norm": zeros}
  if r is not None:
    probe |= {"r": jnp.swapaxes(r, 0, 1).astype(dtype), "along": jnp.zeros((layers, size, r.shape[0]), dtype)}
  if inverse is not None:
    wide = {name: leaf.astype(dtype) for name, leaf in inverse.items()}
    wide["damping"] = jnp.broadcast_to(wide["damping"], (layers,))
    probe |= wide | {"own": zeros, "mapped": zeros}
  return probe


MEASURED = ("peak", "norm", "along", "own", "mapped")  # what comes out; the other parts of a probe are given


def _measures_of_matrix(a, g, probe) -> dict[str, jax.Array | None]:
  """Of a matrix: inputs a [B, n, in], output gradients g [B, n, out]; no more gradients than `EXAMPLES_AT_ONCE`."""
  g, peak = _over_peak(g)
  r, length, (inputs, outputs) = probe.get("r"), a.shape[1], (a.shape[2], g.shape[2])
  times = lambda x, y: jnp.matmul(x, y, precision="highest")  # noqa: E731
  queries = 0 if r is None else len(r)
  if "values" not in probe and queries <= 1 and length * (inputs + outputs) < inputs * outputs:
    pairs = times(a, a.mT) * times(g, g.mT)
    found = {"norm": jnp.sqrt(jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 0))}
    if queries:
      along = times(a.reshape(-1, inputs), r[0]).reshape(g.shape)
      found["along"] = jnp.sum(along * g, axis=(1, 2))[:, None]
  else:
    if "left" in probe:
      left, right = probe["left"], probe["right"]
      a, g, r = times(a, left), times(g, right), None if r is None else times(times(left.T, r), right)
    found = _one_by_one(lambda a, g: _measures(times(a.T, g), r, probe), a, g)
  return dict.fromkeys(probe) | found | {"peak": peak}


def _measures_of_rows(gradients, probe) -> dict[str, jax.Array | None]:
  """Of a leaf [d] whose gradients [B, d] are there."""
  gradients, peak = _over_peak(gradients)
  found = jax.vmap(lambda g: _measures(g, probe.get("r"), probe))(gradients)
  return dict.fromkeys(probe) | found | {"peak": peak}


def _measures(gradient, r, probe) -> dict[str, jax.Array]:
  """Of one gradient, in the basis in which the inverse is diagonal."""
  found = {"norm": jnp.sqrt(jnp.sum(gradient**2))}
  if r is not None:
    found["along"] = jnp.matmul(r.reshape(len(r), -1), gradient.ravel(), precision="highest")
  if "values" in probe:
    inverse = 1 / (probe["values"] + probe["damping"])
    largest = jnp.max(inverse)
    share = inverse / largest  # its squares stay numbers
    found["own"] = jnp.sqrt(largest * jnp.sum(gradient**2 * share))
    found["mapped"] = largest * jnp.sqrt(jnp.sum((gradient * share) ** 2))
  return found


def _over_peak(g):
  """(g [B, ...] over its largest number, that number [B]); where it is 0 or not finite, g itself and 1 for it."""
  peak = jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)))
  peak = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
  return g / peak.reshape(-1, *(1,) * (g.ndim - 1)), peak


def _one_by_one(fn, *arrays):
  """Stacks fn of each example's part of arrays [B, ...], `EXAMPLES_AT_ONCE` together."""
  return gradients.map_examples(lambda parts: fn(*(part[0] for part in parts)), arrays, EXAMPLES_AT_ONCE)


# ---- projected gradients of single examples ------------------------------------------


def sketch_probe(left: jax.Array, right: jax.Array, members: jax.Array, most: int) -> dict[str, jax.Array]:
  """A probe of the two-sided projection of each example's gradient, where rows hold several examples.

  Args:
    left: [k, in, p], or [k, E, in, p] beside the matrices of E experts. right: [k, q, out], or [k, E, q, out].
    members: int32 [W, T], which example of its row a token belongs to; `most` on padding.
    most: S, examples of a row at most.

  Returns:
    The probe of k layers; "cores" is what a gradient is taken in, zeros [k, W, S, p, q].
  """
  layers, size = left.shape[0], members.shape[0]
  cores = jnp.zeros((layers, size, most, left.shape[-1], right.shape[-2]), _wide(left.dtype))
  return {"left": left, "right": right, "members": jnp.broadcast_to(members, (layers, *members.shape)), "cores": cores}


@jax.custom_vjp
def sketched(x: jax.Array, y: jax.Array, probe: dict[str, jax.Array]) -> jax.Array:
  """Returns y = x W unchanged; in reverse mode the probe's `cores` receive left^T G_i right^T of each example i.

  G_i = sum_t a_t g_t^T over the tokens of example i is never formed: both sides are projected first. Of experts it is
  the sum over them, as their one core has it (`adapters.add_sketch`).

  Args:
    x: [W, T, in], or [W, E, T, in] beside the matrices of experts.
    y: [W, T, out], or [W, E, T, out].
    probe: of `sketch_probe`, without leading layer axes.
  """
  del x, probe
  return y


def _sketch_forward(x, y, probe):
  return y, (_low(x, probe["left"]), probe)


def _low(x, matrix):
  matrix = matrix.astype(x.dtype)
  if matrix.ndim == 2:
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)
  return jnp.einsum("wtd,edp->wetp" if x.ndim == 3 else "wetd,edp->wetp", x, matrix)


def _sketch_backward(kept, cotangent):
  low, probe = kept
  high = _low(cotangent, jnp.swapaxes(probe["right"], -1, -2))
  members, (size, most) = probe["members"], probe["cores"].shape[:2]
  if low.ndim == 4:
    members = jnp.broadcast_to(members[:, None], low.shape[:3]).reshape(size, -1)
  wide = probe["cores"].dtype
  low, high = (side.astype(wide).reshape(size, -1, side.shape[-1]) for side in (low, high))
  apart = jax.nn.one_hot(members, most, dtype=wide)[..., None] * low[:, :, None]
  cores = jnp.einsum("wtk,wtq->wkq", apart.reshape(*apart.shape[:2], -1), high, precision="highest")
  seen = {"left": None, "right": None, "members": None, "cores": cores.reshape(probe["cores"].shape)}
  return None, cotangent, seen


sketched.defvjp(_sketch_forward, _sketch_backward)


def _wide(dtype) -> Any:
  return jnp.promote_types(dtype, jnp.float32)
