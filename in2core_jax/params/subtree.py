"""The chosen parameters: which layers, which modules, and the tree cut in two along that choice.

A model's parameters hold the decoder layers stacked on a leading axis L (`decoder.py`). A `Subtree` names k of these
layers and some leaf paths inside them. `split` cuts the tree into

  sub     the chosen leaves, stacked over the k chosen layers only: what is differentiated, preconditioned, trained;
  frozen  everything else, and of the chosen leaves the rows of the other layers: constants.

No number is in both, so nothing is stored twice and a gradient can only be that of the chosen subtree.
Chosen matrices that are kept in few bits (`quantisation`) become arrays, and stay arrays when they are merged.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from in2core_jax.errors import UserError
from in2core_jax.params import quantisation

Params = Mapping[str, Any]

# Words that --modules takes -> pattern over leaf paths inside one layer, or over top-level names (second table).
MODULE_PATTERNS = {
  "all": r"(attention|mlp)/\w+/(kernel|bias|experts|expert_bias)|(attention/)?\w+_norm/scale|attention/sinks",
  "matrices": r"(attention|mlp)/\w+/(kernel|experts)",
  "attention": r"attention/\w+/(kernel|bias|scale)|attention/sinks",
  "mlp": r"mlp/\w+/(kernel|bias|experts|expert_bias)",
  "experts": r"mlp/\w+/experts",
  "norms": r"(attention/)?\w+_norm/scale",
  "lora": r"(attention|mlp)/\w+/lora_[ab]",
  "sketch": r"(attention|mlp)/\w+/core",
}
# Leaves of mixtures of experts that are stacked over experts behind the layers: [L, E, in, out] and [L, E, out].
EXPERT_LEAVES = ("experts", "expert_bias")
EXTRA_MODULES = ("embed", "final_norm", "lm_head")


@dataclasses.dataclass(frozen=True)
class Subtree:
  """A choice of parameters; hashable, so that jitted functions can close over it.

  Attributes:
    layers: indices of the chosen layers, ascending.
    num_layers: L, how many layers the model has.
    paths: chosen leaf paths inside a layer, for example "attention/q_proj/kernel".
    extras: chosen top-level modules out of `EXTRA_MODULES`.
  """

  layers: tuple[int, ...]
  num_layers: int
  paths: tuple[str, ...]
  extras: tuple[str, ...] = ()

  @property
  def boundary(self) -> int:
    """Index of the lowest chosen layer: nothing below it has a tangent or a cotangent."""
    if "embed" in self.extras:
      return 0
    return self.layers[0] if self.layers else self.num_layers

  def segments(self) -> tuple[tuple[int, int, bool], ...]:
    """Maximal runs (start, stop, chosen) of layers from the boundary up; each becomes one `lax.scan`."""
    chosen = set(self.layers)
    runs: list[tuple[int, int, bool]] = []
    for layer in range(self.boundary, self.num_layers):
      if runs and runs[-1][2] == (layer in chosen):
        runs[-1] = (runs[-1][0], layer + 1, runs[-1][2])
      else:
        runs.append((layer, layer + 1, layer in chosen))
    return tuple(runs)


def parse_layers(text: str, num_layers: int, flag: str = "--layers") -> tuple[int, ...]:
  """Reads the `--layers` language: all | last:8 | first:4 | middle:6 | every:3 | 0,5,29 (negative counts from the top).

  Args:
    text: the flag's text.
    num_layers: how many layers the model has.
    flag: the flag's name, for messages.

  Returns:
    Ascending layer indices without repeats.

  Raises:
    UserError: for a word that is not known or a layer that does not exist; the message lists what exists.

  Example:
    parse_layers("last:2", 30) == (28, 29); parse_layers("middle:2", 6) == (2, 3)
    parse_layers("every:3", 7) == (0, 3, 6)
  """
  what = f"{flag}={text}"
  exists = (
    f"the model has layers 0..{num_layers - 1}; use all, last:K, first:K, middle:K, every:K or a list such as 0,5,-1"
  )
  if text.strip() == "all":
    return tuple(range(num_layers))
  word = re.fullmatch(r"\s*(last|first|middle|every):(\d+)\s*", text)
  if word:
    count = int(word[2])
    if not 1 <= count <= num_layers:
      raise UserError(f"{what}: {count} is not between 1 and {num_layers}; {exists}")
    middle = (num_layers - count) // 2
    return {
      "last": tuple(range(num_layers - count, num_layers)),
      "first": tuple(range(count)),
      "middle": tuple(range(middle, middle + count)),
      "every": tuple(range(0, num_layers, count)),
    }[word[1]]
  if not re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", text):
    raise UserError(f"{what} is not understood; {exists}")
  picked = [int(part) for part in text.split(",")]
  absent = [layer for layer in picked if not -num_layers <= layer < num_layers]
  if absent:
    raise UserError(f"{what}: no layer {', '.join(map(str, absent))}; {exists}")
  return tuple(sorted({layer % num_layers for layer in picked}))


def is_of_experts(path: str) -> bool:
  """Whether a leaf is stacked over experts too."""
  return path.rpartition("/")[2] in EXPERT_LEAVES


def leaf_paths(params: Params) -> tuple[str, ...]:
  """Paths of the leaves inside a layer, sorted, for example "mlp/up_proj/kernel"."""
  return tuple(sorted(traverse_util.flatten_dict(params["layers"], sep="/")))


def named_by(word: str, paths: Iterable[str]) -> list[str]:
  """Those paths inside a layer that a word of `--modules` names."""
  pattern = MODULE_PATTERNS.get(word, re.escape(word) + r"(/\w+)*")
  return [path for path in paths if re.fullmatch(pattern, path)]


def make_subtree(
  params: Params,
  layers: str | tuple[int, ...],
  modules: str = "all",
  named: tuple[str, str] = ("--layers", "--modules"),
) -> Subtree:
  """Chooses a subtree of `params`.

  Args:
    params: the parameter tree (arrays or shapes), layers stacked on the leading axis.
    layers: text for `parse_layers`, or indices (negative ones count from the top).
    modules: comma-separated words out of `MODULE_PATTERNS` and `EXTRA_MODULES`, or leaf paths inside a layer.
    named: the flags that layers and modules were given by, for messages.

  Raises:
    UserError: for a layer or a module that the tree does not have; the message lists what exists.
  """
  paths = leaf_paths(params)
  num_layers = int(traverse_util.flatten_dict(params["layers"], sep="/")[paths[0]].shape[0])
  text = layers if isinstance(layers, str) else ",".join(map(str, layers))
  indices = parse_layers(text, num_layers, named[0])
  chosen: set[str] = set()
  extras: list[str] = []
  for word in (part.strip() for part in modules.split(",")):
    if word in EXTRA_MODULES and word in params:
      extras.append(word)
      continue
    found = [path for path in named_by(word, paths) if not path.endswith("/lora_scale")]  # a constant
    if not found:
      known = [name for name, pat in MODULE_PATTERNS.items() if any(re.fullmatch(pat, path) for path in paths)]
      known += [name for name in EXTRA_MODULES if name in params]
      near = difflib.get_close_matches(word, [*known, *paths], n=1)
      hint = f" Did you mean {near[0]}?" if near else ""
      hint = " Its factors come with the checkpoint of a LoRA training, or an adapter." if word == "lora" else hint
      raise UserError(
        f"{named[1]}={modules}: this model has no {word!r}.{hint} "
        f"It has {', '.join(known)}; or paths: {', '.join(paths)}"
      )
    chosen.update(found)
  return Subtree(indices if chosen else (), num_layers, tuple(sorted(chosen)), tuple(sorted(set(extras))))


def split(params: Params, subtree: Subtree) -> tuple[dict, dict]:
  """Cuts `params` into (sub, frozen); see the module's docstring. Inverse of `merge`, bit for bit, of arrays."""
  flat = traverse_util.flatten_dict(params["layers"], sep="/")
  rows = np.asarray(subtree.layers, np.int32)
  others = np.setdiff1d(np.arange(subtree.num_layers), rows)
  sub_layers = {path: quantisation.full(_take_rows(flat[path], rows)) for path in subtree.paths}
  frozen_layers = {path: leaf for path, leaf in flat.items() if path not in sub_layers}
  if len(others):
    frozen_layers |= {path: _take_rows(flat[path], others) for path in subtree.paths}
  sub = {"layers": traverse_util.unflatten_dict(sub_layers, sep="/")} if sub_layers else {}
  sub |= {name: params[name] for name in subtree.extras}
  frozen = {"layers": traverse_util.unflatten_dict(frozen_layers, sep="/")}
  frozen |= {name: leaf for name, leaf in params.items() if name != "layers" and name not in subtree.extras}
  return sub, frozen


def merge(sub: Params, frozen: Params, subtree: Subtree) -> dict:
  """Puts (sub, frozen) together again: merge(*split(params, subtree), subtree) == params."""
  rows = np.asarray(subtree.layers, np.int32)
  others = np.setdiff1d(np.arange(subtree.num_layers), rows)
  order = np.argsort(np.concatenate([rows, others]), kind="stable")
  flat = traverse_util.flatten_dict(frozen["layers"], sep="/")
  for path, leaf in traverse_util.flatten_dict(sub.get("layers", {}), sep="/").items():
    pieces = [leaf, flat[path]] if path in flat else [leaf]
    if any(map(quantisation.is_leaf, pieces)):
      flat[path] = quantisation.joined(pieces, order)
      continue
    flat[path] = _take_rows(jnp.concatenate([jnp.asarray(piece, leaf.dtype) for piece in pieces]), order)
  params = {name: leaf for name, leaf in frozen.items() if name != "layers"}
  params |= {name: sub[name] for name in subtree.extras}
  return params | {"layers": traverse_util.unflatten_dict(flat, sep="/")}


def below_params(frozen: Params, subtree: Subtree) -> dict:
  """Stacked parameters of the layers under the boundary: the first rows of every frozen leaf."""
  return quantisation.tree_map(lambda leaf: leaf[: subtree.boundary], frozen["layers"])


def segment_params(sub: Params, frozen: Params, subtree: Subtree, start: int, stop: int) -> dict:
  """Stacked parameters of layers start..stop-1, which must be all chosen or all not chosen (a run of `segments`)."""
  flat = dict(traverse_util.flatten_dict(frozen["layers"], sep="/"))
  inside = traverse_util.flatten_dict(sub.get("layers", {}), sep="/")
  before = sum(layer < start for layer in subtree.layers)  # chosen layers under this run
  for path, leaf in flat.items():
    offset = start - before if path in inside else start
    flat[path] = _slice(leaf, offset, offset + stop - start)
  if start in subtree.layers:
    flat |= {path: _slice(leaf, before, before + stop - start) for path, leaf in inside.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


def count(tree: Params) -> int:
  """How many numbers a tree holds (P for a subtree)."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_of(params: Params, subtree: Subtree) -> int:
  """P: how many numbers of `params` (arrays or shapes) a subtree holds, without cutting them."""
  flat = traverse_util.flatten_dict(params["layers"], sep="/")
  a_layer = sum(int(np.prod(flat[path].shape[1:])) for path in subtree.paths)
  return a_layer * len(subtree.layers) + sum(count(params[name]) for name in subtree.extras)


def layer_sums(products: Params, subtree: Subtree) -> dict[str, jax.Array]:
  """Adds up `gradients.leaf_scores` per layer: {"layer 3": ..., "embed": ...}; together they are the score.

  Args:
    products: tree like `sub` with leaves [..., k], k the parameter's leading axis (chosen layers; V or D of extras).

  Returns:
    Arrays [...], one for each chosen layer and each extra.
  """
  total = sum(jax.tree.leaves(products.get("layers", {})))
  named = {f"layer {layer}": total[..., row] for row, layer in enumerate(subtree.layers)}
  return named | {name: sum(leaf.sum(-1) for leaf in jax.tree.leaves(products[name])) for name in subtree.extras}


def _take_rows(leaf, rows):
  if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
    return _slice(leaf, int(rows[0]), int(rows[0]) + len(rows))  # a view for NumPy arrays, a cheap slice on devices
  return leaf[rows]


def _slice(leaf, start: int, stop: int):
  return leaf if (start, stop) == (0, leaf.shape[0]) else leaf[start:stop]
