"""How examples are cut into batches: one set of shapes for all three parts, so that each program is compiled once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from in2core_jax.data import batches, packing
from in2core_jax.data.tokenizing import TokenizedDataset
from in2core_jax.parallel import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Batching:
  """Shapes and sizes of batches; none depends on the weights of the tokens.

  Attributes:
    parts: the data sets whose examples must fit, training set among them.
    mesh: the devices that share a batch.
    max_shapes: batch shapes to compile at most.
    size: padded token positions of a batch that is scored, or what decides on them when they are first needed.
  """

  parts: Mapping[str, TokenizedDataset]
  mesh: Any
  max_shapes: int
  size: "int | Callable[[Batching], int]"

  @functools.cached_property
  def batch_tokens(self) -> int:
    """Padded token positions of a batch that is scored, decided once."""
    return self.size(self) if callable(self.size) else self.size

  @functools.cached_property
  def groups(self) -> int:
    """Batch sizes are multiples of this."""
    return sharding.batch_multiple(self.mesh)

  @functools.cached_property
  def shapes(self) -> tuple[batches.Shape, ...]:
    """Batch shapes that serve all parts, with a row for each example."""
    tokens = np.concatenate([part.num_tokens for part in self.parts.values()])
    responses = np.concatenate([part.num_response_tokens for part in self.parts.values()])
    return batches.plan_shapes(tokens, responses, self.max_shapes)

  @functools.cached_property
  def layout(self) -> dict[batches.Shape, batches.Layout]:
    """Batch sizes and response slots of each shape when the training set is scored."""
    plain = batches.Batcher(self.parts["train"], self.shapes, multiple_of=self.groups)
    return plain.layout_of(plain.sequential_plan(self.batch_tokens))

  @functools.cached_property
  def packed_shapes(self) -> tuple[packing.PackedShape, ...]:
    """Packed sizes that serve all parts when they are scored."""
    return self.packed_shapes_for(self.batch_tokens)

  def packed_shapes_for(self, batch_tokens: int) -> tuple[packing.PackedShape, ...]:
    """The same, for batches of so many tokens."""
    plain = [packing.Packer(part, groups=self.groups) for part in self.parts.values()]
    return packing.sequential_shapes(plain, batch_tokens)

  def place(self, batch: batches.Batch) -> batches.Batch:
    """Puts a batch onto the devices."""
    return sharding.place_batch(batch, self.mesh)
