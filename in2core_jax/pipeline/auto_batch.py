"""`--batch_tokens=auto`: the largest batch that fits a device, estimated first, then read off compiled programs."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from in2core_jax import gradients
from in2core_jax.costs import device_memory, flop_counts, memory
from in2core_jax.data import packing, row_plans
from in2core_jax.data.batches import Batch, rejected_starts
from in2core_jax.data.tokenizing import TokenizedDataset
from in2core_jax.errors import UserError
from in2core_jax.influence.solve import shares_space
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.objective import make_objective
from in2core_jax.parallel import processes, sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.shapes import scored_shapes

log = logging.getLogger(__name__)

# The passes that batches of --batch_tokens go through, and what computes each.
PROGRAMS = {"jvp": gradients.losses_and_jvp_scores, "gradient": gradients.sum_gradient}


@dataclasses.dataclass(frozen=True)
class Work:
  """What the size of a batch follows from.

  Attributes:
    config: the model's shape.
    params: shapes of the scored parameters.
    tree: the subtree of them whose gradients are taken.
    inverse: the solver, as far as its memory depends on it.
    dtype: of the weights.
    mesh: the devices.
    cached: whether hidden states that enter the chosen layers are kept.
    num_tokens: int [N], of all examples.
    num_responses: response tokens of all examples together.
    max_length: --max_length, for messages.
    pairs: whether there are preference pairs, whose batches have one number more for each example.
  """

  config: ModelConfig
  params: Any
  tree: subtree.Subtree
  inverse: flop_counts.Inverse
  dtype: str
  mesh: Any
  cached: bool
  num_tokens: np.ndarray
  num_responses: int
  max_length: int
  pairs: bool = False

  @classmethod
  def of(cls, s: Settings, config: ModelConfig, parts: Mapping[str, TokenizedDataset], mesh: Any, cached: Any) -> Work:
    """That of a run.

    Args:
      s: what is scored, and by which solver.
      config: the model's shape.
      parts: all examples.
      mesh: the devices.
      cached: tells of a subtree whether hidden states that enter it are kept.
    """
    params, tree = scored_shapes(config, s)
    num_tokens = np.concatenate([part.num_tokens for part in parts.values()])
    responses = sum(int(part.num_response_tokens.sum()) for part in parts.values())
    pairs = any(rejected_starts(part) is not None for part in parts.values())
    return cls(
      config, params, tree, inverse_of(s), s.dtype, mesh, cached(tree), num_tokens, responses, s.max_length, pairs
    )

  @property
  def resident_bytes(self) -> int:
    """Bytes on a device while the training set is scored: parameters, the copied leaves, the solver's vectors."""
    sub, _ = flop_counts.split_shapes(self.params, self.tree)
    vectors = memory.num_vectors(self.inverse) * memory.tree_bytes(sub, self.mesh, np.float32)
    copied = memory.copied_bytes(self.params, self.tree, self.mesh)
    return memory.tree_bytes(self.params, self.mesh) + copied + vectors


# ---- what is needed ------------------------------------------------------------------


def batch_shapes(shape: packing.PackedShape, mesh: Any, width: int | None, dtype: Any, pairs: bool = False) -> Batch:
  """A packed batch as shapes on the mesh, with hidden states of a width unless that is None."""
  groups = sharding.batch_multiple(mesh)
  spec = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
  make = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=spec)  # noqa: E731
  rows, size = groups * shape.height, groups * shape.size
  tokens, slots = make(np.int32, rows, shape.num_tokens), make(np.int32, size, shape.num_responses)
  return Batch(
    tokens,
    None if width is None else make(dtype, rows, shape.num_tokens, width),
    slots,
    slots,
    make(np.float32, size, shape.num_responses),
    make(np.float32, size),
    make(np.int32, groups, shape.num_slots),
    tokens,
    make(np.float32, size) if pairs else None,
  )


def placed_shapes(tree: Any, mesh: Any, dtype: Any = None) -> Any:
  """Shapes of parameters, or of vectors like them, on the mesh."""
  placed = sharding.shardings(sharding.param_specs(tree, mesh), mesh)
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where), tree, placed
  )


def compiled_bytes(work: Work, shape: packing.PackedShape) -> int | None:
  """Bytes that the programs of a pass need beside parameters and vectors, as compiled; None where nobody tells.

  The compilation cache keeps them, so a run that takes this size does not compile them again.
  """
  mesh = work.mesh
  width = work.config.hidden_size if work.cached else None
  batch = batch_shapes(shape, mesh, width, jnp.dtype(work.dtype), work.pairs)
  sub, frozen = (placed_shapes(part, mesh) for part in flop_counts.split_shapes(work.params, work.tree))
  objective, most = make_objective(work.config, work.tree), 0
  for kind, function in PROGRAMS.items():
    more = (placed_shapes(sub, mesh, np.float32),) if kind == "jvp" else ()
    program = jax.jit(functools.partial(function, objective)).lower(sub, frozen, batch, *more).compile()
    found = program.memory_analysis()
    if found is None:
      return None
    held = sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(batch)) // sharding.batch_multiple(mesh)
    most = max(most, held + found.temp_size_in_bytes + found.output_size_in_bytes)
  return most


# ---- the decision --------------------------------------------------------------------


def inverse_of(s: Settings, queries: int = 1) -> flop_counts.Inverse:
  """The solver that the flags ask for, as far as its cost depends on it."""
  solver = "identity" if s.trajectory != "none" else s.solver
  apart = not shares_space(solver, s.precondition, s.curvature)
  return flop_counts.Inverse(solver, s.curvature, s.depth, s.repeat, queries, math.isnan(s.damping), apart)


def largest_batch(work: Work, shapes_for: Callable[[int], tuple[packing.PackedShape, ...]]) -> int:
  """The most tokens of a batch, a power of two, with which scores and query gradients fit the device.

  The cost model says where to start; from there the number is halved until the compiled programs fit. On a CPU it is
  2,048 at most. It never depends on what is free at the moment.

  Args:
    work: what is scored.
    shapes_for: the shapes of packed rows with about so many tokens in a batch.

  Raises:
    UserError: not even a single row fits.
  """
  device = next(one for one in work.mesh.devices.flat if one.process_index == jax.process_index())
  room = device_memory.usable_bytes(device) - work.resident_bytes
  room = processes.from_writer(room)  # so that all processes come to the same end
  most = device_memory.most_tokens(device, work.mesh)
  tokens = min(most, 2 * estimated_batch(work, room, most))  # in case that the estimate is too careful
  while True:
    shapes = shapes_for(tokens)
    needs = [compiled_bytes(work, shape) for shape in shapes]
    need = None if None in needs else max(needs)
    if need is None or need <= room or _single_rows(shapes):
      break
    tokens //= 2
  _tell(tokens, need, room, work.max_length, shapes)
  return tokens


def estimated_batch(work: Work, room: int, most: int) -> int:
  """The most tokens, a power of two, that the cost model expects to fit `room` bytes; that of single rows if none.

  Rows are as long as the packed rows of the run; nothing is packed or compiled.
  """
  sizes, lengths = flop_counts.matrix_sizes(work.params, work.tree), work.num_tokens
  rows, groups = row_plans.row_lengths(lengths), sharding.batch_multiple(work.mesh)

  def need(tokens: int) -> int:
    found = 0
    for length in rows:
      height = max(1, tokens // length // groups)
      slots = int(height * length * work.num_responses / lengths.sum())
      programs = [memory.Program(kind, height, length, slots) for kind in PROGRAMS]
      found = max(found, *(memory.program_bytes(work.config, sizes, program, work.dtype) for program in programs))
    return found

  tokens = min(most, 2 ** (int(lengths.sum()) - 1).bit_length())  # no more than all examples at once
  while tokens > max(rows) * groups and need(tokens) > room:
    tokens //= 2
  return tokens


def _single_rows(shapes: tuple[packing.PackedShape, ...]) -> bool:
  return all(shape.height == 1 for shape in shapes)


def _tell(tokens: int, need: int | None, room: int, max_length: int, shapes: tuple) -> None:
  """Logs the decision; refuses what does not fit at all."""
  rows = ", ".join(f"{shape.height} x {shape.num_tokens}" for shape in shapes)
  if need is not None and need > room:
    raise UserError(
      f"--batch_tokens=auto: a batch of {rows} tokens on each device needs {need / 1e9:.2f} GB besides the parameters, "
      f"where {max(room, 0) / 1e9:.2f} GB are left; choose fewer --layers, --max_length below "
      f"{max_length}, --dtype=bfloat16, or cut parameters over devices with --mesh=fsdp:-1"
    )
  how = "as estimated" if need is None else f"compiled programs take {need / 1e9:.2f} GB of {room / 1e9:.2f} GB"
  log.info("--batch_tokens=auto: %d tokens a batch (rows on a device: %s); %s", tokens, rows, how)
