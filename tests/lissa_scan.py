"""LiSSA as one compiled `lax.scan` over stacked batches, against which the solver's loop is held."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.ihvp import lissa, tree_math
from in2core_jax.ihvp.lissa_schedule import step_factors
from in2core_jax.ihvp.lissa_state import LissaSettings
from in2core_jax.ihvp.operators import Curvature
from in2core_jax.ihvp.tree_math import Tree


def batch_mean(curvature: Curvature, batch: Tree, v: Tree) -> Tree:
  """H_B v, the mean over one batch: (1/n) sum_i H_i v. Pure; meant to be traced.

  Args:
    curvature: products of H.
    batch: pytree.
    v: pytree, leaves [Q, ...].

  Returns:
    Pytree like v, f32 or better; 0 for a batch of padding only.
  """
  total = tree_math.promote(curvature.product(curvature.context, batch, v))
  count = jnp.maximum(jnp.asarray(curvature.num_examples(batch)), 1)
  return jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), total)


@partial(jax.jit, static_argnums=(0, 1))
def _scan(product, num_examples, context, batches, v, first, factors):
  steps, damping, scale = factors
  v_norm = tree_math.norm(v)

  def body(iterate, inputs):
    batch, step = inputs
    hu = batch_mean(Curvature(product, num_examples, context), batch, iterate[0])
    iterate, _, residual = lissa._advance(hu, v, iterate, (*step, damping, scale))
    return iterate, jnp.where(residual == 0, 0, residual / v_norm)

  (u, _, mean), curve = jax.lax.scan(body, first, (batches, steps))
  return tree_math.scaled(1 / scale, u if mean is None else mean), curve


def lissa_scan(curvature: Curvature, v: Tree, batches: Tree, settings: LissaSettings) -> tuple[Tree, jax.Array]:
  """One run of LiSSA as a single compiled `lax.scan` over stacked batches, no checks on the way.

  Args:
    curvature: products of H on one batch.
    v: right-hand side, leaves [Q, ...].
    batches: pytree, leaves [depth, ...]: one batch per step.
    settings: damping, scale (required here), acceleration, average; depth comes from the batches.

  Returns:
    (solution, leaves [Q, ...]; residual of each step on its own minibatch, [depth, Q]). The caller looks at the curve:
    above 1 the answer is worse than zero.
  """
  v = tree_math.promote(v)
  depth = jax.tree.leaves(batches)[0].shape[0]
  steps = jnp.asarray(np.array(step_factors(settings, settings.scale, depth)))
  first = (v, lissa._rest(v, settings), v if settings.average else None)
  factors = (steps, float(settings.damping), float(settings.scale))
  return _scan(curvature.product, curvature.num_examples, curvature.context, batches, v, first, factors)
