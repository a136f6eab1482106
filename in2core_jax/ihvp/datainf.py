"""DataInf: the closed-form inverse per block of the subtree, streamed over per-example gradients.

Letters: Q queries, B examples of a batch, n examples in all, k chosen layers stacked in a leaf, l a block, d_l its
size.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax import gradients
from in2core_jax.errors import UserError
from in2core_jax.ihvp import tree_math
from in2core_jax.ihvp.operators import Matvec, SolveResult, check_damping, safe_ratio
from in2core_jax.ihvp.tree_math import Tree
from in2core_jax.params import subtree
from in2core_jax.runs import resumable

GRANULARITIES = ("matrix", "layer")


@dataclasses.dataclass(frozen=True)
class DataInfSettings:
  """Settings of `datainf`; exactly one of damping and damping_ratio.

  Attributes:
    damping: absolute, the same for every block; above 0.
    damping_ratio: damping_l = damping_ratio * mean_i |g_il|^2 / d_l, the DataInf paper's choice with 0.1 (section 4 of
      arXiv 2310.00902); costs one more pass. Not relative to the largest eigenvalue, as the other solvers' is.
    granularity: "matrix": every matrix of every layer is a block (the paper's); "layer": a layer's matrices together.
    stacked_under: leaves below this key have a leading layer axis (behind the query axis); None: no leaf has.
  """

  damping: float | None = None
  damping_ratio: float | None = None
  granularity: str = "matrix"
  stacked_under: str | None = "layers"

  def __post_init__(self):
    if (self.damping is None) == (self.damping_ratio is None):
      raise UserError(
        f"DataInf with damping={self.damping} and damping_ratio={self.damping_ratio}: give exactly one of the two"
      )
    check_damping(self.damping if self.damping is not None else self.damping_ratio, positive=True)
    if self.granularity not in GRANULARITIES:
      raise UserError(f"unknown granularity {self.granularity!r}: choose one of {', '.join(GRANULARITIES)}")


@dataclasses.dataclass(frozen=True)
class ExampleGradients:
  """A stream of per-example gradients; weights go into `context`, never into a closure.

  Attributes:
    function: function(context, batch) -> (gradients, leaves [B, ...]; valid [B], 0 on padding rows); pure.
    batches: gives a fresh iterator over all examples' batches each time it is called.
    context: pytree handed through: parameters.
    separate: batch -> the same with a leading example axis on every leaf, so that it can be cut.
    microbatch: gradients that exist at the same time; None: those of a batch. A part of it is filled up with zeros, on
      which `function` must give `valid` 0.
    observed: (context, batch, v or None, damping or None) -> (sums like v, norms per leaf [B, k], valid [B]), which
      does without gradients (`datainf_probes`), where the blocks are the leaves of a layer; None where there is none.
  """

  function: Callable[[Tree, Tree], tuple[Tree, jax.Array]]
  batches: Callable[[], Iterable[Tree]]
  context: Tree = ()
  separate: Callable[[Tree], Tree] = lambda batch: batch
  microbatch: int | None = None
  observed: Callable[[Tree, Tree, Tree | None, Any], tuple[Tree, list[jax.Array], jax.Array]] | None = None

  @property
  def kernel(self) -> tuple[Callable, Callable, int | None]:
    """What steers compilation."""
    return self.function, self.separate, self.microbatch


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How the leaves fall into blocks; hashable, so that it can steer compilation.

  Attributes:
    stacked: per leaf, how many leading axes count blocks: layers, and experts behind them where these are not joined.
    joined: whether all stacked leaves of one layer form one block.
    names: per leaf, its path.
  """

  stacked: tuple[int, ...]
  joined: bool
  names: tuple[str, ...]


def make_blocks(v: Tree, granularity: str = "matrix", stacked_under: str | None = "layers") -> Blocks:
  """Blocks of a subtree.

  Args:
    v: pytree, leaves [Q, ...]; stacked ones [Q, k, ...].
    granularity: "matrix" or "layer".
    stacked_under: the key above stacked leaves.

  Returns:
    Blocks.

  Raises:
    UserError: granularity "layer" with stacked leaves of different numbers of layers.
  """
  paths = jax.tree_util.tree_flatten_with_path(v)[0]
  names = tuple("/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths)
  stacked = tuple(int(stacked_under is not None and stacked_under in name.split("/")[:-1]) for name in names)
  depths = sorted({leaf.shape[1] for (_, leaf), flag in zip(paths, stacked, strict=True) if flag})
  if granularity == "layer" and len(depths) > 1:
    raise UserError(
      f"granularity=layer, but leaves under {stacked_under!r} stack {depths} layers: use granularity=matrix"
    )
  if granularity == "matrix":
    stacked = tuple(flag + (flag and subtree.is_of_experts(name)) for flag, name in zip(stacked, names, strict=True))
  return Blocks(stacked, granularity == "layer", names)


def _flat(leaf: jax.Array, stacked: int) -> jax.Array:
  """[N, k, d] of a leaf [N, k, ...], [N, k E, d] of one stacked over experts too, [N, 1, d] of one that is not."""
  return leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1 : 1 + stacked]), -1)


def _join(values: list, blocks: Blocks) -> list:
  """Per-leaf sums -> per-block sums: with joined layers every stacked leaf gets the sum over all stacked leaves."""
  if not blocks.joined:
    return values
  total = sum(value for value, flag in zip(values, blocks.stacked, strict=True) if flag)
  return [total if flag else value for value, flag in zip(values, blocks.stacked, strict=True)]


def _rows(tree: Tree, blocks: Blocks) -> list[jax.Array]:
  leaves = jax.tree.leaves(tree_math.promote(tree))
  return [_flat(leaf, flag) for leaf, flag in zip(leaves, blocks.stacked, strict=True)]


def _masked(grads: Tree, valid: jax.Array, blocks: Blocks) -> list[jax.Array]:
  """Gradients as [B, k, d] with padding rows set to 0, whatever they held."""
  keep = (jnp.asarray(valid) > 0)[:, None, None]
  return [jnp.where(keep, leaf, 0) for leaf in _rows(grads, blocks)]


def squared_norms(grads: Tree, valid: jax.Array, blocks: Blocks) -> list[jax.Array]:
  """|g_il|^2 of every example and block.

  Args:
    grads: per-example gradients, leaves [B, ...].
    valid: [B], 0 on padding rows.
    blocks: from `make_blocks`.

  Returns:
    per leaf [B, k], the block's value repeated for each of its leaves.
  """
  return _join([jnp.sum(leaf * leaf, axis=-1) for leaf in _masked(grads, valid, blocks)], blocks)


def datainf_start(v: Tree, blocks: Blocks) -> tuple[list[jax.Array], jax.Array]:
  """The empty state of `datainf_accumulate`: (weighted sums per leaf [Q, k, d], number of examples)."""
  sums = [jnp.zeros_like(leaf) for leaf in _rows(v, blocks)]
  return sums, jnp.zeros((), sums[0].dtype)


def datainf_accumulate(state, v: Tree, grads: Tree, valid: jax.Array, damping: list[jax.Array], blocks: Blocks):
  """Adds a batch: sum_i (g_il . v_l / (damping_l + |g_il|^2)) g_il and the count of examples. Pure, jit-able.

  Args:
    state: from `datainf_start` or this function.
    v: right-hand side, leaves [Q, ...].
    grads: per-example gradients, leaves [B, ...].
    valid: [B], 0 on padding rows.
    damping: per leaf [k], above 0.
    blocks: from `make_blocks`.

  Returns:
    the next state.
  """
  sums, count = state
  rows, queries = _masked(grads, valid, blocks), _rows(v, blocks)
  norms = _join([jnp.sum(leaf * leaf, axis=-1) for leaf in rows], blocks)
  # precision: the default on accelerators multiplies in bfloat16.
  dots = [jnp.einsum("qkd,bkd->qbk", q, g, precision="highest") for q, g in zip(queries, rows, strict=True)]
  dots = _join(dots, blocks)
  added = [
    total + jnp.einsum("qbk,bkd->qkd", dot / (lam + norm), g, precision="highest").astype(total.dtype)
    for total, dot, lam, norm, g in zip(sums, dots, damping, norms, rows, strict=True)
  ]
  return added, count + jnp.sum(jnp.asarray(valid) > 0).astype(count.dtype)


def datainf_finish(state, v: Tree, damping: list[jax.Array], blocks: Blocks) -> Tree:
  """r_l = (1 / damping_l) (v_l - sums_l / n); pytree like v, f32 or better."""
  sums, count = state
  leaves, structure = jax.tree.flatten(tree_math.promote(v))
  solved = [
    ((_flat(leaf, flag) - total / count) / lam[:, None]).reshape(leaf.shape)
    for leaf, flag, total, lam in zip(leaves, blocks.stacked, sums, damping, strict=True)
  ]
  return jax.tree.unflatten(structure, solved)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _pass(kernel, blocks, context, state, v, damping, batch):
  function, separate, microbatch = kernel
  step = lambda state, part: datainf_accumulate(state, v, *function(context, part), damping, blocks)  # noqa: E731
  return gradients.fold_examples(step, state, separate(batch), microbatch)


@partial(jax.jit, static_argnums=(0, 1))
def _norm_pass(kernel, blocks, context, carry, batch):
  function, separate, microbatch = kernel

  def step(carry, part):
    sums, count = carry
    grads, valid = function(context, part)
    norms = squared_norms(grads, valid, blocks)
    sums = [total + jnp.sum(norm, axis=0) for total, norm in zip(sums, norms, strict=True)]
    return sums, count + jnp.sum(valid > 0).astype(count.dtype)

  return gradients.fold_examples(step, carry, separate(batch), microbatch)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _observed_pass(observed, blocks, context, state, v, damping, batch):
  sums, count = state
  found, _, valid = observed(context, batch, v, damping)
  added = [total + part.astype(total.dtype) for total, part in zip(sums, _rows(found, blocks), strict=True)]
  return added, count + jnp.sum(valid > 0).astype(count.dtype)


@partial(jax.jit, static_argnums=(0,))
def _observed_norms(observed, context, carry, batch):
  sums, count = carry
  _, norms, valid = observed(context, batch, None, None)
  sums = [total + jnp.sum(norm, axis=0).astype(total.dtype) for total, norm in zip(sums, norms, strict=True)]
  return sums, count + jnp.sum(valid > 0).astype(count.dtype)


_finish = partial(jax.jit, static_argnums=(3,))(datainf_finish)


@partial(jax.jit, static_argnums=(4,))
def _residual_parts(hx, x, v, damping, blocks):
  rows = [_rows(tree, blocks) for tree in (hx, x, v)]
  error = [h + lam[:, None] * one - right for h, one, right, lam in zip(*rows, damping, strict=True)]
  return tree_math.norm(error), tree_math.norm(v)


def block_damping(v: Tree, source: ExampleGradients, settings: DataInfSettings, blocks: Blocks) -> list[jax.Array]:
  """damping_l of every block: absolute, or damping_ratio * mean_i |g_il|^2 / d_l (one pass over the gradients).

  Args:
    v: right-hand side, leaves [Q, ...].
    source: the gradients.
    settings: which of the two.
    blocks: from `make_blocks`.

  Returns:
    per leaf [k]. A block where all gradients and v are 0 gets 1: its answer is 0 whatever the damping.

  Raises:
    UserError: all gradients of a block are 0 (so its damping is 0) but v is not.
  """
  rows = _rows(v, blocks)
  if settings.damping is not None:
    return [jnp.full(leaf.shape[1:2], settings.damping, leaf.dtype) for leaf in rows]
  carry = ([jnp.zeros(leaf.shape[1:2], leaf.dtype) for leaf in rows], jnp.zeros((), rows[0].dtype))
  if source.observed is not None and not blocks.joined:
    add = lambda carry, batch: _observed_norms(source.observed, source.context, carry, batch)  # noqa: E731
  else:
    add = lambda carry, batch: _norm_pass(source.kernel, blocks, source.context, carry, batch)  # noqa: E731
  carry = resumable.total(source.batches, "norms", add, carry)
  count = _require_examples(carry[1])
  sizes = _join([np.float64(leaf.shape[2]) for leaf in rows], blocks)
  wanted = _join([np.asarray(jnp.max(jnp.abs(leaf), axis=(0, 2)), np.float64) for leaf in rows], blocks)
  damping = []
  for name, total, size, peak, leaf in zip(blocks.names, carry[0], sizes, wanted, rows, strict=True):
    values = settings.damping_ratio * np.asarray(total, np.float64) / count / size
    bad = ~(values > 0) & (peak > 0)
    if bad.any() or not np.all(np.isfinite(values)):
      layer = int(np.flatnonzero(bad | ~np.isfinite(values))[0])
      raise UserError(
        f"DataInf: block {name}[{layer}] has damping {values[layer]:.3g}, since its training gradients are all 0 or "
        "not finite while the query's is not 0: give an absolute damping, or leave these modules out"
      )
    damping.append(jnp.asarray(np.where(values > 0, values, 1.0), leaf.dtype))
  return damping


def _require_examples(count: jax.Array) -> float:
  if not float(count) > 0:
    raise UserError("DataInf got no example: give at least one training example with a response")
  return float(count)


def datainf(v: Tree, source: ExampleGradients, settings: DataInfSettings, matvec: Matvec | None = None) -> SolveResult:
  """r_l = (1/damping_l) (v_l - (1/n) sum_i (g_il.v_l / (damping_l + |g_il|^2)) g_il), per block l.

  Equals (1/n) sum_i (damping_l I + g_il g_il^T)^-1 v_l: DataInf (arXiv 2310.00902) swaps the mean and the inverse of
  the Fisher's blocks, so its residual does not vanish; method.md section 3.

  Args:
    v: right-hand side, leaves [Q, ...].
    source: per-example gradients of the curvature's examples, streamed.
    settings: damping and granularity.
    matvec: H v; when given, the residual |(H + damping_l) r - v| / |v| is measured, with each block's own damping.

  Returns:
    SolveResult; steps counts batches of the main pass; residual is NaN without `matvec`.

  Raises:
    UserError: damping 0, no examples, a malformed v.
  """
  queries = tree_math.num_queries(v)
  v = tree_math.promote(v)
  blocks = make_blocks(v, settings.granularity, settings.stacked_under)
  damping = block_damping(v, source, settings, blocks)

  def add(found, batch):
    state, steps = found
    if source.observed is not None and not blocks.joined:
      return _observed_pass(source.observed, blocks, source.context, state, v, damping, batch), steps + 1
    return _pass(source.kernel, blocks, source.context, state, v, damping, batch), steps + 1

  state, steps = resumable.total(source.batches, "sums", add, (datainf_start(v, blocks), jnp.zeros((), jnp.int32)))
  count = _require_examples(state[1])
  solution = _finish(state, v, damping, blocks)
  residual = np.full(queries, np.nan)
  if matvec is not None:
    residual = safe_ratio(*_residual_parts(matvec(solution), solution, v, damping, blocks))
  curve = [] if matvec is None else [(int(steps), residual)]
  return SolveResult(solution, residual, int(steps), curve, _facts(settings, blocks, damping, count, residual))


def _facts(settings: DataInfSettings, blocks: Blocks, damping: list, count: float, residual) -> dict[str, Any]:
  """What is printed and saved: one damping per block."""
  values = {name: [float(x) for x in np.asarray(lam)] for name, lam in zip(blocks.names, damping, strict=True)}
  every = [x for row in values.values() for x in row]
  return {
    "solver": "datainf",
    "curvature": "fisher",
    "granularity": settings.granularity,
    "damping": settings.damping if settings.damping is not None else float(np.median(every)),
    "damping_ratio": settings.damping_ratio,
    "damping_min": min(every),
    "damping_max": max(every),
    "block_damping": values,
    "examples": int(count),
    "residual_measured": bool(np.all(np.isfinite(residual))),
  }
