"""Tensors of a file -> the parameter tree of `decoder`: every tensor is taken, or the file is refused."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from in2core_jax.errors import UserError
from in2core_jax.model import decoder, stacks
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.schema import plain
from in2core_jax.model.tensors import HF_NAMES, is_matrix, places
from in2core_jax.parallel.host import host_bytes
from in2core_jax.params import quantisation
from in2core_jax.params.quantisation import FULL

_QUANTISED = r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv)?|weight_packed|absmax|quant_map|weight\.quant_\w+.*)$"
_STRANGE = {
  _QUANTISED: "a quantised checkpoint; use the unquantised one, or save it dequantised",
  r"(^|\.)(vision|visual|audio|multi_modal)": "a multimodal model; save its text part as a separate model",
  r"lora_[AB]": "a LoRA adapter; merge it into its base model first",
  r"experts|_exps": "a mixture of experts, and the configuration says that it is none",
}


def check_memory(config: ModelConfig, dtype: np.dtype, origin: str, kind: str = FULL) -> None:
  """Refuses a model whose matrices alone are more than this machine's memory, before any is made."""
  heads, width = config.head_dim * (config.num_heads + config.num_kv_heads), config.hidden_size
  mlps = max(1, config.num_experts) * (3 if config.gated_mlp else 2)
  layer = 2 * heads * width + mlps * width * config.intermediate_size + 3 * width * config.shared_size
  inside, outside = config.num_layers * layer, config.vocab_size * width * (1 if config.tie_embeddings else 2)
  count, a_number = inside + outside, dtype.itemsize if kind == FULL else quantisation.bits(kind) / 8
  need, there = inside * a_number + outside * dtype.itemsize, host_bytes()
  if need > there:
    word = dtype.name if kind == FULL else kind
    raise UserError(
      f"{origin}: its {count:,} parameters take {need / 1e9:,.0f} GB as {word}, and this machine has "
      f"{there / 1e9:,.0f} GB of memory: use a smaller model or a larger machine"
    )


def assemble(
  config: ModelConfig,
  names: dict[str, str],
  stored: dict[str, tuple[int, ...]],
  read: Callable,
  dtype,
  origin: str,
  mesh: Any = None,
  kind: str = FULL,
) -> dict:
  """Fills the parameter tree of `config` from `read(name, leaf)`, which returns [out, in] arrays or their rows.

  Names and shapes, `stored`, are compared before anything is allocated. Matrices of layers are kept as `kind` says.
  """
  check_memory(config, dtype, origin, kind)
  shapes = shapes_of(config)
  strange = sorted(leaf for leaf in shapes if leaf not in names)
  if strange:
    raise UserError(f"{origin}: this file format has no tensor for {', '.join(strange)}")
  wanted = {leaf: places(names[leaf], leaf, shape) for leaf, shape in shapes.items()}
  expected = {name for group in wanted.values() for _, name in group}
  absent = {name.partition(":")[0] for name in expected - stored.keys()}  # pieces by the tensor that holds them
  _refuse(origin, absent, "tensors are missing", _why_missing(expected, stored.keys()))
  _refuse(origin, stored.keys() - expected, "tensors are not part of this decoder", _why_strange(stored.keys()))
  for leaf, shape in shapes.items():
    for index, name in wanted[leaf]:
      right, found = shape[len(index) :], stored[name]
      found = (*found[:-2], *found[-2:][::-1]) if is_matrix(leaf) else found
      if found != right:
        raise UserError(
          f"{origin}: tensor {name} is {found} ([in, out]), the configuration asks for {right}; "
          "file and configuration do not belong together"
        )
  params, placed = {}, stacks.shardings_of(shapes, dtype, mesh)
  for leaf, shape in shapes.items():
    few_bits = kind != FULL and quantisation.fits(leaf, shape, kind)
    stack = stacks.stack_of(shape, dtype, placed.get(leaf), kind if few_bits else "")
    for index, name in wanted[leaf]:
      if not stack.put(index, read(name, leaf), is_matrix(leaf)):
        raise UserError(
          f"{origin}: tensor {name} holds NaN or infinity; the weights are damaged, use another checkpoint"
        )
    params[leaf] = stack.array
  return traverse_util.unflatten_dict(params, sep="/")


@functools.cache  # traces a layer
def shapes_of(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
  """Leaf -> its shape in the parameter tree."""
  shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
  return {leaf: value.shape for leaf, value in traverse_util.flatten_dict(shapes, sep="/").items()}


def _refuse(origin: str, names: Iterable[str], what: str, why: str) -> None:
  """Raises when `names` is not empty, naming the first five."""
  listed = sorted(names)
  if listed:
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    raise UserError(f"{origin}: {what}: {', '.join(map(plain, listed[:5]))}{more}; {why}")


def _why_missing(expected: set[str], stored: Iterable[str]) -> str:
  stored = set(stored)
  if expected - stored == {HF_NAMES["lm_head/kernel"]}:
    return "config.json does not say tie_word_embeddings true; if the model is tied, write it there"
  if any(re.search(_QUANTISED, name) for name in stored):
    return _STRANGE[_QUANTISED]
  if not any(name.startswith("model.") for name in stored) and {n.removeprefix("model.") for n in expected} & stored:
    return "the folder holds a model without language-model head (names without model.); save it as a CausalLM"
  return "the file is incomplete or of another architecture"


def _why_strange(stored: Iterable[str]) -> str:
  found = (why for pattern, why in _STRANGE.items() if any(re.search(pattern, name) for name in stored))
  return next(found, "the model is of another architecture")
