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

# A model of less is stacked on the host: compiling a program for each shape would take longer than is gained.
STREAMED_BYTES = 1 << 30


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


def is_finite(array: np.ndarray) -> bool:
  """Whether all numbers are finite, asked some rows at a time."""
  rows = max(1, len(array) // 16)
  return all(np.isfinite(array[start : start + rows]).all() for start in range(0, len(array), rows))


def stack_of(shape: tuple[int, ...], dtype: np.dtype, placed: NamedSharding | None) -> "HostStack | DeviceStack":
  """An empty leaf."""
  return HostStack(shape, dtype) if placed is None else DeviceStack(shape, dtype, placed)


class HostStack:
  """A leaf in NumPy."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
    self.array = np.empty(shape, dtype)

  def put(self, index: tuple[int, ...], array: np.ndarray) -> bool:
    """Writes one tensor; returns whether it is finite."""
    self.array[index] = array
    return is_finite(self.array[index])


class DeviceStack:
  """A leaf on the devices."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, placed: NamedSharding):
    self.shape, self.dtype, self.placed = shape, np.dtype(dtype), placed
    self.array: Any = None
    self._write = jax.jit(lambda whole, row, index: whole.at[index].set(row), donate_argnums=0, out_shardings=placed)

  def put(self, index: tuple[int, ...], array: np.ndarray) -> bool:
    """Writes one tensor, in place; returns whether it is finite."""
    row = np.ascontiguousarray(array, self.dtype)
    if not is_finite(row):
      return False
    rest = NamedSharding(self.placed.mesh, PartitionSpec(*tuple(self.placed.spec)[len(index) :]))
    placed = jax.make_array_from_callback(row.shape, rest, lambda part: row[part])
    if not index:
      self.array = placed
    else:
      if self.array is None:
        self.array = jax.jit(lambda: jnp.zeros(self.shape, self.dtype), out_shardings=self.placed)()
      self.array = self._write(self.array, placed, tuple(np.int32(i) for i in index))
    jax.block_until_ready(self.array)  # or tensors of several layers would wait in the host's memory
    return True
