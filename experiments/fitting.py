"""`--batch_tokens=auto`: the largest batch that fits a device, estimated first, then read off compiled programs."""

from __future__ import annotations

import functools
import logging
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from in2core_jax import adapters, costs, finetune, gradients, memory, model, packing, processes, sharding, subtree
from in2core_jax.batches import Batch
from in2core_jax.errors import UserError
from in2core_jax.timing import host_bytes

if TYPE_CHECKING:
  from experiments.flags import Settings
  from experiments.workbench import Workbench

log = logging.getLogger(__name__)

# Larger batches are not faster on a CPU.
CPU_TOKENS = 2048
# On accelerators the matrices are busy far below this on each device; what is larger only pads small data sets more.
DEVICE_TOKENS = 2**14
# Of what a device has: the allocator needs room to move, and on a CPU others live there too.
ACCELERATOR_SHARE, CPU_SHARE = 0.9, 0.5
# The passes that batches of --batch_tokens go through, and what computes each.
PROGRAMS = {"jvp": gradients.losses_and_jvp_scores, "gradient": gradients.sum_gradient}


# ---- what there is -------------------------------------------------------------------


def device_bytes(device: Any) -> int:
  """Memory of a device: its own, or on a CPU its part of the machine's.

  Total and not free memory: the same command shall take the same batches when it is started again.

  Raises:
    UserError: an accelerator that does not tell.
  """
  if device.platform == "cpu":
    return host_bytes() // len(device.client.local_devices())
  stats = device.memory_stats() or {}
  if "bytes_limit" not in stats:
    raise UserError(f"{device} does not tell how much memory it has: give --batch_tokens a number, such as 8192")
  return int(stats["bytes_limit"])


def usable_bytes(device: Any) -> int:
  """Memory of a device that a run may plan with."""
  return int(device_bytes(device) * (CPU_SHARE if device.platform == "cpu" else ACCELERATOR_SHARE))


def most_tokens(device: Any, mesh: Any) -> int:
  """Beyond this a larger batch is no faster."""
  return CPU_TOKENS if device.platform == "cpu" else DEVICE_TOKENS * sharding.batch_multiple(mesh)


# ---- what is needed ------------------------------------------------------------------


@functools.cache
def param_shapes(config: model.ModelConfig, dtype: str, lora_rank: int = 0) -> Any:
  """Shapes of the parameters, with LoRA factors beside the kernels when the rank is above 0."""

  def make(key):
    params = model.init_params(config, key, jnp.dtype(dtype))
    return adapters.add_lora(params, lora_rank, key) if lora_rank else params

  return jax.eval_shape(make, jax.random.key(0))


def scored_params(config: model.ModelConfig, s: Settings) -> Any:
  """Shapes of the scored parameters; the checkpoint says whether there are LoRA factors."""
  rank = finetune.checkpoint_meta(s.checkpoint)["lora_rank"] if s.checkpoint else 0
  return param_shapes(config, s.dtype, rank)


def scored_shapes(config: model.ModelConfig, s: Settings) -> tuple[Any, subtree.Subtree]:
  """(shapes of the scored parameters, chosen subtree); without a checkpoint the LoRA factors of a demo to come."""
  to_come = s.trainable == "lora" and not s.checkpoint and "lora" in s.modules.split(",")
  params = param_shapes(config, s.dtype, s.lora_rank) if to_come else scored_params(config, s)
  return params, subtree.make_subtree(params, s.layers, s.modules)


def resident_bytes(params: Any, tree: subtree.Subtree, inverse: costs.Inverse, mesh: Any) -> int:
  """Bytes on a device while the training set is scored: parameters, the copied leaves, the solver's vectors."""
  sub, _ = costs.split_shapes(params, tree)
  vectors = memory.num_vectors(inverse) * memory.tree_bytes(sub, mesh, np.float32)
  return memory.tree_bytes(params, mesh) + memory.copied_bytes(params, tree, mesh) + vectors


def batch_shapes(shape: packing.PackedShape, mesh: Any, width: int | None, dtype: Any) -> Batch:
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
  )


def placed_shapes(tree: Any, mesh: Any, dtype: Any = None) -> Any:
  """Shapes of parameters, or of vectors like them, on the mesh."""
  placed = sharding.shardings(sharding.param_specs(tree, mesh), mesh)
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where), tree, placed
  )


def compiled_bytes(bench: Workbench, params: Any, tree: subtree.Subtree, shape: packing.PackedShape) -> int | None:
  """Bytes that the programs of a pass need beside parameters and vectors, as compiled; None where nobody tells.

  The compilation cache keeps them, so a run that takes this size does not compile them again.
  """
  s, mesh = bench.settings, bench.mesh
  width = bench.config.hidden_size if bench.uses_cache(tree) else None
  batch = batch_shapes(shape, mesh, width, jnp.dtype(s.dtype))
  sub, frozen = (placed_shapes(part, mesh) for part in costs.split_shapes(params, tree))
  objective, most = model.make_objective(bench.config, tree), 0
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


def inverse_of(s: Settings, queries: int = 1) -> costs.Inverse:
  """The solver that the flags ask for, as far as its cost depends on it."""
  solver = "identity" if s.trajectory != "none" else s.solver
  return costs.Inverse(solver, s.curvature, s.depth, s.repeat, queries, math.isnan(s.damping))


def largest_batch(bench: Workbench) -> int:
  """The most tokens of a batch, a power of two, with which scores and query gradients fit the device.

  The cost model says where to start; from there the number is halved until the compiled programs fit. On a CPU it is
  2,048 at most. It never depends on what is free at the moment.

  Raises:
    UserError: not even a single row fits.
  """
  device = next(one for one in bench.mesh.devices.flat if one.process_index == jax.process_index())
  params, tree = scored_shapes(bench.config, bench.settings)
  room = usable_bytes(device) - resident_bytes(params, tree, inverse_of(bench.settings), bench.mesh)
  room = processes.from_writer(room)  # so that all processes come to the same end
  most = most_tokens(device, bench.mesh)
  tokens = min(most, 2 * estimated_batch(bench, room, most))  # in case that the estimate is too careful
  while True:
    shapes = bench.packed_shapes_for(tokens)
    needs = [compiled_bytes(bench, params, tree, shape) for shape in shapes]
    need = None if None in needs else max(needs)
    if need is None or need <= room or _single_rows(shapes):
      break
    tokens //= 2
  _tell(tokens, need, room, bench, shapes)
  return tokens


def estimated_batch(bench: Workbench, room: int, most: int) -> int:
  """The most tokens, a power of two, that the cost model expects to fit `room` bytes; that of single rows if none.

  Rows are as long as the packed rows of the run; nothing is packed or compiled.
  """
  params, tree = scored_shapes(bench.config, bench.settings)
  sizes, dtype = costs.matrix_sizes(params, tree), bench.settings.dtype
  lengths = np.concatenate([part.num_tokens for part in bench.parts.values()])
  responses = sum(int(part.num_response_tokens.sum()) for part in bench.parts.values())
  rows, groups = packing.row_lengths(lengths), sharding.batch_multiple(bench.mesh)

  def need(tokens: int) -> int:
    found = 0
    for length in rows:
      height = max(1, tokens // length // groups)
      slots = int(height * length * responses / lengths.sum())
      programs = [memory.Program(kind, height, length, slots) for kind in PROGRAMS]
      found = max(found, *(memory.program_bytes(bench.config, sizes, program, dtype) for program in programs))
    return found

  tokens = min(most, 2 ** (int(lengths.sum()) - 1).bit_length())  # no more than all examples at once
  while tokens > max(rows) * groups and need(tokens) > room:
    tokens //= 2
  return tokens


def _single_rows(shapes: tuple[packing.PackedShape, ...]) -> bool:
  return all(shape.height == 1 for shape in shapes)


def _tell(tokens: int, need: int | None, room: int, bench: Workbench, shapes: tuple) -> None:
  """Logs the decision; refuses what does not fit at all."""
  rows = ", ".join(f"{shape.height} x {shape.num_tokens}" for shape in shapes)
  if need is not None and need > room:
    raise UserError(
      f"--batch_tokens=auto: a batch of {rows} tokens on each device needs {need / 1e9:.2f} GB beside the parameters, "
      f"where {max(room, 0) / 1e9:.2f} GB are left; choose fewer --layers, --max_length below "
      f"{bench.settings.max_length}, --dtype=bfloat16, or cut parameters over devices with --mesh=fsdp:-1"
    )
  how = "as estimated" if need is None else f"compiled programs take {need / 1e9:.2f} GB of {room / 1e9:.2f} GB"
  log.info("--batch_tokens=auto: %d tokens a batch (rows on a device: %s); %s", tokens, rows, how)
