"""A score apart: what each chosen layer, leaf and response token adds to an example's influence.

  g_i . r = sum_l g_il . r_l                    l: a chosen layer, or a chosen module outside of the layers
  g_i . r = sum_lm g_ilm . r_lm                 m: a leaf of a layer, such as its query projection
  g_i . r = sum_t d(w_t nll_t)/dsub . r         t: a response token of example i, w_t its weight in the example's loss

The sums are the score of `CompiledObjective.scores` to rounding: they cut one number up, they do not estimate another
one. A token's contribution is that of the *prediction of* this token from all before it; a prompt token has none.

Letters: B batch, R response slots, N examples, k chosen layers, M response tokens of all
examples, or chosen leaves of a layer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from in2core_jax import gradients
from in2core_jax.errors import UserError, how_many
from in2core_jax.gradients import Tree
from in2core_jax.influence.kernels import CompiledObjective, Stream
from in2core_jax.params import subtree
from in2core_jax.runs import resumable

# (sub, frozen, batch) -> [B,R], whose sums over R are the per-example losses: `objective.token_losses_fn`.
TokenLosses = Callable[[Tree, Tree, Tree], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenScores:
  """Contributions of the response tokens, example after example.

  Attributes:
    counts: int64 [N], response tokens of each example; 0 where it has none.
    influence: float32 at least [M], the token's contribution; an example's tokens, in order, add up to its score.
  """

  counts: np.ndarray
  influence: np.ndarray

  @property
  def rows(self) -> np.ndarray:
    """The example of each token, int64 [M]."""
    return np.repeat(np.arange(len(self.counts)), self.counts)

  def totals(self) -> np.ndarray:
    """Sums over the tokens of each example, float64 [N]: the scores."""
    return np.bincount(self.rows, self.influence, minlength=len(self.counts))


def part_names(tree: subtree.Subtree) -> tuple[str, ...]:
  """Names of the parts in the order of `subtree.layer_sums`: "layer 3", ..., then modules outside of the layers."""
  return (*(f"layer {layer}" for layer in tree.layers), *tree.extras)


def layer_scores(
  problem: CompiledObjective,
  tree: subtree.Subtree,
  stream: Stream,
  size: int,
  direction: Tree,
  microbatch: int | None = 8,
) -> dict[str, np.ndarray]:
  """g_il . r_l for every part l and example i; over the parts they add up to `problem.scores(...)`.

  By per-example gradients, contracted leaf by leaf with r and forgotten: the same work as one direction of the `vmap`
  path of `CompiledObjective.scores`, whatever the number of layers. A forward-mode pass gives one part only (with a
  tangent in no other), and each costs about two thirds of that work, so it is the cheaper one for a single part and no
  other; there it is the score itself.

  Args:
    problem: where the gradients are taken; its `sub` is what `split` gives for `tree`.
    tree: the chosen parameters.
    stream: batches of the examples, one example a row.
    size: N.
    direction: r = (H + damping I)^-1 g_q, like `problem.sub`, without a query axis.
    microbatch: examples whose gradients exist at the same time.

  Returns:
    {"layer 3": float32 at least [N], ..., "final_norm": ...}, in the order of `part_names`. Unit of the scores.

  Raises:
    UserError: a contribution that is not finite.
  """
  names = part_names(tree)
  if len(names) == 1:
    return {names[0]: problem.scores(stream, size, jax.tree.map(lambda leaf: leaf[None], direction), "jvp")[0]}
  kernel = partial(_layer_products, problem.objective, tree, microbatch, problem.sub, problem.frozen)
  found = None
  for rows, values in resumable.results(stream, "layers", lambda batch: kernel(batch, direction)):
    found = np.zeros((len(names), size), values.dtype) if found is None else found
    found[:, rows] = values[:, : len(rows)]  # every row has an example: packed batches cannot be mapped over examples
  found = np.zeros((len(names), size), np.float32) if found is None else found
  _refuse_infinite(found, np.arange(size))
  return dict(zip(names, found, strict=True))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _layer_products(objective, tree, microbatch, sub, frozen, batch, direction):
  """g_il . r_l, [parts, B]."""
  one_query = jax.tree.map(lambda leaf: leaf[None], direction)
  leaves = gradients.leaf_scores(objective, sub, frozen, batch, one_query, microbatch)
  sums = subtree.layer_sums(leaves, tree)
  return jnp.stack([sums[name][0] for name in part_names(tree)])


def leaf_table(
  problem: CompiledObjective,
  tree: subtree.Subtree,
  stream: Stream,
  size: int,
  directions: Tree,
  microbatch: int | None = 8,
) -> np.ndarray:
  """g_ilm . r_qlm for every query q, example i, chosen layer l and leaf m: one pass for every smaller choice.

  Where the inverse has no entry between two leaves of two layers (the identity, DataInf), r_q of a smaller choice of
  layers and leaves is a part of r_q, so that its scores are sums over a part of this table (`sum_over`).

  Args:
    problem: where the gradients are taken; its `sub` is what `split` gives for `tree`.
    tree: the chosen parameters, none outside of the layers.
    stream: batches of the examples, one example a row.
    size: N.
    directions: r, like `problem.sub`, leaves [Q, ...].
    microbatch: examples whose gradients exist at the same time.

  Returns:
    float32 at least [Q, N, k, M], in the order of `tree.layers` and `tree.paths`.

  Raises:
    UserError: a chosen module outside of the layers, or a contribution that is not finite.
  """
  if tree.extras:
    raise UserError(f"{', '.join(tree.extras)} is in no layer: leave it out to see the scores by layer and module")
  kernel = partial(_leaf_products, problem.objective, tree, microbatch, problem.sub, problem.frozen)
  queries = jax.tree.leaves(directions)[0].shape[0]
  found = np.zeros((queries, size, len(tree.layers), len(tree.paths)), np.float32)
  for rows, values in resumable.results(stream, "leaves", lambda batch: kernel(batch, directions)):
    found = found.astype(np.promote_types(found.dtype, values.dtype), copy=False)
    found[:, rows] = values[:, : len(rows)]
  _refuse_infinite(found.transpose(0, 2, 3, 1).reshape(-1, size), np.arange(size))
  return found


@partial(jax.jit, static_argnums=(0, 1, 2))
def _leaf_products(objective, tree, microbatch, sub, frozen, batch, directions):
  """g_ilm . r_qlm, [Q, B, k, M]."""
  leaves = gradients.leaf_scores(objective, sub, frozen, batch, directions, microbatch)
  flat = traverse_util.flatten_dict(leaves["layers"], sep="/")
  return jnp.stack([flat[path] for path in tree.paths], axis=-1)


def sum_over(table: np.ndarray, whole: subtree.Subtree, part: subtree.Subtree) -> np.ndarray:
  """Scores of a part of the chosen parameters, float64 [Q, N]: the sum over its layers and leaves.

  Args:
    table: of `leaf_table` for `whole`.
    whole: what the table was made for.
    part: layers and leaves that are all in `whole`.

  Raises:
    UserError: a layer or leaf that is not in `whole`.
  """
  absent = [f"layer {layer}" for layer in part.layers if layer not in whole.layers]
  absent += [path for path in (*part.paths, *part.extras) if path not in whole.paths]
  if absent:
    raise UserError(f"the table of scores by layer and module does not have {', '.join(absent[:5])}")
  rows = [whole.layers.index(layer) for layer in part.layers]
  columns = [whole.paths.index(path) for path in part.paths]
  return table[:, :, rows][..., columns].sum(axis=(2, 3), dtype=np.float64)


def token_scores(
  problem: CompiledObjective, token_losses: TokenLosses, stream: Stream, size: int, direction: Tree
) -> TokenScores:
  """d(w_t nll_t)/dsub . r for every response token t of every example; over t they add up to `problem.scores(...)`.

  One forward-mode pass along r over the losses of the slots before they are summed: the cost of one score, and no
  gradient is ever formed. (Reverse mode would need a pass for each token.)

  Args:
    problem: where the derivative is taken.
    token_losses: losses of the slots, `decoder.token_losses_fn(config, tree)` for the tree of `problem.sub`.
    stream: batches with the fields of `batches.Batch`; rows may hold several examples (`packing`).
    size: N.
    direction: r, like `problem.sub`, without a query axis.

  Returns:
    TokenScores. An example without response has no token.

  Raises:
    UserError: a contribution that is not finite.
  """

  def kernel(batch):
    products = _token_products(token_losses, problem.sub, problem.frozen, batch, direction)
    return {"products": products, "filled": batch.weight != 0}

  nothing = np.zeros(0, np.float32)
  pieces = [nothing] * size
  for rows, values in resumable.results(stream, "tokens", kernel):
    # What comes after the rows is padding.
    for row, value, slots in zip(rows, values["products"], values["filled"], strict=False):
      if row >= 0:
        pieces[row] = value[slots]  # the slots of an example are its response tokens in order
  found = TokenScores(np.array([len(piece) for piece in pieces], np.int64), np.concatenate([nothing, *pieces]))
  _refuse_infinite(found.influence[None], found.rows)
  return found


@partial(jax.jit, static_argnums=0)
def _token_products(token_losses, sub, frozen, batch, direction):
  """d token_losses / dsub . r, [B,R]."""
  along = gradients.like(direction, sub)
  return jax.jvp(lambda s: token_losses(s, frozen, batch), (sub,), (along,))[1]


def layer_columns(ids: Sequence[str], scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The table `layer_scores.parquet`: example_id, layer, influence; N times the parts, example after example."""
  names = np.array(list(scores), dtype=object)
  return {
    "example_id": np.repeat(np.array(ids, dtype=object), len(names)),
    "layer": np.tile(names, len(ids)),
    "influence": np.stack(list(scores.values()), axis=1).astype(np.float32).reshape(-1),
  }


def token_columns(dataset: Any, scores: TokenScores, piece: Callable[[int], str]) -> dict[str, np.ndarray]:
  """The table `token_scores.parquet`: example_id, position, token, influence; a row for each response token.

  Args:
    dataset: the examples, with `ids`, `tokens` and `response_mask` as `batches.Batcher` takes them.
    scores: of the same examples.
    piece: token id -> its text, for example `lambda token: tokenizer.decode([token])`; asked once for each id.

  Returns:
    Columns [M]; `position` is the token's index in its example, prompt included.

  Raises:
    UserError: the examples have other numbers of response tokens: scores of other examples.
  """
  where = [np.flatnonzero(mask) for mask in dataset.response_mask]
  counts = np.array([len(each) for each in where], np.int64)
  if not np.array_equal(counts, scores.counts):
    raise UserError(
      f"token scores of {how_many(len(scores.counts), 'example')} with "
      f"{how_many(scores.counts.sum(), 'response token')} in all, for a data set of "
      f"{how_many(len(counts), 'example')} with {counts.sum():,}: these are the scores of other examples"
    )
  nothing = np.zeros(0, np.int32)
  ids = np.concatenate([nothing, *(tokens[each] for tokens, each in zip(dataset.tokens, where, strict=True))])
  different, which = np.unique(ids, return_inverse=True)
  return {
    "example_id": np.array(dataset.ids, dtype=object)[scores.rows],
    "position": np.concatenate([nothing, *where]).astype(np.int32),
    "token": np.array([piece(int(token)) for token in different], dtype=object)[which],
    "influence": scores.influence.astype(np.float32),
  }


def _refuse_infinite(values: np.ndarray, rows: np.ndarray) -> None:
  bad = np.unique(rows[~np.all(np.isfinite(values), axis=0)])
  if bad.size:
    raise UserError(
      f"contributions to the scores of {how_many(bad.size, 'example')} are not finite (first rows {bad[:5].tolist()}): "
      "look at their losses"
    )
