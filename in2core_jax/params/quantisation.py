"""Matrices of layers kept in 8 or 4 bits; what is multiplied with is made of them inside of the layer.

    int8   W[in, out] = code scale[out]                 scale = max over in |W| / 127, codes -127 to 127
    nf4    W[in, out] = table[code] scale[in / b, out]  scale = max over a block |W|; two codes a byte, first in front

The block b is 64 inputs (or a divisor of 64, where the inputs need it), as in bitsandbytes: of a matrix that it has
quantised codes and scales come out as they were stored.

A `Quantised` stands where the array of a matrix would stand in the parameter tree. It is a pytree of its codes and
scales, all of which have the layer's axis first, so a scan over layers, a slice of them and a sharding rule need no
special case. `subtree.split` makes plain arrays of chosen matrices: gradients and training are in full precision.
qwix has such a container too, but its 4-bit codes take a byte on a CPU, its int8 rounds by 127.5, and it puts itself
in place of JAX's products everywhere; rows of which some are trained and no longer quantised it does not know.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FULL, KINDS = "full", ("int8", "nf4")  # words of --frozen_weights
# Of Dettmers et al. 2023 (QLoRA), appendix E: quantiles of a normal distribution, with 0 and both ends.
NF4 = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
  *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
  *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64  # inputs that share a scale
SHORTEST_BLOCK = 16  # below it scales would take as much as codes
_MATRICES = ("/kernel", "/experts")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("name",))
@dataclasses.dataclass(frozen=True)
class Quantised:
  """A matrix or several, [..., in, out].

  Attributes:
    codes: int8 [..., in, out], or of nf4 uint8 [..., in / 2, out].
    scale: float32 [..., 1, out], or of nf4 [..., in / b, out].
    name: of the dtype that they are dequantised to.
  """

  codes: Any
  scale: Any
  name: str

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the matrices."""
    *lead, inputs, outputs = self.codes.shape
    return (*lead, inputs if self.codes.dtype == np.int8 else 2 * inputs, outputs)

  @property
  def ndim(self) -> int:
    """How many axes they have."""
    return self.codes.ndim

  @property
  def size(self) -> int:
    """How many numbers they hold."""
    return math.prod(self.shape)

  @property
  def dtype(self) -> np.dtype:
    """That they are dequantised to."""
    return jnp.dtype(self.name)

  def __getitem__(self, index) -> "Quantised":
    """Some along the leading axis."""
    return Quantised(self.codes[index], self.scale[index], self.name)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """Dequantised, on the host; one layer at a time."""
    found = np.empty(self.shape, dtype or self.dtype)
    for i in np.ndindex(self.shape[:-2]):
      found[i] = np.asarray(full(self[i]))
    return found


@functools.partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Mixed:
  """Stacked matrices of which some layers are `Quantised` and others, which have been trained, are not.

  Attributes:
    parts: arrays and `Quantised`, one after the other along the leading axis.
  """

  parts: tuple

  @property
  def shape(self) -> tuple[int, ...]:
    """Of all together."""
    return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

  @property
  def ndim(self) -> int:
    """How many axes they have."""
    return self.parts[0].ndim

  @property
  def dtype(self) -> np.dtype:
    """That they are dequantised to."""
    return self.parts[0].dtype

  def __getitem__(self, rows: slice | np.ndarray) -> Any:
    """Some layers: a slice without step, or indices."""
    return joined(self.parts, np.arange(self.shape[0])[rows])

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """Dequantised, on the host."""
    return np.concatenate([np.asarray(part, dtype) for part in self.parts])


def is_leaf(node: Any) -> bool:
  """Whether a node of a tree stands in place of an array."""
  return isinstance(node, Quantised | Mixed)


def tree_map(function: Callable, tree: Any) -> Any:
  """`jax.tree.map` over arrays and what stands in their place."""
  return jax.tree.map(function, tree, is_leaf=is_leaf)


# ---- codes and numbers -----------------------------------------------------------------------------------------------


def block_of(shape: Sequence[int]) -> int:
  """Inputs that share a scale of nf4."""
  return math.gcd(shape[-2], BLOCK)


def fits(path: str, shape: Sequence[int], kind: str) -> bool:
  """Whether a leaf of the parameter tree is one that is kept in few bits: a matrix of attention, MLP or experts."""
  if not path.startswith("layers/") or not path.endswith(_MATRICES) or "router/" in path:
    return False
  return kind == "int8" or block_of(shape) >= SHORTEST_BLOCK


def quantise(matrix: np.ndarray, kind: str, name: str = "float32") -> Quantised:
  """Rounds matrices [..., in, out] on the host.

  Args:
    matrix: finite numbers.
    kind: a word of `KINDS`.
    name: of the dtype that they are dequantised to.
  """
  *lead, inputs, outputs = matrix.shape
  block = inputs if kind == "int8" else block_of(matrix.shape)
  blocks = np.asarray(matrix, np.float32).reshape(*lead, -1, block, outputs)
  scale = np.abs(blocks).max(axis=-2)
  scale = scale / np.float32(127) if kind == "int8" else scale
  ratios = blocks / np.where(scale == 0, np.float32(1), scale)[..., None, :]
  if kind == "int8":
    return Quantised(np.rint(ratios).astype(np.int8).reshape(matrix.shape), scale, name)
  table = np.array(NF4, np.float32)
  codes = np.searchsorted((table[1:] + table[:-1]) / 2, ratios).astype(np.uint8).reshape(*lead, -1, 2, outputs)
  return Quantised(codes[..., 0, :] << 4 | codes[..., 1, :], scale, name)


def empty(shape: Sequence[int], kind: str, name: str, make: Callable[..., Any] = np.empty) -> Quantised:
  """Room for matrices of that shape on the host; with `jax.ShapeDtypeStruct` for `make` the shapes alone."""
  *lead, inputs, outputs = shape
  if kind == "int8":
    return Quantised(make((*lead, inputs, outputs), np.int8), make((*lead, 1, outputs), np.float32), name)
  groups = inputs // block_of(shape)
  return Quantised(make((*lead, inputs // 2, outputs), np.uint8), make((*lead, groups, outputs), np.float32), name)


def quantise_tree(params: Any, kind: str) -> Any:
  """The parameters with those matrices in few bits that `fits` names, made on the host; or their shapes, of shapes."""

  def leaf_of(keys, leaf):
    if not fits(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf.shape, kind):
      return leaf
    name = jnp.dtype(leaf.dtype).name
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return empty(leaf.shape, kind, name, jax.ShapeDtypeStruct)
    room = empty(leaf.shape, kind, name)
    for i in range(leaf.shape[0]):
      one = quantise(np.asarray(leaf[i]), kind)
      room.codes[i], room.scale[i] = one.codes, one.scale
    return room

  return jax.tree_util.tree_map_with_path(leaf_of, params)


def bits(kind: str) -> float:
  """Of a number of a large matrix, its share of the scales included."""
  return {"int8": 8.0, "nf4": 4 + 32 / BLOCK}[kind]


def full(matrix: Any) -> Any:
  """What stands for an array as an array; an array as it is. The products are made in float32 at least."""
  if isinstance(matrix, Mixed):
    return jnp.concatenate([full(part) for part in matrix.parts])
  return _dequantised(matrix) if isinstance(matrix, Quantised) else matrix


@jax.jit
def _dequantised(matrix: Quantised) -> jax.Array:
  wide = jnp.promote_types(matrix.dtype, jnp.float32)
  *lead, inputs, outputs = matrix.shape
  if matrix.codes.dtype == np.int8:
    numbers = matrix.codes.astype(wide)
  else:
    table = jnp.array(NF4, jnp.float32).astype(wide)
    numbers = table[jnp.stack([matrix.codes >> 4, matrix.codes & 15], axis=-2)]
  blocks = numbers.reshape(*lead, matrix.scale.shape[-2], -1, outputs)
  return (blocks * matrix.scale[..., None, :].astype(wide)).astype(matrix.dtype).reshape(*lead, inputs, outputs)


def applied(product: Callable[[jax.Array, Any], jax.Array], x: jax.Array, matrix: Any) -> jax.Array:
  """product(x, W). Of a `Quantised` the backward pass makes W anew: kept for it, all layers' W would be in memory."""
  if not isinstance(matrix, Quantised):
    return product(x, matrix)
  # Inside of a scan no common subexpression can bring the first W back.
  return jax.checkpoint(lambda x, kept: product(x, full(kept)), prevent_cse=False)(x, matrix)


# ---- stacks of layers ------------------------------------------------------------------------------------------------


def joined(parts: Sequence[Any], order: np.ndarray) -> Any:
  """Layers of several stacks in an order: entries count through the parts, one after the other.

  Args:
    parts: arrays, `Quantised` or `Mixed`, leaves [n, ...].
    order: int [layers].

  Returns:
    One of them where all layers come from one, else a `Mixed`.
  """
  flat = [inner for part in parts for inner in (part.parts if isinstance(part, Mixed) else (part,))]
  if not len(order):
    return flat[0][:0]
  ends = np.cumsum([part.shape[0] for part in flat])
  owner = np.searchsorted(ends, order, side="right")
  cuts = [0, *(np.flatnonzero(np.diff(owner)) + 1), len(order)]
  found = []
  for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
    part, rows = flat[owner[start]], order[start:stop] - (ends[owner[start]] - flat[owner[start]].shape[0])
    whole = len(rows) == part.shape[0] and np.array_equal(rows, np.arange(len(rows)))
    in_order = np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
    found.append(part if whole else part[int(rows[0]) : int(rows[0]) + len(rows)] if in_order else part[rows])
  return found[0] if len(found) == 1 else Mixed(tuple(found))


def num_layers(layers: Any) -> int:
  """The length of the leading axis of all leaves."""
  return jax.tree.leaves(layers, is_leaf=is_leaf)[0].shape[0]


def runs(layers: Any) -> list[tuple[int, int, Any]]:
  """(start, stop, their leaves) of stretches of layers in which no leaf is `Mixed`; one, where there is none."""
  leaves = jax.tree.leaves(layers, is_leaf=is_leaf)
  mixed = [leaf for leaf in leaves if isinstance(leaf, Mixed)]
  if not mixed:
    return [(0, leaves[0].shape[0], layers)]
  cuts = sorted({0} | {int(end) for leaf in mixed for end in np.cumsum([part.shape[0] for part in leaf.parts])})
  pairs = zip(cuts[:-1], cuts[1:], strict=True)
  return [(start, stop, tree_map(lambda leaf, a=start, b=stop: leaf[a:b], layers)) for start, stop in pairs]
