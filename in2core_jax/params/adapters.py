"""Leaves added beside a kernel: LoRA factors to train, and a sketch whose gradient is a projected gradient.

Both are ordinary parameters of the tree (`decoder.Projection` reads them where they stand), so that "chosen subtree",
per-example gradients, solvers and checkpoints need no special case for them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from in2core_jax.errors import UserError
from in2core_jax.params import subtree


def kernel_modules(params) -> tuple[str, ...]:
  """Modules of a layer that hold a kernel, for example "attention/q_proj"."""
  return tuple(path.removesuffix("/kernel") for path in _matrices(params) if path.endswith("/kernel"))


def _matrices(params) -> tuple[str, ...]:
  """Leaves of a layer that are matrices [L, in, out], or those of all experts [L, E, in, out]."""
  flat = traverse_util.flatten_dict(params["layers"], sep="/")
  return tuple(sorted(path for path in flat if path.endswith(("/kernel", "/experts"))))


def add_lora(params, rank: int, key: jax.Array):
  """Adds LoRA factors of the given rank beside every kernel: y = x W + (x A) B.

  A is normal with deviation 1 / sqrt(in), B is zero, so the model is unchanged at first (Hu et al. 2021; the factor
  alpha / r is 1 here: alpha = r). Matrices of experts and routers get none, as with PEFT's target "all-linear".

  Raises:
    UserError: rank below 1 or above the smallest side of a kernel.
  """

  def leaves(kernel, key):
    layers, inputs, outputs = kernel.shape
    if not 1 <= rank <= min(inputs, outputs):
      raise UserError(f"--lora_rank={rank} is outside 1..{min(inputs, outputs)}, the smallest side of a kernel")
    a = jax.random.normal(key, (layers, inputs, rank), jnp.float32) / np.sqrt(inputs)
    return {"lora_a": a.astype(kernel.dtype), "lora_b": jnp.zeros((layers, rank, outputs), kernel.dtype)}

  return _add(params, leaves, key, [f"{name}/kernel" for name in kernel_modules(params) if "router" not in name])


def add_sketch(params, size: int, key: jax.Array):
  """Adds a two-sided random projection beside every kernel: y = x W + ((x L) C) R with C = 0.

  With G = dloss/dW the gradient in C is L^T G R^T, p x p numbers instead of in x out. L and R hold independent signs
  over sqrt(p), so <L^T G R^T, L^T G' R^T> is an unbiased estimate of <G, G'>. A side that is no longer than p is kept
  whole (an identity), which is exact.

  The experts of a layer have signs of their own and one core together: its gradient is the sum of L_e^T G_e R_e^T, and
  products between two experts are 0 in the mean, so the estimate is unbiased for all of them (no side is kept whole).

  Args:
    params: parameter tree.
    size: p, numbers per side.
    key: seeds the signs.

  Raises:
    UserError: size below 1.
  """
  if size < 1:
    raise UserError(f"--sketch_size={size} must be at least 1; 32 or more keeps scores faithful")

  def side(key, lead, length):
    if length <= size and len(lead) == 1:
      return jnp.broadcast_to(jnp.eye(length, dtype=jnp.float32), (*lead, length, length))
    return jax.random.rademacher(key, (*lead, length, size), jnp.float32) / np.sqrt(size)

  def leaves(kernel, key):
    *lead, inputs, outputs = kernel.shape
    left_key, right_key = jax.random.split(key)
    left, right = side(left_key, lead, inputs), side(right_key, lead, outputs)
    core = jnp.zeros((lead[0], left.shape[-1], right.shape[-1]), jnp.float32)
    return {"left": left, "core": core, "right": jnp.swapaxes(right, -1, -2)}

  return _add(params, leaves, key, _matrices(params))


def cores_of(params, modules: str) -> str:
  """A sketch's modules as `make_subtree` takes them: the cores beside the matrices that `--modules` names.

  "sketch", those of all matrices, where it names all of them or, as norms or lora do, none.

  Args:
    params: the model's parameters, or their shapes.
    modules: words and paths with commas between.
  """
  every = _matrices(params)
  found = {path for word in modules.split(",") for path in subtree.named_by(word.strip(), every)}
  if not found or len(found) == len(every):
    return "sketch"
  return ",".join(sorted(f"{path.rpartition('/')[0]}/core" for path in found))


def _add(params, leaves, key, matrices):
  flat = dict(traverse_util.flatten_dict(params["layers"], sep="/"))
  for index, path in enumerate(matrices):
    for name, leaf in leaves(flat[path], jax.random.fold_in(key, index)).items():
      flat[f"{path.rpartition('/')[0]}/{name}"] = leaf
  return {**params, "layers": traverse_util.unflatten_dict(flat, sep="/")}
