"""What a run computes, on paper: FLOPs of every pass and every solver, from shapes alone; no array is made.

A matrix of P numbers costs 2 P a token in the forward pass, and as much for every further product with it or
with its tangent or cotangent (method.md section 4). `KINDS` counts these products for each pass; what is not a matrix
product (norms, softmax, rotary positions) is left out, about 4 % of a small layer and less of a large one. Padding is
counted: it costs as much as real tokens.

Letters: W rows of a batch, T tokens of a row, D width, V vocabulary, H query heads, P size of the subtree, Q queries.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from in2core_jax.data.batches import Layout, Shape
from in2core_jax.data.packing import Cells, PackedShape
from in2core_jax.ihvp import ekfac
from in2core_jax.params.subtree import Subtree, split

# ---- what a pass runs through --------------------------------------------------------


class Work(NamedTuple):
  """What the batches of a pass add up to, padding included.

  Attributes:
    tokens: token positions, sum of W T.
    pairs: sum of W T^2, which attention's products grow with.
    slots: response slots that go through the vocabulary projection.
    examples: rows of the data set.
    batches: how many.
  """

  tokens: float = 0.0
  pairs: float = 0.0
  slots: float = 0.0
  examples: float = 0.0
  batches: float = 0.0

  def plus(self, other: Work) -> Work:
    """Both, one after the other."""
    return Work(*(a + b for a, b in zip(self, other, strict=True)))

  def times(self, factor: float) -> Work:
    """The same again and again; a data set of `factor` times as many examples like these."""
    return Work(*(factor * value for value in self))


def packed_work(plan: Sequence[tuple[PackedShape, Cells]]) -> Work:
  """The work of a plan of `packing.Packer`."""
  total = Work()
  for shape, cells in plan:
    rows = len(cells) * shape.height
    examples = sum(len(row) for cell in cells for row in cell)
    tokens = rows * shape.num_tokens
    total = total.plus(Work(tokens, tokens * shape.num_tokens, len(cells) * shape.num_slots, examples, 1))
  return total


def row_work(
  plan: Sequence[tuple[np.ndarray, Shape, int]], layout: Mapping[Shape, Layout] | None = None, groups: int = 1
) -> Work:
  """The work of a plan of `batches.Batcher`, a row for each example.

  Args:
    plan: (rows, shape, size) of every batch.
    layout: gives the slots of a batch; None: every slot is computed, as under `vmap`, which drops `Batch.slots`.
    groups: devices that share a batch.
  """
  total = Work()
  for rows, shape, size in plan:
    slots = size * shape.num_responses if layout is None else groups * layout[shape].num_slots
    tokens = size * shape.num_tokens
    total = total.plus(Work(tokens, tokens * shape.num_tokens, slots, len(rows), 1))
  return total


def boundary_work(plan: Sequence[tuple[int, int, Sequence]]) -> Work:
  """The work of a plan of `packed_rows.packed_plan`: no response slot, the layers below the boundary have no head."""
  total = Work()
  for length, height, rows in plan:
    total = total.plus(Work(height * length, height * length**2, 0, sum(map(len, rows)), 1))
  return total


# ---- FLOPs ---------------------------------------------------------------------------


class Kind(NamedTuple):
  """Products of a pass, beside the forward one: how often each matrix product of the forward pass is paid again.

  Attributes:
    through: with tangents and cotangents of hidden states, in every matrix at or above the boundary.
    own: with tangents of, or for the gradient in, the chosen matrices.
    attention: of the scores and of the mixing, the forward pass counted in.
    head: of the vocabulary projection when it is frozen, the forward pass counted in.
  """

  through: int
  own: int
  attention: int
  head: int


# A product y = x W is one matrix product forward; its tangent is dx W and x dW, its reverse g W^T and x^T g. Attention
# multiplies two activations, so everything counts. The head of a loss has its slope formed beside the value.
KINDS = {
  "losses": Kind(0, 0, 1, 1),
  "jvp": Kind(1, 1, 3, 2),
  "gradient": Kind(1, 1, 3, 2),
  "probes": Kind(1, 0, 3, 2),  # the cotangents reach the matrices, no gradient in them is formed (EK-FAC's factors)
  "ggn": Kind(2, 2, 5, 3),  # one linearisation, pushed forward and pulled back
  "fisher": Kind(2, 2, 5, 2),
  "hessian": Kind(3, 5, 9, 4),  # a gradient, and the tangent of everything in it
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Numbers in the matrices of a model, cut along a subtree.

  Attributes:
    below: in the layers under the boundary.
    above: in the layers from the boundary up, chosen or not.
    chosen: in the chosen matrices of layers.
    layers_below, layers_above: how many layers.
    attended: H * head_dim, the width of attention's two products.
    head: V * D.
    head_chosen: whether the head is in the subtree.
    subtree: P.
    matrices: (in, out) of every chosen matrix of a layer.
    idle: of below, above and chosen, numbers in matrices of experts that a token does not go through.
  """

  below: int
  above: int
  chosen: int
  layers_below: int
  layers_above: int
  attended: int
  head: int
  head_chosen: bool
  subtree: int
  matrices: tuple[tuple[int, int], ...]
  idle: tuple[int, int, int] = (0, 0, 0)

  @property
  def computed(self) -> Sizes:
    """With the numbers of `below`, `above` and `chosen` that are multiplied for a token."""
    below, above, chosen = self.idle
    return dataclasses.replace(
      self, below=self.below - below, above=self.above - above, chosen=self.chosen - chosen, idle=(0, 0, 0)
    )

  @property
  def plain(self) -> int:
    """Chosen numbers that are in no matrix of a layer: norms, biases, embedding, head."""
    return self.subtree - self.chosen


def split_shapes(params: Any, tree: Subtree) -> tuple[Any, Any]:
  """Shapes of (sub, frozen)."""
  return jax.eval_shape(lambda whole: split(whole, tree), params)


def layer_matrices(params: Any) -> int:
  """Numbers in the matrices of all layers, also those of experts."""
  flat = traverse_util.flatten_dict(params["layers"], sep="/")
  return sum(_count(leaf) for path, leaf in flat.items() if leaf.ndim >= 3 and not path.endswith("/expert_bias"))


def matrix_sizes(params: Any, tree: Subtree, share: float = 1.0) -> Sizes:
  """Sizes of a model (arrays or shapes; adapters count as matrices) and a subtree of it.

  Args:
    params: of the model.
    tree: the subtree.
    share: of the rows of all experts that is computed (`experts.share`); all of them where sketches stand beside.
  """
  flat = traverse_util.flatten_dict(params["layers"], sep="/")
  a_layer = layer_matrices(params) // tree.num_layers
  sub = traverse_util.flatten_dict(split_shapes(params, tree)[0], sep="/")
  matrices = [leaf for path, leaf in sub.items() if re.fullmatch(ekfac.MATRICES, path)]
  each = tuple(leaf.shape[-2:] for leaf in matrices for _ in range(math.prod(leaf.shape[:-2])))
  size = sum(map(_count, sub.values()))
  above = tree.num_layers - tree.boundary
  beside = {path.rpartition("/")[0] for path in flat if path.endswith(("/core", "_probe"))}
  sketched = any(f"{module}/experts" in flat for module in beside)
  saved = 0.0 if sketched else 1 - share
  of_experts = sum(_count(leaf) for path, leaf in flat.items() if path.endswith("/experts")) // tree.num_layers
  chosen_experts = sum(_count(leaf) for path, leaf in sub.items() if path.endswith("/experts"))
  idle = of_experts * tree.boundary, of_experts * above, chosen_experts
  return Sizes(
    below=a_layer * tree.boundary,
    above=a_layer * above,
    chosen=sum(inputs * outputs for inputs, outputs in each),
    layers_below=tree.boundary,
    layers_above=above,
    attended=flat["attention/o_proj/kernel"].shape[1],
    head=_count(params["embed"]["embedding"]),
    head_chosen="lm_head" in tree.extras or ("embed" in tree.extras and "lm_head" not in params),
    subtree=size,
    matrices=each,
    idle=tuple(int(saved * numbers) for numbers in idle),
  )


def pass_flops(sizes: Sizes, kind: str, work: Work, cached: bool) -> float:
  """FLOPs of a pass (method.md section 4).

    2 tokens (P_below + (1 + through) P_above + own P_chosen) + 4 pairs H head_dim (L_below + attention L_above)
      + 2 slots head V D

  For "jvp" with all layers above the boundary chosen the first term is 2 P_all + 4 P_sel a token.

  Args:
    sizes: of the model and the subtree.
    kind: one of `KINDS`.
    work: of all batches.
    cached: hidden states come from the boundary cache, so that nothing below runs.
  """
  counts = KINDS[kind]
  sizes = sizes if kind == "probes" else sizes.computed
  matrices = (1 + counts.through) * sizes.above + counts.own * sizes.chosen + (0 if cached else sizes.below)
  layers = counts.attention * sizes.layers_above + (0 if cached else sizes.layers_below)
  head = 1 + counts.through + counts.own if sizes.head_chosen else counts.head
  return 2 * work.tokens * matrices + 4 * work.pairs * sizes.attended * layers + 2 * work.slots * head * sizes.head


def flops(kind: str, sizes: Sizes, tokens: int, responses: int, cached: bool = False) -> int:
  """`pass_flops` of real tokens in matrices alone: neither padding nor attention's products, which grow with T^2."""
  return int(pass_flops(sizes, kind, Work(tokens, 0, responses), cached))


def below_flops(sizes: Sizes, work: Work) -> float:
  """FLOPs of filling the boundary cache: the forward pass of the layers under it, and no head."""
  return 2 * work.tokens * sizes.computed.below + 4 * work.pairs * sizes.attended * sizes.layers_below


def contraction_flops(sizes: Sizes, examples: float, queries: int) -> float:
  """FLOPs of per-example gradients [B, P] times directions [Q, P]: 2 P Q an example (method.md section 4, row 2)."""
  return 2.0 * sizes.subtree * queries * examples


def ekfac_fit_flops(sizes: Sizes, work: Work, every_slot: Work, drawn: bool, cached: bool) -> float:
  """FLOPs of `ekfac.fit`: a pass for the factors, one for the eigenvalues, one for leaves that are no matrix.

    moments 2 tokens sum(in^2 + out^2); squares 2 tokens sum(in^2 + out^2 + in out); eigenvectors 9 sum(in^3 + out^3)

  Args:
    sizes: of the model and the subtree.
    work: of the examples that it is fitted to, a row for each.
    every_slot: the same with every response slot computed (labels are drawn without `Batch.slots`; so are diagonals).
    drawn: labels are drawn from the model first, a forward pass (ggn).
    cached: as in `pass_flops`.
  """
  label = pass_flops(sizes, "losses", every_slot, cached) if drawn else 0.0
  both = sum(inputs**2 + outputs**2 for inputs, outputs in sizes.matrices)
  products = sum(inputs * outputs for inputs, outputs in sizes.matrices)
  total = 0.0
  if sizes.matrices:
    total += 2 * (label + pass_flops(sizes, "probes", work, cached))
    total += 2 * work.tokens * (2 * both + products)
    total += 9.0 * sum(inputs**3 + outputs**3 for inputs, outputs in sizes.matrices)
  if sizes.plain:
    total += label + pass_flops(sizes, "probes", every_slot, cached)
  return total


def ekfac_apply_flops(sizes: Sizes, queries: int) -> float:
  """FLOPs of U_A ((U_A^T V U_S) / .) U_S^T for every chosen matrix: 4 in out (in + out) a query."""
  return float(queries * sum(4 * a * b * (a + b) for a, b in sizes.matrices))


# ---- solvers -------------------------------------------------------------------------


class Inverse(NamedTuple):
  """What a solver is told, as far as its cost depends on it; names are those of the flags.

  Attributes:
    solver: one of `solve.SOLVERS`.
    curvature: ggn, fisher or hessian.
    depth: LiSSA or CG steps, vectors of low_rank.
    repeat: LiSSA runs.
    queries: Q.
    relative: the damping is relative, which costs DataInf a pass.
    apart: the largest eigenvalue takes products of its own; CG as it is by default finds it in its own steps.
  """

  solver: str
  curvature: str
  depth: int
  repeat: int = 1
  queries: int = 1
  relative: bool = True
  apart: bool = True


def num_products(solver: str, fixed: int, depth: int, repeat: int, size: int, apart: bool = True) -> int:
  """Products with a batch of curvature examples that a solve takes at most, about.

  Where it is sought apart, the largest eigenvalue takes 10 over the fixed set. LiSSA takes one a step and a residual
  over the fixed set every ten, CG and low_rank one over the fixed set a step and one for the residual,
  exact one for every 64 columns.

  Args:
    solver: one of `solve.SOLVERS`, none of identity and datainf.
    fixed: batches of the fixed set.
    depth: steps.
    repeat: LiSSA runs.
    size: P.
    apart: as in `Inverse`.
  """
  if solver == "lissa":
    return 10 * fixed + repeat * (depth + -(-depth // 10) * fixed)
  if solver == "exact":
    return (11 + -(-size // 64)) * fixed
  return ((11 if apart else 1) + (0 if solver == "ekfac" else depth)) * fixed


def products_flops(sizes: Sizes, inverse: Inverse, batch: Work, fixed: int, cached: bool) -> float:
  """FLOPs of the products of a solve; EK-FAC's fit and DataInf's passes are counted by themselves.

  Args:
    sizes: of the model and the subtree.
    inverse: the solver.
    batch: the work of one batch of curvature examples.
    fixed: batches of the fixed set.
    cached: as in `pass_flops`.
  """
  if inverse.solver in ("identity", "datainf"):
    return 0.0
  count = num_products(inverse.solver, fixed, inverse.depth, inverse.repeat, sizes.subtree, inverse.apart)
  columns = 64 if inverse.solver == "exact" else inverse.queries
  return count * columns * pass_flops(sizes, inverse.curvature, batch, cached)


def datainf_flops(sizes: Sizes, inverse: Inverse, rows: Work, cached: bool) -> float:
  """FLOPs of DataInf: a backward pass that forms no gradient, and 2 P a token for lengths, 4 P Q for dots and sums.

  A relative damping takes a pass for lengths before. Lengths cost less in rows shorter than a matrix's sides.
  """
  backward, once = pass_flops(sizes, "probes", rows, cached), 2.0 * rows.tokens * sizes.chosen
  main = backward + once * (2 * inverse.queries + 1)
  return main + (backward + once if inverse.relative else 0.0)


def measures_flops(sizes: Sizes, rows: Work, queries: int, basis: bool, cached: bool) -> float:
  """FLOPs of norms, products and self-influence out of inputs and output gradients (`normalize.measure`).

    2 pairs (in + out) and 2 Q tokens in out a matrix, where that takes no gradient: in rows shorter than
    in out / (in + out), with at most one query; else 2 tokens in out and 2 Q examples in out, in a basis also
    2 tokens (in^2 + out^2)

  Args:
    sizes: of the model and the subtree.
    rows: a row for each example.
    queries: Q.
    basis: with EK-FAC's inverse.
    cached: as in `pass_flops`.
  """
  total, length = pass_flops(sizes, "probes", rows, cached), rows.pairs / max(rows.tokens, 1)
  for inputs, outputs in sizes.matrices:
    numbers = inputs * outputs
    if not basis and queries <= 1 and length * (inputs + outputs) < numbers:
      total += 2 * (rows.pairs * (inputs + outputs) + queries * rows.tokens * numbers)
    else:
      total += 2 * (rows.tokens + queries * rows.examples) * numbers
    if basis:
      total += 2 * rows.tokens * (inputs**2 + outputs**2) + 2 * rows.batches * queries * numbers * (inputs + outputs)
  return total


def _count(leaf: Any) -> int:
  return int(np.prod(leaf.shape, dtype=np.int64))
