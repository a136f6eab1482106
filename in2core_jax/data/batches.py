"""Tokenised data -> `Batch` pytrees in a handful of fixed shapes.

A compiled program serves one shape only, and padding costs as much as real tokens. So the examples are cut into a few
shapes, chosen by dynamic programming so that the padded cost is least, and every batch has one of these shapes.

The off-by-one of next-token prediction, drawn once (P prompt token, a b c response tokens, . padding, T = 7, R = 4):

    t              0  1  2  3  4  5  6
    tokens         P  P  P  a  b  c  .
    response_mask  0  0  0  1  1  1  .
    predicted from -  -  -  2  3  4  .

    slot r         0  1  2  3
    position       2  3  4  0        hidden state at `position` ...
    target         a  b  c  0        ... predicts `target`
    weight        1/3 1/3 1/3 0      (reduction "mean"; 1 1 1 0 with "sum")
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from in2core_jax.data import ragged
from in2core_jax.errors import UserError, how_many

REDUCTIONS = ("mean", "sum")


class Batch(NamedTuple):
  """One batch of B examples: a pytree, of numpy arrays as it leaves the `Batcher`.

  `losses[b] = sum_r weight[b, r] * nll(target[b, r] | hidden state at position[b, r])`, in nats.

  Attributes:
    tokens: int32 [B, T], token ids, padded with the pad id.
    hidden: f32 or bf16 [B, T, D], hidden states entering the boundary layer, or None when the whole model runs.
    position: int32 [B, R], where each response token is predicted from: its own index minus one; 0 on padding.
    target: int32 [B, R], the response tokens; 0 on padding.
    weight: f32 [B, R], 1 / number of response tokens ("mean") or 1 ("sum"); 0 on padding.
    valid: f32 [B], 1 for a real example and 0 for a padding row. An example without any response token has valid 1
      and weight 0 everywhere: its loss, gradient and score are exactly 0.
    slots: int32 [G, M], the response slots that hold a token, as indices into a group's B / G * R slots; the index
      B / G * R itself pads. Responses differ much in length, so M is about half of B / G * R, and so is the cost of
      the vocabulary projection. G is the number of devices that share the examples: no index leaves its device. None:
      every slot is computed, which gives the same numbers.
    offsets: int32 [W, T] where rows hold several examples (`packing`), else None. Then tokens, hidden and offsets have
      W rows while the other leaves still have B examples, and `position` counts from the first token of the group.
      Preference pairs have offsets in any case, because a pair is two sequences; a row for each has no slots.
    reference: f32 [B] of preference pairs, beta (log ref_w - log ref_l); None: no pairs. Then the slots are those of
      the chosen answer w and of the rejected one l, and their weights are beta and -beta (`PairTerms`).
  """

  tokens: Any
  hidden: Any
  position: Any
  target: Any
  weight: Any
  valid: Any
  slots: Any = None
  offsets: Any = None
  reference: Any = None


@dataclasses.dataclass(frozen=True)
class PairTerms:
  """What the loss of preference pairs needs besides tokens.

  Attributes:
    beta: scale of the loss.
    source: gives log ref_w - log ref_l of the data set's examples, f64 [N]; asked when the first batch is built.
  """

  beta: float
  source: Callable[[], np.ndarray]

  @functools.cached_property
  def reference(self) -> np.ndarray:
    """beta (log ref_w - log ref_l), float32 [N]."""
    return (self.beta * np.asarray(self.source(), np.float64)).astype(np.float32)

  def weights(self, where: np.ndarray, second: int) -> np.ndarray:
    """Weights of the response tokens at `where`: beta before the rejected side begins, -beta after."""
    return np.where(where < second, self.beta, -self.beta)


class Shape(NamedTuple):
  """The fixed size of a batch row: T token positions and R response slots."""

  num_tokens: int
  num_responses: int


class Layout(NamedTuple):
  """How batches of one shape are cut: B examples, and at least M slots (`Batch.slots`) a group."""

  size: int
  num_slots: int


class HiddenSource(Protocol):
  """Where a `Batcher` gets hidden states from: the boundary cache."""

  def gather(self, rows: np.ndarray, num_tokens: int) -> np.ndarray:
    """Returns the hidden states [len(rows), num_tokens, D] of the examples `rows`, padded."""


def round_up(value: int, multiple: int) -> int:
  """Returns the least multiple of `multiple` that is at least `value` and at least one multiple."""
  return max(1, -(-int(value) // multiple)) * multiple


def slot_weight(num_responses: int, reduction: str) -> float:
  """Weight of each response token of an example: 1 / their number ("mean") or 1 ("sum")."""
  return 1.0 / num_responses if reduction == "mean" and num_responses else 1.0


def rejected_starts(dataset: Any) -> np.ndarray | None:
  """Where the rejected side of each example begins, int64 [N]; None for data that is no preference pairs."""
  return getattr(dataset, "second", None)


def within_sequences(length: int, second: int = 0) -> np.ndarray:
  """Position of each token of an example in its own sequence: 0, 1, 2, ..., from 0 again at `second`."""
  places = np.arange(length)
  return np.where(places < second, places, places - second) if second else places


def plan_shapes(
  num_tokens: Sequence[int],
  num_responses: Sequence[int],
  max_shapes: int = 4,
  multiple: int = 16,
  block_cost: float = 106.0,
  head_cost: float = 28.0,
) -> tuple[Shape, ...]:
  """Chooses at most `max_shapes` batch shapes that cover all examples with the least padded cost.

  Minimises `sum_i block_cost * T(i) + head_cost * R(i)` over chains T_1 < T_2 < ... by dynamic programming over the
  sorted distinct lengths, where T(i), R(i) are those of the first shape that holds example i. R of a shape is the
  running maximum over all examples no longer than T, so a later shape holds whatever an earlier one holds.
  For several data sets that shall share compiled programs, concatenate their counts.

  Args:
    num_tokens: int [N], tokens of each example.
    num_responses: int [N], response tokens of each example.
    max_shapes: the most shapes (= programs to compile).
    multiple: T and R are rounded up to a multiple of this.
    block_cost: cost of one token position in the layers: their number of matrix parameters, in any unit. The default
      is in millions, for the 30 layers of SmolLM2-135M; from a boundary cache, only the layers above it cost.
    head_cost: cost of one response slot in the vocabulary projection, in the same unit.

  Returns:
    The shapes, in growing order; the last one holds every example.

  Raises:
    UserError: no example, counts of different length, or a number that is not positive.
  """
  tokens, responses = np.asarray(num_tokens, np.int64), np.asarray(num_responses, np.int64)
  if tokens.ndim != 1 or tokens.shape != responses.shape or tokens.size == 0:
    raise UserError(f"plan_shapes needs the counts of at least one example, got {tokens.shape} and {responses.shape}")
  if max_shapes < 1 or multiple < 1:
    raise UserError(f"max_shapes={max_shapes} and multiple={multiple} must both be at least 1")
  rounded = np.maximum(1, -(-tokens // multiple)) * multiple
  lengths, group, counts = np.unique(rounded, return_inverse=True, return_counts=True)
  widest = np.zeros(len(lengths), np.int64)
  np.maximum.at(widest, group, responses)
  widths = np.maximum(1, -(-np.maximum.accumulate(widest) // multiple)) * multiple
  ends = _cheapest_cuts(counts, block_cost * lengths + head_cost * widths, max_shapes)
  return tuple(Shape(int(lengths[end]), int(widths[end])) for end in ends)


def _cheapest_cuts(counts: np.ndarray, unit_costs: np.ndarray, max_segments: int) -> list[int]:
  """Cuts 0..m-1 into at most `max_segments` runs, a run i..j costing counts[i..j] * unit_costs[j]; returns the j's."""
  num = len(counts)
  before = np.concatenate([[0], np.cumsum(counts)])  # examples before group i
  best = np.full(num + 1, np.inf)  # best[j]: least cost of the first j groups with the segments used so far
  best[0] = 0.0
  choices, totals = [], []
  for _ in range(min(max_segments, num)):
    following, choice = np.full(num + 1, np.inf), np.zeros(num + 1, np.int64)
    for j in range(1, num + 1):
      candidates = best[:j] + (before[j] - before[:j]) * unit_costs[j - 1]
      choice[j] = int(np.argmin(candidates))
      following[j] = candidates[choice[j]]
    best = following
    choices.append(choice)
    totals.append(best[num])
  segments = int(np.argmin(totals)) + 1  # argmin takes the first: fewer shapes where more would save nothing
  ends, j = [], num
  for choice in reversed(choices[:segments]):
    ends.append(j - 1)
    j = int(choice[j])
  return ends[::-1]


class Batcher:
  """Cuts a tokenised data set into batches of the given shapes.

  The data set needs `tokens` and `response_mask` (sequences over examples, int32 [T_i] and bool [T_i]) and `ids`.
  """

  def __init__(
    self,
    dataset: Any,
    shapes: Sequence[Shape],
    reduction: str = "mean",
    hidden: HiddenSource | None = None,
    pad_id: int = 0,
    multiple_of: int = 1,
    layout: Mapping[Shape, Layout] | None = None,
    pairs: PairTerms | None = None,
  ):
    """Prepares the batcher.

    Args:
      dataset: a `TokenizedDataset` of N examples.
      shapes: chain of shapes as `plan_shapes` makes it: growing in T, never shrinking in R.
      reduction: "mean" (weight 1 / number of response tokens) or "sum" (weight 1).
      hidden: the boundary cache of this very data set, or None.
      pad_id: token id of padding; no result depends on it.
      multiple_of: batch sizes are rounded up to a multiple of this (the devices that share the batch axis).
      layout: sizes of another batcher (`layout_of`), so that both use the same compiled programs.
      pairs: of a data set of preference pairs; without it no batch of them can be built.

    Raises:
      UserError: unknown reduction, shapes that are no chain, or an example that fits in no shape.
    """
    if reduction not in REDUCTIONS:
      raise UserError(f"reduction={reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    if multiple_of < 1:
      raise UserError(f"multiple_of={multiple_of} must be at least 1")
    self.dataset, self.reduction, self.hidden = dataset, reduction, hidden
    self.pad_id, self.multiple_of, self.layout = pad_id, multiple_of, dict(layout or {})
    self.pairs, self._second = pairs, rejected_starts(dataset)
    self.shapes = tuple(Shape(*shape) for shape in shapes)
    for low, high in zip(self.shapes, self.shapes[1:], strict=False):
      if low.num_tokens >= high.num_tokens or low.num_responses > high.num_responses:
        raise UserError(f"shapes must grow from one to the next, but {low} is followed by {high}; use plan_shapes")
    self._lengths = ragged.lengths_of(dataset.tokens).astype(np.int64)
    self._responses = ragged.counts_of(dataset.response_mask).astype(np.int64)
    self._shape_index = self._first_fitting_shape()

  def _first_fitting_shape(self) -> np.ndarray:
    index = np.full(len(self._lengths), -1, np.int64)
    for i in reversed(range(len(self.shapes))):
      shape = self.shapes[i]
      index[(self._lengths <= shape.num_tokens) & (self._responses <= shape.num_responses)] = i
    if np.any(index < 0):
      row = int(np.argmax(index < 0))
      raise UserError(
        f"example {self.dataset.ids[row]!r} has {how_many(self._lengths[row], 'token')} and "
        f"{how_many(self._responses[row], 'response token')} and fits in none of the shapes "
        f"{[tuple(s) for s in self.shapes]}; plan the shapes with this data set included"
      )
    return index

  def __len__(self) -> int:
    return len(self._lengths)

  def shape_of(self, rows: Sequence[int]) -> Shape:
    """Returns the smallest shape that holds all the given rows."""
    return self.shapes[int(np.max(self._shape_index[np.asarray(rows, np.int64)]))]

  def batch(self, rows: Sequence[int], shape: Shape, size: int, num_slots: int | None = None) -> Batch:
    """Builds the batch of the given examples.

    Args:
      rows: int [b], indices into the data set, b <= size.
      shape: T and R of the batch.
      size: B; rows beyond b are padding with valid 0 and weight 0.
      num_slots: M of `Batch.slots`; the least level that holds this batch when None.

    Returns:
      The batch, with numpy leaves (see the drawing at the top of this module).

    Raises:
      UserError: more rows than `size`, or an example that does not fit in `shape`.
    """
    rows = np.asarray(rows, np.int64)
    if len(rows) > size:
      raise UserError(f"{len(rows)} rows do not fit in a batch of size {size}")
    num_tokens, width = shape
    tokens = np.full((size, num_tokens), self.pad_id, np.int32)
    position = np.zeros((size, width), np.int32)
    target = np.zeros((size, width), np.int32)
    weight = np.zeros((size, width), np.float32)
    valid = np.zeros(size, np.float32)
    for b, row in enumerate(rows):
      ids, where = self.dataset.tokens[row], np.flatnonzero(self.dataset.response_mask[row])
      if len(ids) > num_tokens or len(where) > width:
        raise UserError(
          f"example {self.dataset.ids[row]!r} has {how_many(len(ids), 'token')} and "
          f"{how_many(len(where), 'response token')}, more than the shape {tuple(shape)} holds"
        )
      if len(where) and where[0] == 0:
        raise UserError(f"example {self.dataset.ids[row]!r} has a response token at t = 0: nothing can predict it")
      tokens[b, : len(ids)] = ids
      position[b, : len(where)] = where - 1  # token t is predicted from the hidden state at t - 1
      target[b, : len(where)] = ids[where]
      weight[b, : len(where)] = self._weights(row, where)
      valid[b] = 1.0
    hidden = self._gather_hidden(rows, num_tokens, size)
    if self._second is not None:
      return self._pair_batch(rows, Batch(tokens, hidden, position, target, weight, valid))
    slots = self._slots(weight, num_slots or self._num_slots(rows, shape, size))
    return Batch(tokens, hidden, position, target, weight, valid, slots)

  def _weights(self, row: int, where: np.ndarray) -> float | np.ndarray:
    if self._second is None:
      return slot_weight(len(where), self.reduction)
    return self.pairs.weights(where, self._second[row])

  def _pair_batch(self, rows: np.ndarray, batch: Batch) -> Batch:
    """With what pairs have besides."""
    offsets = np.zeros_like(batch.tokens)
    reference = np.zeros_like(batch.valid)
    for b, row in enumerate(rows):
      length = self._lengths[row]
      offsets[b, :length] = within_sequences(length, self._second[row])
    reference[: len(rows)] = self.pairs.reference[rows]
    return batch._replace(offsets=offsets, reference=reference)

  def _num_slots(self, rows: np.ndarray, shape: Shape, size: int) -> int:
    """Least M that holds the responses of each group, in eighths of all slots so that few programs are compiled."""
    groups = self.multiple_of if size % self.multiple_of == 0 else 1
    counts = np.zeros(size, np.int64)
    counts[: len(rows)] = self._responses[rows]
    needed = int(counts.reshape(groups, -1).sum(axis=1).max())
    most = size * shape.num_responses // groups
    least = self.layout[shape].num_slots if shape in self.layout and self.layout[shape].size == size else 0
    return min(most, max(least, round_up(needed, max(16, -(-most // 8)))))

  def layout_of(self, plan: Sequence[tuple[np.ndarray, Shape, int]]) -> dict[Shape, Layout]:
    """The layout that a plan (`sequential_plan`, `shuffled_plan`) uses: one size, the largest M of each shape."""
    found: dict[Shape, Layout] = {}
    for rows, shape, size in plan:
      num_slots = self._num_slots(rows, shape, size)
      found[shape] = Layout(size, max(num_slots, found[shape].num_slots if shape in found else 0))
    return found

  def _slots(self, weight: np.ndarray, num_slots: int) -> np.ndarray:
    groups = self.multiple_of if len(weight) % self.multiple_of == 0 else 1
    flat = weight.reshape(groups, -1) > 0
    slots = np.full((groups, num_slots), flat.shape[1], np.int32)
    for group, filled in enumerate(flat):
      where = np.flatnonzero(filled)
      slots[group, : len(where)] = where
    return slots

  def _gather_hidden(self, rows: np.ndarray, num_tokens: int, size: int) -> np.ndarray | None:
    if self.hidden is None:
      return None
    found = np.asarray(self.hidden.gather(rows, num_tokens))
    if found.shape[:2] != (len(rows), num_tokens):
      raise ValueError(f"hidden.gather gave shape {found.shape} for {len(rows)} rows of {num_tokens} tokens")
    if len(rows) == size:
      return found
    padded = np.zeros((size, *found.shape[1:]), found.dtype)
    padded[: len(rows)] = found
    return padded

  def sequential_plan(self, batch_tokens: int) -> list[tuple[np.ndarray, Shape, int]]:
    """Lists the batches of `sequential` as (rows, shape, size), without building them.

    The size of a shape's batches is `batch_tokens // T`, at least 1, rounded up to `multiple_of`; the last batch of a
    shape keeps that size and is padded, so that nothing new is compiled for it. Where that padding would be more than
    a sixth of the rows (few examples of a shape), all batches of the shape get a smaller size instead. A `layout`
    overrules both.
    """
    if batch_tokens < 1:
      raise UserError(f"batch_tokens={batch_tokens} must be at least 1")
    plan = []
    for i, shape in enumerate(self.shapes):
      rows = np.flatnonzero(self._shape_index == i)
      size = self._even_size(len(rows), round_up(batch_tokens // shape.num_tokens, self.multiple_of))
      size = self.layout[shape].size if shape in self.layout else size
      plan += [(dealt, shape, size) for dealt in self._deal(rows, size)]
    return plan

  def _deal(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Deals rows into batches of `size` (the last one may hold less) with about equally many response tokens each.

    Rows go out by falling response length, back and forth over the batches; equal lengths keep their order.
    """
    num_full, rest = divmod(len(rows), size)
    ranked = rows[np.argsort(-self._responses[rows], kind="stable")]
    # The rows of the partial batch are taken evenly out of the ranking, the others are dealt.
    taken = np.zeros(len(rows), bool)
    if rest:
      taken[(np.arange(rest) * len(rows)) // rest] = True
    dealt = ranked[~taken].reshape(size, num_full)
    dealt[1::2] = dealt[1::2, ::-1]
    return [*dealt.T, *([ranked[taken]] if rest else [])]

  def _even_size(self, num_rows: int, size: int) -> int:
    """Returns `size`, or less where cutting the rows evenly spares much padding; in steps of 4: few sizes."""
    num_batches = -(-num_rows // size)
    if num_rows == 0 or num_batches * size <= 7 / 6 * num_rows:
      return size
    even = -(-num_rows // num_batches)
    return min(size, round_up(round_up(even, 4) if even > 8 else even, self.multiple_of))

  def sequential(self, batch_tokens: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (rows, batch) with each example exactly once, grouped by shape, always in the same order.

    Args:
      batch_tokens: token positions per batch, padding included; short shapes get more rows.

    Yields:
      rows: int64 [b], the real examples, in batch order (the batch may have padding rows after them), and the batch.
    """
    yield from self.planned(self.sequential_plan(batch_tokens))

  def planned(self, plan: Sequence[tuple[np.ndarray, Shape, int]]) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (rows, batch) of the batches of a plan, or of a part of one."""
    for rows, shape, size in plan:
      yield rows, self.batch(rows, shape, size)
