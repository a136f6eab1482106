"""Leaves of the parameter tree, filled tensor by tensor: in the host's memory, or where they will stay on the devices.

A leaf of layers is stacked, [L, in, out], and files hold a tensor for each layer. Where devices have memory of their
own, stacking on the host would take all of the model there before it is placed. So a leaf is made on the devices at
once, in its sharding, and each layer is written into it in place: the host holds one tensor at a time. On a CPU arrays
that are placed stay where they are, and a leaf is stacked where it will stay.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from in2core_jax.parallel import sharding
from in2core_jax.params import quantisation

# A model of less is stacked on the host: compiling a program for each shape would take longer than is gained.
STREAMED_BYTES = 1 << 30
BLOCK_NUMBERS = 1 << 23  # of a tensor that are read at once


def shardings_of(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, mesh: Mesh | None) -> dict[str, NamedSharding]:
  """Leaf -> where it stays, for `stack_of`; nothing on a CPU, without a mesh, for a model below `STREAMED_BYTES`.

  Args:
    shapes: leaf -> its shape.
    dtype: of all leaves.
    mesh: the devices.
  """
  if (
    mesh is None
    or not has_own_memory(mesh)
    or sum(map(math.prod, shapes.values())) * np.dtype(dtype).itemsize < STREAMED_BYTES
  ):
    return {}
  tree = traverse_util.unflatten_dict({leaf: jax.ShapeDtypeStruct(s, dtype) for leaf, s in shapes.items()}, sep="/")
  placed = sharding.shardings(sharding.param_specs(tree, mesh), mesh)
  return traverse_util.flatten_dict(placed, sep="/")


def has_own_memory(mesh: Mesh) -> bool:
  """Whether the devices' memory is not the host's."""
  return any(device.platform != "cpu" for device in mesh.devices.flat)


class StoredRows:
  """A stored tensor [rows, ...] of which some rows at a time are read.

  Attributes:
    shape: of the tensor.
  """

  def __init__(self, piece: Any):
    self.shape, self._piece = tuple(piece.get_shape()), piece

  def __getitem__(self, rows: slice) -> np.ndarray:
    return self._piece[rows]


def blocks(shape: tuple[int, ...]) -> list[slice]:
  """Rows of a tensor that are read, converted and looked at together, all of one size but for the last."""
  size = max(1, BLOCK_NUMBERS // max(1, math.prod(shape[1:])))
  return [slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size)]


def stack_of(
  shape: tuple[int, ...], dtype: np.dtype, placed: NamedSharding | None, kind: str = ""
) -> "HostStack | DeviceStack | QuantisedStack":
  """An empty leaf; of a `kind` of `quantisation` where that is given."""
  if kind:
    return QuantisedStack(shape, dtype, kind)
  return HostStack(shape, dtype) if placed is None else DeviceStack(shape, dtype, placed)


class HostStack:
  """A leaf in NumPy."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
    self.array = np.empty(shape, dtype)

  def put(self, index: tuple[int, ...], tensor: Any, turned: bool = False) -> bool:
    """Writes one tensor, block by block; returns whether it is finite.

    Args:
      index: of the leaf.
      tensor: an array or `StoredRows`.
      turned: its last two axes change places.
    """
    there = self.array[index]
    there = there.swapaxes(-1, -2) if turned else there
    for rows in blocks(tensor.shape):
      there[rows] = tensor[rows]
      if not np.isfinite(there[rows]).all():
        return False
    return True


class DeviceStack:
  """A leaf on the devices."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, placed: NamedSharding):
    self.dtype, self._everywhere = np.dtype(dtype), NamedSharding(placed.mesh, PartitionSpec())
    self.array: Any = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=placed)()
    self._write = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=placed)

  def put(self, index: tuple[int, ...], tensor: Any, turned: bool = False) -> bool:
    """Writes one tensor, block by block and in place; returns whether it is finite; arguments as of `HostStack`."""
    lead = len(tensor.shape) - 2 if turned else 0  # the axis of the rows: the last one where they are turned
    for rows in blocks(tensor.shape):
      block = np.ascontiguousarray(tensor[rows], self.dtype)
      if not np.isfinite(block).all():
        return False
      block = np.ascontiguousarray(block.swapaxes(-1, -2)) if turned else block
      block = block.reshape((1,) * len(index) + block.shape)
      placed = jax.make_array_from_callback(block.shape, self._everywhere, lambda part, block=block: block[part])
      starts = [0] * block.ndim
      starts[: len(index)] = index
      starts[-1 if turned and not lead else len(index)] += rows.start
      self.array = self._write(self.array, placed, [np.int32(start) for start in starts])
      jax.block_until_ready(self.array)  # or blocks of several tensors would wait in the host's memory
    return True


class QuantisedStack:
  """A leaf of matrices in 8 or 4 bits, on the host: its whole takes less than a layer or two in full precision."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, kind: str):
    self.kind, self.array = kind, quantisation.empty(shape, kind, np.dtype(dtype).name)

  def put(self, index: tuple[int, ...], tensor: Any, turned: bool = False) -> bool:
    """Rounds and writes one tensor, block by block; returns whether it is finite; arguments as of `HostStack`."""
    room = self.array[index]
    for rows in blocks(tensor.shape):
      block = np.asarray(tensor[rows], np.float32)
      if not np.isfinite(block).all():
        return False
      made = quantisation.quantise(block.swapaxes(-1, -2) if turned else block, self.kind)
      place = (..., rows) if turned and block.ndim == 2 else rows  # rows of [out, in] are columns here
      room.codes[place], room.scale[place] = made.codes, made.scale
    return True
