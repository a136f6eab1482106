"""DataInf's sums out of activations and output gradients: the gradient of an example is formed in no matrix.

Each block of DataInf is a leaf of one layer, and all that it takes of an example's gradient G = sum_t a_t g_t^T there
(its product with v, its length, its share of a weighted sum) follows from the inputs a_t and the output gradients g_t,
which meet in the backward pass (`moment_probes.observe`). So one pass over a batch is a gradient of the batch and a few
large matrix products, where `vmap` of `grad` forms P numbers an example.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util

from in2core_jax import gradients
from in2core_jax.gradients import Objective, Tree
from in2core_jax.params import moment_probes

LEAVES = r"layers/.*/(kernel|lora_a|lora_b|scale|bias)"


def serves(objective: Objective, sub: Tree) -> bool:
  """Whether the model reads a probe beside every chosen leaf: no experts, nothing outside of the layers."""
  return objective.reads_probes and all(re.fullmatch(LEAVES, path) for path in traverse_util.flatten_dict(sub, sep="/"))


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
  objective.separate(batch)  # refuses rows that hold several examples
  flat, size = traverse_util.flatten_dict(sub, sep="/"), batch.valid.shape[0]
  sides = {} if v is None else traverse_util.flatten_dict(v, sep="/")
  strengths = dict(zip(sorted(flat), damping, strict=True)) if damping is not None else {}
  probes = {}
  for path, leaf in flat.items():
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    own = moment_probes.block_probe(sides.get(path), strengths.get(path), leaf.shape[0], size, wide)
    probes |= {f"{path}_probe/{name}": value for name, value in own.items()}
  asked = {path: probes.pop(path) for path in list(probes) if path.endswith(("/norms", "/sums"))}

  def total(asked):
    whole = traverse_util.unflatten_dict(flat | probes | asked, sep="/")
    return jnp.sum(gradients.per_example_losses(objective, whole, frozen, batch))

  found = jax.grad(total)(asked)
  norms = [found[f"{path}_probe/norms"].T for path in sorted(flat)]
  if v is None:
    return None, norms
  sums = {path: jnp.swapaxes(found[f"{path}_probe/sums"], 0, 1) for path in flat}
  return traverse_util.unflatten_dict(sums, sep="/"), norms
