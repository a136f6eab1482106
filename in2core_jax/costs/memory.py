"""What a run holds, on paper: memory of a device and bytes on disk, from shapes alone; no array is made.

Arrays that live between programs are counted leaf by leaf under the partition rules. What a program needs while it runs
is estimated (`program_bytes`): what reverse mode keeps of a layer is read off the traced layer itself, the rest is a
short sum. Compiled programs of a tiny model come out within a third of it (`tests/costs/test_costs.py`).

Letters: W rows of a batch, T tokens of a row, D width, V vocabulary, H query heads, I inner width of the MLP, P size of
the subtree, Q queries, M filled response slots, k chosen layers.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec

from in2core_jax.costs.flop_counts import Inverse, Sizes
from in2core_jax.model import decoder
from in2core_jax.model.objective import head_chunk
from in2core_jax.parallel import sharding
from in2core_jax.params import quantisation
from in2core_jax.params.subtree import Subtree

# Vectors of P numbers in float32 that a solver holds at its peak, for each query: query, iterates and their copies at
# a check, product, eigenvector; of CG the Krylov space of its first steps.
_VECTORS = {"identity": 1, "datainf": 4, "ekfac": 4, "cg": 12, "exact": 65, "lissa": 10}


def num_vectors(inverse: Inverse, accelerated: bool = False) -> int:
  """How many vectors like the subtree a solve holds: LiSSA two more with acceleration, low_rank its Krylov space."""
  if inverse.solver == "low_rank":
    return inverse.depth + 4 * inverse.queries
  return (_VECTORS[inverse.solver] + (2 if accelerated else 0)) * inverse.queries


def tree_bytes(tree: Any, mesh: Any, dtype: Any = None, rules: sharding.Rules = sharding.PARTITION_RULES) -> int:
  """Bytes of a tree's leaves on one device under the partition rules.

  Args:
    tree: arrays or shapes with paths that the rules know.
    mesh: has `shape`, axis -> size.
    dtype: instead of the leaves' own.
    rules: (regex, PartitionSpec) pairs.
  """
  specs = jax.tree.leaves(sharding.param_specs(tree, mesh, rules), is_leaf=lambda node: isinstance(node, PartitionSpec))
  total = 0
  for leaf, spec in zip(jax.tree.leaves(tree), specs, strict=True):
    names = [name for entry in spec if entry for name in (entry if isinstance(entry, tuple) else (entry,))]
    parts = int(np.prod([mesh.shape[name] for name in names], dtype=np.int64))
    total += math.prod(leaf.shape) * np.dtype(dtype or leaf.dtype).itemsize // parts
  return total


def copied_bytes(params: Any, tree: Subtree, mesh: Any) -> int:
  """Bytes that `subtree.split` copies: the chosen leaves, cut in chosen and other layers; none when all are chosen.

  Chosen matrices in few bits become full ones besides.
  """
  flat = traverse_util.flatten_dict(params["layers"], sep="/")
  chosen = {path: flat[path] for path in tree.paths}
  nested = lambda leaves: {"layers": traverse_util.unflatten_dict(leaves, sep="/")}  # noqa: E731
  size = len(tree.layers)
  made = {
    path: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
    for path, leaf in chosen.items()
    if quantisation.is_leaf(leaf)
  }
  copied = tree_bytes(nested(chosen), mesh) if 0 < size < tree.num_layers else 0
  return copied + (tree_bytes(nested(made), mesh) if made else 0)


def gathered_bytes(config: decoder.ModelConfig, params: Any, mesh: Any) -> int:
  """Bytes that a device gathers when parameters are cut: two layers (one runs, one comes) and the head's matrix."""
  if mesh.shape.get("fsdp", 1) * mesh.shape.get("tensor", 1) == 1:
    return 0
  a_layer = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params["layers"])) // config.num_layers
  return 2 * a_layer + math.prod(params["embed"]["embedding"].shape) * params["embed"]["embedding"].dtype.itemsize


@functools.cache
def residual_bytes(config: decoder.ModelConfig, length: int, dtype: str, chosen: bool) -> int:
  """Bytes that reverse mode keeps of a layer for one row of T tokens, as JAX traces it.

  Of a stack of layers it keeps arrays with the stack's axis first. What does not grow with the rows are parameters.

  Args:
    config: the model's shape.
    length: T.
    dtype: of the weights.
    chosen: whether the layer's parameters are differentiated too, which keeps the inputs of its matrices.
  """
  layers = 3  # any number of them: no other axis in front has this size
  shape = dataclasses.replace(config, num_layers=layers, vocab_size=2)
  params = jax.eval_shape(lambda key: decoder.init_params(shape, key, jnp.dtype(dtype)), jax.random.key(0))["layers"]

  def linear(params, hidden, offsets):
    run = lambda p, h: decoder.run_layers(config, p, h, offsets)  # noqa: E731
    if chosen:
      return jax.linearize(run, params, hidden)[1]
    return jax.linearize(lambda h: run(params, h), hidden)[1]

  def kept(rows: int) -> int:
    hidden = jax.ShapeDtypeStruct((rows, length, config.hidden_size), jnp.dtype(dtype))
    saved = jax.tree.leaves(jax.eval_shape(linear, params, hidden, jax.ShapeDtypeStruct((rows, length), np.int32)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in saved if leaf.shape[:1] == (layers,))

  return (kept(2) - kept(1)) // layers


def layer_bytes(config: decoder.ModelConfig, rows: int, length: int, itemsize: int) -> int:
  """Bytes that a layer holds while it runs forward, W rows of T tokens: the larger of attention and MLP.

  attention: 2 H T^2 in float32 (scores, weights) and 2 (D + H head_dim) T
  MLP:       3 I T (gate, up, their product) and 3 D T; of E experts 3 E I T, and E D T that their gates add up
  """
  attended = config.num_heads * config.head_dim
  attention = 8 * config.num_heads * length**2 + 2 * (config.hidden_size + attended) * length * itemsize
  experts, width = config.num_experts, config.hidden_size
  inner = max(1, experts) * config.intermediate_size + config.shared_size
  mlp = (3 * (inner + width) + experts * width) * length * itemsize
  return rows * max(attention, mlp)


class Program(NamedTuple):
  """The shape of a compiled program on one device.

  Attributes:
    kind: one of `KINDS`.
    rows: W.
    length: T.
    slots: M.
    queries: vectors that are pushed through at once.
  """

  kind: str
  rows: int
  length: int
  slots: int
  queries: int = 1


# Layers' working sets, copies of what reverse mode keeps, chunks of logits [head_chunk(V), V] in float32.
_LIVE = {
  "losses": (1, 0, 2),
  "jvp": (2, 0, 4),
  "gradient": (2, 1, 4),
  "probes": (2, 1, 4),
  "ggn": (2, 1, 4),
  "fisher": (2, 1, 4),
  "hessian": (4, 2, 8),
}


def program_bytes(config: decoder.ModelConfig, sizes: Sizes, program: Program, dtype: str) -> int:
  """Bytes that a program needs beside its arguments and results, about.

    kept * residuals * L_above  +  the larger of working * layer and chunks * min(M, head_chunk(V)) V in float32

  Args:
    config: the model's shape.
    sizes: of the model and the subtree.
    program: what runs.
    dtype: of the weights.
  """
  working, kept, chunks = _LIVE[program.kind]
  itemsize = np.dtype(jnp.dtype(dtype)).itemsize
  layer = layer_bytes(config, program.rows, program.length, itemsize)
  rows = program.slots if sizes.head_chosen else min(program.slots, head_chunk(config.vocab_size))
  head = 4 * chunks * rows * config.vocab_size
  saved = 0
  if kept:
    saved = program.rows * sizes.layers_above * residual_bytes(config, program.length, dtype, sizes.chosen > 0)
  carry = 2 * program.rows * program.length * config.hidden_size * itemsize
  return carry + program.queries * (kept * saved + max(working * layer, head))


def ekfac_bytes(sizes: Sizes) -> int:
  """Bytes of fitted factors in float32: eigenvectors in^2 + out^2, eigenvalues in out + in + out; diagonals."""
  return 4 * (sum(a * a + b * b + a * b + a + b for a, b in sizes.matrices) + sizes.plain)
