"""Derivatives of per-example losses over a parameter subtree.

Symbols
  sub      the chosen parameters, any pytree; P numbers in all
  frozen   all other parameters: arguments, never differentiated, never captured
  batch    pytree whose leaves have a leading example axis B; `batch.valid` [B] is 0 on padding rows
  z        outputs of the model, [B, ...]; losses(z) is convex in z for the Gauss-Newton product to be positive
  l_i      loss of example i; g_i = dl_i / dsub
  v        a direction: pytree like sub

Everything here is pure and returns *sums* over the examples of one batch, in float32 at least, so that batches of any
size add up to the same mean: divide by the number of examples at the very end. Callers jit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from optax import microbatching

Tree = Any
# Accelerators multiply float32 in fewer bits unless told otherwise; these products are bound by memory, so it is free.
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Objective:
  """A model and its loss, seen as functions of the subtree.

  Attributes:
    outputs: (sub, frozen, batch) -> z, array [B, ...].
    losses: (z, frozen, batch) -> [B], zero on padding rows and on examples without response.
    output_hvp: (z, dz, frozen, batch) -> Hessian of sum(losses) in z times dz; derived from `losses` when None.
    separate: batch -> the same batch with a leading example axis on every leaf, so that it can be cut into examples.
    reads_probes: whether the model reads probes beside its leaves (`moment_probes`).
  """

  outputs: Callable[[Tree, Tree, Tree], jax.Array]
  losses: Callable[[jax.Array, Tree, Tree], jax.Array]
  output_hvp: Callable[[jax.Array, jax.Array, Tree, Tree], jax.Array] | None = None
  separate: Callable[[Tree], Tree] = lambda batch: batch
  reads_probes: bool = False


def widen(tree: Tree) -> Tree:
  """Casts every leaf to float32 at least: half-precision gradients are added up in single precision."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def like(direction: Tree, sub: Tree) -> Tree:
  """Casts a direction to the dtypes of `sub`, which `jax.jvp` asks for."""
  return jax.tree.map(lambda d, s: d.astype(s.dtype), direction, sub)


def tree_dot(a: Tree, b: Tree) -> jax.Array:
  """Inner product of two pytrees, reduced in float32 at least."""
  pairs = zip(jax.tree.leaves(widen(a)), jax.tree.leaves(widen(b)), strict=True)
  return sum(jnp.vdot(x, y, precision=HIGHEST) for x, y in pairs)


def per_example_losses(objective: Objective, sub: Tree, frozen: Tree, batch: Tree) -> jax.Array:
  """l_i for each example, [B]."""
  return objective.losses(objective.outputs(sub, frozen, batch), frozen, batch)


def sum_gradient(objective: Objective, sub: Tree, frozen: Tree, batch: Tree) -> Tree:
  """sum_i g_i over the batch, like `sub`, float32 at least."""
  return widen(jax.grad(lambda s: jnp.sum(per_example_losses(objective, s, frozen, batch)))(sub))


def per_example_gradients(
  objective: Objective, sub: Tree, frozen: Tree, batch: Tree, microbatch: int | None = None
) -> Tree:
  """g_i for each example: leaves [B, ...] like `sub`; `vmap` of `grad`, `microbatch` examples at a time.

  Memory: B * P numbers for the result, `microbatch` times the activations of one example while it runs.
  """
  return map_examples(
    lambda one: widen(_example_gradient(objective, sub, frozen, one)), objective.separate(batch), microbatch
  )


def adapter_gradients(objective: Objective, sub: Tree, frozen: Tree, batch: Tree) -> Tree:
  """g_i for each example, leaves [B, ...], for adapter leaves [k, in, out] that the model applies as x[B,T,in] @ leaf.

  Each example gets its own copy of the (small) leaf, [k, B, in, out], which `@` applies example by example, so that one
  backward pass over the whole batch gives every g_i. The frozen kernels keep their one large matrix product and the
  batch its flat response slots, both of which `vmap` of `grad` gives up.
  """
  objective.separate(batch)  # refuses rows that hold several examples: a copy of the leaf belongs to a row
  return with_adapter_gradients(lambda s: (per_example_losses(objective, s, frozen, batch), ()), sub, batch)[1]


def with_adapter_gradients(losses: Callable[[Tree], tuple[jax.Array, Tree]], sub: Tree, batch: Tree) -> tuple:
  """What a pass gives, and the gradients of `adapter_gradients` out of the same pass.

  Args:
    losses: sub, its leaves a copy for each example -> (l_i [B], anything else).
    sub: adapter leaves.
    batch: with a row for each example.

  Returns:
    ((l_i, anything else), g_i).
  """
  size = batch.valid.shape[0]
  copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:, None], (leaf.shape[0], size, *leaf.shape[1:])), sub)

  def total(s):
    found = losses(s)
    return jnp.sum(found[0]), found

  gradient, found = jax.grad(total, has_aux=True)(copies)
  return found, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), widen(gradient))


def losses_and_jvp_scores(
  objective: Objective, sub: Tree, frozen: Tree, batch: Tree, direction: Tree
) -> tuple[jax.Array, jax.Array]:
  """(l_i, g_i . v) for each example, [B] each, by one forward-mode pass: no gradient is ever formed.

  d/de l_i(sub + e v) at e = 0 (the scoring rule of google-research/jax-influence), which has the losses anyway.

  Args:
    direction: v, like `sub`, without a query axis.
  """
  losses = lambda s: per_example_losses(objective, s, frozen, batch)  # noqa: E731
  return jax.jvp(losses, (sub,), (like(direction, sub),))


def vmap_scores(
  objective: Objective, sub: Tree, frozen: Tree, batch: Tree, directions: Tree, microbatch: int | None = None
) -> jax.Array:
  """g_i . v_q for each query and example, [Q, B]; each microbatch of gradients is contracted at once and forgotten.

  Args:
    directions: leaves [Q, ...].
  """
  scores = leaf_scores(objective, sub, frozen, batch, directions, microbatch)
  return sum(jnp.sum(leaf, axis=tuple(range(2, leaf.ndim))) for leaf in jax.tree.leaves(scores))


def leaf_scores(
  objective: Objective, sub: Tree, frozen: Tree, batch: Tree, directions: Tree, microbatch: int | None = None
) -> Tree:
  """Like `vmap_scores`, but apart for each leaf and each index of its leading axis: leaves [Q, B, k].

  For a stacked leaf [k, ...] the entries are the contributions of the k chosen layers; the entries of all leaves add up
  to the score. A leaf [D] gives [Q, B, D], a number gives [Q, B, 1].
  """
  wide = widen(directions)

  def one_example(one):
    gradient = widen(_example_gradient(objective, sub, frozen, one))
    return jax.tree.map(_contract, gradient, wide)

  scores = map_examples(one_example, objective.separate(batch), microbatch)  # leaves [B, Q, k]
  return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), scores)


def _contract(gradient, directions):
  queries = directions.shape[0]
  if gradient.ndim <= 1:
    return (directions * gradient).reshape(queries, -1)
  rows = gradient.shape[0]
  return jnp.einsum("kp,qkp->qk", gradient.reshape(rows, -1), directions.reshape(queries, rows, -1), precision=HIGHEST)


def ggn_product(objective: Objective, sub: Tree, frozen: Tree, batch: Tree, v: Tree) -> Tree:
  """sum_i J_i^T H_out,i J_i v, J = dz/dsub, H_out = Hessian of the loss in the outputs: generalised Gauss-Newton."""
  outputs = lambda s: objective.outputs(s, frozen, batch)  # noqa: E731
  z, push = jax.linearize(outputs, sub)  # one forward pass serves J v and J^T
  dz = push(like(v, sub))
  if objective.output_hvp is not None:
    moved = objective.output_hvp(z, dz, frozen, batch)
  else:
    moved = jax.jvp(jax.grad(lambda out: jnp.sum(objective.losses(out, frozen, batch))), (z,), (dz,))[1]
  return widen(jax.linear_transpose(push, sub)(moved.astype(z.dtype))[0])


def fisher_product(objective: Objective, sub: Tree, frozen: Tree, batch: Tree, v: Tree) -> Tree:
  """sum_i g_i (g_i . v), the empirical Fisher product, as one jvp and one vjp: no per-example gradient is formed."""
  losses = lambda s: per_example_losses(objective, s, frozen, batch)  # noqa: E731
  _, push = jax.linearize(losses, sub)
  return widen(jax.linear_transpose(push, sub)(push(like(v, sub)))[0])


def hessian_product(objective: Objective, sub: Tree, frozen: Tree, batch: Tree, v: Tree) -> Tree:
  """sum_i (d^2 l_i / dsub^2) v, forward over reverse."""
  total = lambda s: jnp.sum(per_example_losses(objective, s, frozen, batch))  # noqa: E731
  return widen(jax.jvp(jax.grad(total), (sub,), (like(v, sub),))[1])


CURVATURE_PRODUCTS = {"ggn": ggn_product, "fisher": fisher_product, "hessian": hessian_product}


# Queries that go through a curvature product at the same time. From 11 on, at the size of a real model, XLA's CPU
# compiler (jaxlib 0.10.2) gives false products for all queries but the first; few at a time also bound the memory.
QUERIES_AT_ONCE = 4
# Numbers in the outputs of these queries together: logits, if the head is chosen.
OUTPUTS_AT_ONCE = 2**25


def over_queries(product: Callable[..., Tree]) -> Callable[..., Tree]:
  """Gives a curvature product a leading query axis on v: leaves [Q, ...] in and out.

  A few queries after the others, and one after the other for the Hessian, which has logits for each of them.
  """

  def batched(objective, sub, frozen, batch, v):
    if jax.tree.leaves(v)[0].shape[0] == 1:  # the coreset case: spare XLA a batch dimension of one
      single = product(objective, sub, frozen, batch, jax.tree.map(lambda leaf: leaf[0], v))
      return jax.tree.map(lambda leaf: leaf[None], single)
    outputs = jax.eval_shape(lambda s: objective.outputs(s, frozen, batch), sub)
    size = sum(leaf.size for leaf in jax.tree.leaves(outputs))
    most = 1 if product is hessian_product else QUERIES_AT_ONCE
    at_once = max(1, min(most, OUTPUTS_AT_ONCE // max(size, 1)))
    one = lambda own: product(objective, sub, frozen, batch, own)  # noqa: E731
    queries = jax.tree.leaves(v)[0].shape[0]
    return jax.vmap(one)(v) if queries <= at_once else jax.lax.map(one, v, batch_size=at_once)

  return batched


def map_examples(fn: Callable[[Tree], Tree], batch: Tree, microbatch: int | None) -> Tree:
  """Stacks fn(example) over the examples of a batch, `microbatch` at a time (`vmap` inside, a loop outside).

  `fn` sees one example as a batch of size one. optax asks for a size that divides B: the batch is filled up with its
  last example, what comes of it is cut off. Its microbatches take every (B / microbatch)-th example, so that a batch
  sharded over devices keeps all of them busy; putting the result in order again copies it once.
  """
  one = lambda example: fn(jax.tree.map(lambda leaf: leaf[None], example))  # noqa: E731
  size = jax.tree.leaves(batch)[0].shape[0]
  if microbatch is None or microbatch >= size:
    return jax.vmap(one)(batch)
  short = -size % microbatch
  filled = jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], short, axis=0)]), batch)
  out = microbatching.micro_vmap(one, microbatch_size=microbatch)(filled if short else batch)
  return jax.tree.map(lambda leaf: leaf[:size], out)


def fold_examples(step: Callable[[Tree, Tree], Tree], start: Tree, batch: Tree, microbatch: int | None) -> Tree:
  """step(... step(step(start, part), part) ..., part) over parts of `microbatch` examples, one after the other.

  Args:
    step: (state, part of the batch) -> state; rows whose `valid` is 0 must add nothing.
    start: the first state, a pytree of arrays.
    batch: leaves with a leading example axis.
    microbatch: examples of a part; None: all of them. A part takes every (B / microbatch)-th example, as in
      `map_examples`; a batch of another size is filled up with zeros.
  """
  size = jax.tree.leaves(batch)[0].shape[0]
  if microbatch is None or microbatch >= size:
    return step(start, batch)
  count = -(-size // microbatch)

  def cut(leaf):
    short = jnp.zeros((count * microbatch - size, *leaf.shape[1:]), leaf.dtype)
    return jnp.swapaxes(jnp.concatenate([leaf, short]).reshape(microbatch, count, *leaf.shape[1:]), 0, 1)

  return jax.lax.scan(lambda state, part: (step(state, part), None), start, jax.tree.map(cut, batch))[0]


def _example_gradient(objective, sub, frozen, one):
  return jax.grad(lambda s: jnp.sum(per_example_losses(objective, s, frozen, one)))(sub)
