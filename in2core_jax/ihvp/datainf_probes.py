"""DataInf's sums out of activations and output gradients: the gradient of an example is formed in no matrix.

Each block of DataInf is a leaf of one layer, and all that it takes of an example's gradient G = sum_t a_t g_t^T there
(its product with v, its length, its share of a weighted sum) follows from the inputs a_t and the output gradients g_t,
which meet in the backward pass (`moment_probes.observe`). So one pass over a batch is a gradient of the batch and a few
large matrix products, where `vmap` of `grad` forms P numbers an example.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util

from in2core_jax import gradients
from in2core_jax.gradients import Objective, Tree
from in2core_jax.params import moment_probes


def serves(objective: Objective, sub: Tree) -> bool:
  """Whether the model reads a probe beside every chosen leaf: no experts, nothing outside of the layers."""
  return objective.reads_probes and moment_probes.beside_all(sub)


def observed(
  objective: Objective, sub: Tree, frozen: Tree, batch: Tree, v: Tree | None, damping: Sequence[jax.Array] | None
) -> tuple[Tree | None, list[jax.Array]]:
  """(sum_i (g_il . v_l / (damping_l + |g_il|^2)) g_il, like v; |g_il|^2, per leaf [B, k]) of a batch. Pure.

  Args:
    objective: the loss; a row for each example.
    sub: chosen parameters. frozen: all others.
    batch: with `valid`; padding rows have a gradient of 0.
    v: right-hand sides, leaves [Q, k, ...]; None: only norms.
    damping: per leaf [k].
  """
  flat, size = traverse_util.flatten_dict(sub, sep="/"), batch.valid.shape[0]
  sides = {} if v is None else traverse_util.flatten_dict(v, sep="/")
  strengths = dict(zip(sorted(flat), damping, strict=True)) if damping is not None else {}
  probes = {}
  for path, leaf in flat.items():
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    probes[path] = moment_probes.block_probe(sides.get(path), strengths.get(path), leaf.shape[0], size, wide)
  found, _ = gradient_in_probes(objective, sub, frozen, batch, probes, ("norms", "sums"))
  norms = [found[path]["norms"].T for path in sorted(flat)]
  if v is None:
    return None, norms
  sums = {path: jnp.swapaxes(found[path]["sums"], 0, 1) for path in flat}
  return traverse_util.unflatten_dict(sums, sep="/"), norms


def gradient_in_probes(
  objective: Objective, sub: Tree, frozen: Tree, batch: Tree, probes: dict[str, dict[str, jax.Array]], asked
) -> tuple[dict[str, dict[str, jax.Array]], jax.Array]:
  """(leaf path -> name -> what the probes beside the leaves observe of a batch, of the names `asked`; losses [B])."""
  objective.separate(batch)  # refuses rows that hold several examples
  flat = traverse_util.flatten_dict(sub, sep="/")
  whole = {f"{path}_probe/{name}": value for path, probe in probes.items() for name, value in probe.items()}
  zeros = {path: whole.pop(path) for path in list(whole) if path.rpartition("/")[2] in asked}

  def total(zeros):
    with_probes = traverse_util.unflatten_dict(flat | whole | zeros, sep="/")
    losses = gradients.per_example_losses(objective, with_probes, frozen, batch)
    return jnp.sum(losses), losses

  found, losses = jax.grad(total, has_aux=True)(zeros)
  names = {path: [name for name in probe if name in asked] for path, probe in probes.items()}
  return {path: {name: found[f"{path}_probe/{name}"] for name in own} for path, own in names.items()}, losses
