"""Several examples in one row: padding costs as much as real tokens, and packed rows have next to none.

A row holds whole examples one after the other, and `offsets` says where each begins, so that attention and rotary
positions see every example as if it were alone:

    tokens    a a a b b c c c c .
    offsets   0 1 2 0 1 0 1 2 3 0        a 0 begins an example; padding is an example of one token, again and again

Rows of one length make one compiled program, where buckets by length make one for each bucket. What maps over single
examples (`vmap`) needs a row for each: `batches.Batcher`. Everything else takes packed rows.

Letters: W rows and E examples of a batch, T tokens of a row, G groups of devices that share a batch (W, E and the slots
are cut evenly over them, and no index leaves its group), R responses of an example, M filled response slots of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from in2core_jax.data import ragged
from in2core_jax.data.batches import Batch, PairTerms, rejected_starts, round_up, slot_weight
from in2core_jax.data.packed_rows import lay_out
from in2core_jax.data.row_plans import Cells, FlatCells, FlatPlan, pack, placed, row_lengths
from in2core_jax.errors import UserError

_COMPILE_STEPS = 10  # a training step is compiled in less than the time that the largest batch is run so often


# ---- batches with their responses ----------------------------------------------------


class PackedShape(NamedTuple):
  """The fixed size of a packed batch: one compiled program. All but T and R are of one group.

  Attributes:
    num_tokens: T.
    height: rows, W / G.
    size: examples, E / G.
    num_responses: R.
    num_slots: M.
  """

  num_tokens: int
  height: int
  size: int
  num_responses: int
  num_slots: int

  def holds(self, other: PackedShape) -> bool:
    """Whether a batch of the other shape fits."""
    return self.num_tokens == other.num_tokens and all(a >= b for a, b in zip(self, other, strict=True))


def join(shapes: Iterable[PackedShape]) -> tuple[PackedShape, ...]:
  """The least shape of each row length that holds all of that length, in growing order."""
  found: dict[int, PackedShape] = {}
  for shape in shapes:
    other = found.get(shape.num_tokens, shape)
    found[shape.num_tokens] = PackedShape(*map(max, zip(shape, other, strict=True)))
  return tuple(found[length] for length in sorted(found))


class Packer:
  """Cuts a tokenised data set into batches of packed rows; `sequential` and `shuffled` are those of `Batcher`.

  The data set needs `tokens` and `response_mask` (sequences over examples, int32 [T_i] and bool [T_i]) and `ids`.
  """

  def __init__(
    self,
    dataset: Any,
    reduction: str = "mean",
    hidden: Any = None,
    groups: int = 1,
    shapes: Sequence[PackedShape] = (),
    pairs: PairTerms | None = None,
    weights: np.ndarray | None = None,
  ):
    """Prepares the packer.

    Args:
      dataset: a `TokenizedDataset` of N examples.
      reduction: "mean" (weight 1 / number of response tokens) or "sum" (weight 1).
      hidden: the boundary cache of this very data set, or None.
      groups: G.
      shapes: sizes that batches take when they fit (`shapes_of`), so that several packers run the same compiled
        programs; a batch that fits in none gets its own.
      pairs: of a data set of preference pairs; without it they can be planned, but no batch of them be built.
      weights: f64 [N], above 0: how much the loss of each example counts, divided by their mean; None: all alike.

    Raises:
      UserError: weights of preference pairs.
    """
    if weights is not None and rejected_starts(dataset) is not None:
      raise UserError("preference pairs have no weights: their DPO loss is no sum over tokens; remove the key 'weight'")
    self._scale = None if weights is None else weights / np.mean(weights)
    self.dataset, self.reduction, self.hidden, self.groups = dataset, reduction, hidden, groups
    self.shapes = tuple(sorted(shapes))
    self.pairs, self._second = pairs, rejected_starts(dataset)
    self._lengths = ragged.lengths_of(dataset.tokens)
    self._responses = ragged.counts_of(dataset.response_mask)

  def __len__(self) -> int:
    return len(self._lengths)

  # ---- plans: which examples share a batch

  def sequential_plan(self, batch_tokens: int) -> Sequence[tuple[PackedShape, Cells]]:
    """Lists the batches of `sequential`: each example once, about equally many response tokens in each batch."""
    if batch_tokens < 1:
      raise UserError(f"batch_tokens={batch_tokens} must be at least 1")
    dealt = [self._dealt(members, length, batch_tokens) for length, members in self._classes().items()]
    plan = FlatPlan(self.groups, dealt)
    return plan.with_shapes(self._shapes_of(plan))

  def _dealt(self, members: np.ndarray, length: int, batch_tokens: int) -> FlatCells:
    """Packs the examples of one row length, and deals the rows, by falling responses back and forth, over cells."""
    order, chosen = placed(self._lengths[members], length)
    members = members[order].astype(np.int32)
    sizes = np.bincount(chosen)
    height = max(1, batch_tokens // length // self.groups)
    count = -(-len(sizes) // (height * self.groups)) * self.groups
    ranked = np.argsort(-np.bincount(chosen, self._responses[members]), kind="stable").astype(np.int32)
    turn, place = np.divmod(np.arange(len(sizes), dtype=np.int32), np.int32(count))
    cell = np.where(turn % 2 == 0, place, count - 1 - place)  # so that all cells end up alike
    rows = ranked[np.argsort(cell, kind="stable")]
    rank = np.empty_like(rows)
    rank[rows] = np.arange(len(rows), dtype=np.int32)
    return FlatCells(
      length,
      members[np.argsort(rank[chosen], kind="stable")],
      np.cumsum(sizes[rows], dtype=np.int32),
      np.cumsum(np.bincount(cell, minlength=count), dtype=np.int32),
    )

  def _classes(self) -> dict[int, np.ndarray]:
    """Row length -> its examples: lengths of the given shapes where they hold everything."""
    known = sorted({shape.num_tokens for shape in self.shapes})
    if not known or not len(self) or known[-1] < self._lengths.max():
      return row_lengths(self._lengths)
    index = np.searchsorted(known, self._lengths)
    return {known[i]: np.flatnonzero(index == i) for i in np.unique(index)}

  def shuffled_plan(self, batch_size: int, seed: int, epoch: int, length: int = 0) -> list[tuple[PackedShape, Cells]]:
    """Lists the batches of `shuffled`: ceil(N / batch_size) of them, alike in how many tokens they hold.

    Every batch gets one example out of each of `batch_size` strata of equal size by length (prompt tokens counted once,
    response tokens twice, for they go through the vocabulary projection too), at random within the stratum: less
    variance between steps, and one program serves all of them. When N does not divide, one batch is smaller.

    Args:
      batch_size: examples of a batch.
      seed: integer that names the run.
      epoch: integer; another epoch has another order.
      length: T of the rows; that of the longest shape when 0.
    """
    if batch_size < 1:
      raise UserError(f"batch_size={batch_size} must be at least 1")
    length = max(length or max((s.num_tokens for s in self.shapes), default=0), round_up(self._lengths.max(), 16))
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(self))
    order = order[np.argsort(-(self._lengths + self._responses)[order], kind="stable")]
    full, rest = divmod(len(self), batch_size)
    taken = np.zeros(len(self), bool)
    some = np.floor((np.arange(rest) + rng.random(rest)) * len(self) / max(rest, 1)).astype(np.int64)
    # Two stretches share the row on their border: the second draw of it moves on by one.
    taken[np.maximum.accumulate(some - np.arange(rest)) + np.arange(rest)] = True
    chosen = list(rng.permuted(order[~taken].reshape(batch_size, full), axis=1).T)
    chosen += [order[taken]] if rest else []
    plan = [(length, self._cells(chosen[number], length)) for number in rng.permutation(len(chosen))]
    return self._shaped(plan)

  def _cells(self, examples: np.ndarray, length: int) -> Cells:
    """Deals examples, by length back and forth, over the groups and packs those of each group."""
    ranked = examples[np.argsort(-self._lengths[examples], kind="stable")]
    turns = np.arange(len(ranked)) % (2 * self.groups)
    group = np.where(turns < self.groups, turns, 2 * self.groups - 1 - turns)
    return [pack(ranked[group == g], self._lengths, length) for g in range(self.groups)]

  def _shaped(self, plan: list[tuple[int, Cells]]) -> list[tuple[PackedShape, Cells]]:
    """Gives each batch its shape."""
    return [(shape, cells) for shape, (_, cells) in zip(self._shapes_of(plan), plan, strict=True)]

  def _shapes_of(self, plan: Sequence[tuple[int, Cells]]) -> list[PackedShape]:
    """The shape of each batch: a given one that holds it, else one that holds all such batches of the plan."""
    needs = [self._need(length, cells) for length, cells in plan]
    own = join(need for need in needs if not any(shape.holds(need) for shape in self.shapes))
    every = (*self.shapes, *own)
    return [next(shape for shape in every if shape.holds(need)) for need in needs]

  def _need(self, length: int, cells: Cells) -> PackedShape:
    examples = [list(itertools.chain.from_iterable(cell)) for cell in cells]
    return PackedShape(
      length,
      max(1, *map(len, cells)),
      round_up(max(map(len, examples)), 8),
      round_up(max(int(self._responses[part].max(initial=1)) for part in examples), 16),
      round_up(max(int(self._responses[part].sum()) for part in examples), 32),
    )

  # ---- batches

  def sequential(self, batch_tokens: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (rows, batch) with each example exactly once, always in the same order.

    Args:
      batch_tokens: token positions per batch, about, padding included.

    Yields:
      rows: int64 [b], b <= E, which example stands where; -1 where none does, nor does any after the last. And the
        batch.
    """
    yield from self.planned(self.sequential_plan(batch_tokens))

  def planned(self, plan: Sequence[tuple[PackedShape, Cells]]) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (rows, batch) of the batches of a plan, or of a part of one."""
    for shape, cells in plan:
      yield self.batch(cells, shape)

  def shuffled(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (rows, batch) with each example exactly once, in an order given by (seed, epoch) alone."""
    yield from self.planned(self.shuffled_plan(batch_size, seed, epoch))

  def sample(self, examples: np.ndarray) -> tuple[np.ndarray, Batch]:
    """One batch of the given examples, in the first given shape that holds them."""
    length = max((s.num_tokens for s in self.shapes), default=round_up(self._lengths[examples].max(), 16))
    ((shape, cells),) = self._shaped([(length, self._cells(np.asarray(examples), length))])
    return self.batch(cells, shape)

  def batch(self, cells: Cells, shape: PackedShape) -> tuple[np.ndarray, Batch]:
    """Builds a batch.

    Args:
      cells: rows of each group, and examples of each row.
      shape: its size.

    Returns:
      (rows, batch), numpy leaves; rows as `sequential` yields them.
    """
    blank = [[] for _ in range(shape.height)]
    rows = [row for cell in cells for row in [*cell, *blank[len(cell) :]]]
    laid = lay_out(self.dataset.tokens, shape.num_tokens, len(rows), rows, 0, self._second)
    groups, area = len(cells), shape.height * shape.num_tokens
    position = np.zeros((groups * shape.size, shape.num_responses), np.int32)
    target, weight = np.zeros_like(position), np.zeros(position.shape, np.float32)
    where = np.full(groups * shape.size, -1, np.int64)
    slots = np.full((groups, shape.num_slots), shape.size * shape.num_responses, np.int32)
    for group in range(groups):
      inside = np.flatnonzero(laid.places // area == group)
      for place, item in enumerate(inside, group * shape.size):
        where[place] = example = laid.examples[item]
        ids, answered = self.dataset.tokens[example], np.flatnonzero(self.dataset.response_mask[example])
        if len(answered) and answered[0] == 0:
          raise UserError(f"example {self.dataset.ids[example]!r} has a response token at t = 0: nothing predicts it")
        # Token t is predicted from the hidden state at t - 1.
        position[place, : len(answered)] = laid.places[item] - group * area + answered - 1
        target[place, : len(answered)] = ids[answered]
        if self._second is None:
          own = 1.0 if self._scale is None else self._scale[example]
          weight[place, : len(answered)] = slot_weight(len(answered), self.reduction) * own
        else:
          weight[place, : len(answered)] = self.pairs.weights(answered, self._second[example])
      filled = np.flatnonzero(weight[group * shape.size : (group + 1) * shape.size].reshape(-1))
      slots[group, : len(filled)] = filled
    hidden = None
    if self.hidden is not None:
      hidden = self.hidden.lay_out(laid.examples, laid.places, laid.tokens.size).reshape(*laid.tokens.shape, -1)
    valid = (where >= 0).astype(np.float32)
    reference = None
    if self._second is not None:
      reference = np.where(where >= 0, self.pairs.reference[where], np.float32(0))
    where = where[: int(np.flatnonzero(where >= 0).max(initial=-1)) + 1]
    return where, Batch(laid.tokens, hidden, position, target, weight, valid, slots, laid.offsets, reference)


def sequential_shapes(packers: Sequence[Packer], batch_tokens: int) -> tuple[PackedShape, ...]:
  """Shapes that serve all batches of several packers (without shapes of their own) when they are scored."""
  lengths = np.concatenate([packer._lengths for packer in packers])
  marks = [PackedShape(length, 0, 0, 0, 0) for length in row_lengths(lengths)]
  alike = [Packer(p.dataset, p.reduction, None, p.groups, marks) for p in packers]
  return join(shape for packer in alike for shape, _ in packer.sequential_plan(batch_tokens))


def training_shape(
  packers: Sequence[Packer], batch_size: int, seeds: Sequence[int] = (0,), epochs: int = 2
) -> PackedShape:
  """A shape that serves the shuffled batches of several packers, with the row length that costs least."""
  longest = round_up(max(packer._lengths.max() for packer in packers), 16)
  found = []
  for length in sorted({round_up(longest * factor, 16) for factor in (1, 1.25, 1.5, 2, 3)}):
    plans = (
      Packer(p.dataset, p.reduction, None, p.groups).shuffled_plan(batch_size, seed, epoch, length)
      for p in packers
      for seed in seeds
      for epoch in range(epochs)
    )
    (shape,) = join(shape for plan in plans for shape, _ in plan)
    found.append((_row_cost(shape), shape))
  return min(found)[1]


def training_shapes(
  packers: Sequence[Packer], batch_size: int, steps: int, seeds: Sequence[int] = (0, 1, 2), epochs: int = 2
) -> tuple[PackedShape, ...]:
  """Shapes of one row length for the trainings of several packers: as many as pay for their compilation.

  A packer with all of them takes for each batch the least that holds it, so that a set of short examples does not pay
  for another of long ones. The packers are sorted by what a step costs, and cut where the sum over all steps and
  compilations is least.

  Args:
    packers: of the sets of examples.
    batch_size: examples of a batch.
    steps: of each training.
    seeds: of the orders of the data that are looked at; batches of others are alike.
    epochs: the same, from the first one.
  """
  length = training_shape(packers, batch_size, seeds[:1], epochs).num_tokens
  needs = []
  for p in packers:
    own, orders = Packer(p.dataset, p.reduction, None, p.groups), itertools.product(seeds, range(epochs))
    needs += join(shape for order in orders for shape, _ in own.shuffled_plan(batch_size, *order, length))
  needs.sort(key=_step_cost)
  compiling = _COMPILE_STEPS * max(_step_cost(shape) for shape in join(needs))
  best: list[tuple[float, tuple[PackedShape, ...]]] = [(0.0, ())]  # for the first 0, 1, ... sets
  for stop in range(1, len(needs) + 1):
    options = []
    for start in range(stop):
      (shape,) = join(needs[start:stop])
      cost, shapes = best[start]
      options.append((cost + _step_cost(shape) * (stop - start) * steps + compiling, (*shapes, shape)))
    best.append(min(options))
  return best[-1][1]


def _row_cost(shape: PackedShape) -> float:
  """A token costs 1 in the matrices and T / 3000 in attention over its row (SmolLM2-135M; less for wider models)."""
  return shape.height * shape.num_tokens * (1 + shape.num_tokens / 3000)


def _step_cost(shape: PackedShape) -> float:
  """A slot costs about as much in the vocabulary projection as a token in the few layers that are trained."""
  return _row_cost(shape) + shape.num_slots


def curvature_shape(fixed: Packer, whole: Packer, size: int, draws: Sequence[np.ndarray]) -> PackedShape:
  """A shape for batches of `size` examples: those of a fixed set, and draws like the given ones from the whole set."""
  length = round_up(whole._lengths.max(), 16)
  plan = fixed.shuffled_plan(size, 0, 0, length)
  plan += whole._shaped([(length, whole._cells(rows, length)) for rows in draws])
  return join(shape for shape, _ in plan)[-1]
