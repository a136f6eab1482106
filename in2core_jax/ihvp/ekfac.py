"""EK-FAC: the curvature of each chosen matrix, diagonal in a Kronecker-factored eigenbasis, inverted at once.

For a matrix W [in, out], y_t = a_t W, with g_t = dl_i/dy_t and G_i = sum_t a_t g_t^T the gradient of example i:

  A = mean_t a_t a_t^T = U_A diag U_A^T,   S = mean_i sum_t g_t g_t^T = U_S diag U_S^T
  lambda = mean_i (U_A^T G_i U_S)^2                                                    (entry by entry, [in, out])
  (H + damping I)^-1 V ~= U_A ((U_A^T V U_S) / (lambda + damping)) U_S^T

George et al. 2018 (arXiv 1806.03884); for influence Grosse et al. 2023 (arXiv 2308.03296). The *basis* is that of K-FAC
(tokens taken as independent, a independent of g); the *eigenvalues* are exact second moments of whole examples'
gradients: lambda is the true diagonal of the fitted examples' mean of g_i g_i^T in that basis. Blocks between matrices
are dropped. Leaves that are no matrix (norm scales, biases, embeddings) are diagonal: lambda = mean_i g_i^2.

Unit: H is a mean over *examples*, as everywhere; damping is absolute, in the unit of H. curvature="ggn" draws labels
from the model (true Fisher), which makes the mean of g_i g_i^T the Gauss-Newton matrix of the loss in expectation over
the labels: one draw an example, the same in both passes, so a lambda may be above or below the matrix's own diagonal;
curvature="fisher" takes the labels of the data (empirical Fisher). This room knows no model: it adds probes beside
matrices (`moment_probes.observe`) and the objective gives the moments as gradients.

Letters: Q queries, k chosen layers (leading axis of stacked leaves, any or none here), B batch.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from in2core_jax import gradients
from in2core_jax.errors import UserError
from in2core_jax.ihvp import tree_math
from in2core_jax.ihvp.operators import (
  DivergenceError,
  Matvec,
  SolveResult,
  check_damping,
  relative_residual,
  resolve_damping,
)
from in2core_jax.ihvp.tree_math import Tree
from in2core_jax.parallel import processes
from in2core_jax.params import moment_probes, subtree
from in2core_jax.runs import resumable

# Matrices that the decoder multiplies through a probe. The vocabulary head has none: its factor would be [V, V].
MATRICES = r"layers/.*/(kernel|experts|lora_a|lora_b|core)"


@dataclasses.dataclass(frozen=True)
class EkfacSettings:
  """How factors are fitted.

  Attributes:
    curvature: "ggn" (labels drawn from the model) or "fisher" (labels of the data).
    draws: ggn: label draws per example; variance of lambda falls as 1 / draws, time grows with it.
    matrices: pattern over whole leaf paths that get Kronecker factors; None: every leaf is diagonal.
    eigen_dtype: "float64": eigendecompositions on the host; "float32": on the device.
    microbatch: examples whose gradients in the diagonal leaves exist at the same time.
  """

  curvature: str = "ggn"
  draws: int = 1
  matrices: str | None = MATRICES
  eigen_dtype: str = "float64"
  microbatch: int = 8

  def __post_init__(self):
    if self.curvature not in ("ggn", "fisher"):
      raise UserError(f"EK-FAC with curvature={self.curvature!r}: it is fitted to ggn or fisher, which are positive")
    if self.draws < 1 or (self.draws > 1 and self.curvature == "fisher"):
      raise UserError(f"EK-FAC with draws={self.draws}, curvature={self.curvature}: at least 1, above 1 only for ggn")
    if self.eigen_dtype not in ("float64", "float32"):
      raise UserError(f"EK-FAC with eigen_dtype={self.eigen_dtype!r}: use float64 (host) or float32 (device)")
    if self.microbatch < 1:
      raise UserError(f"EK-FAC with microbatch={self.microbatch}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Source:
  """Where the curvature is taken.

  Attributes:
    objective: the loss; its matrices must read probes.
    sub: chosen parameters, nested dicts.
    frozen: all others.
    stream: gives a fresh iterator of (rows of the data set, batch) each time it is called; the same every time.
    relabel: (sub, frozen, batch, keys [B]) -> batch with drawn labels, as of `objective.sample_labels_fn`; ggn only.
  """

  objective: gradients.Objective
  sub: Tree
  frozen: Tree
  stream: Callable[[], Iterator[tuple[np.ndarray, Any]]]
  relabel: Callable[[Tree, Tree, Tree, jax.Array], Tree] | None = None


@dataclasses.dataclass(frozen=True)
class Factor:
  """One matrix leaf's curvature, f32 or better; leading axes as the leaf's.

  Attributes:
    left: U_A [..., in, in], columns are eigenvectors of A.
    right: U_S [..., out, out].
    values: lambda [..., in, out].
    left_values: eigenvalues of A [..., in], mean over the tokens that the loss reaches.
    right_values: eigenvalues of S [..., out], sum over an example's tokens, mean over examples.
  """

  left: jax.Array
  right: jax.Array
  values: jax.Array
  left_values: jax.Array
  right_values: jax.Array


FIELDS = tuple(field.name for field in dataclasses.fields(Factor))
jax.tree_util.register_dataclass(Factor, FIELDS, ())


@dataclasses.dataclass(frozen=True)
class Ekfac:
  """A fitted curvature; every leaf of the subtree is in one of the two.

  Attributes:
    factors: leaf path -> Factor.
    diagonals: leaf path -> lambda, shaped like the leaf.
    info: printable facts (curvature, examples, draws, lambda_max, ...).
  """

  factors: dict[str, Factor]
  diagonals: dict[str, jax.Array]
  info: dict[str, Any]

  @property
  def lambda_max(self) -> float:
    """The largest lambda; for fisher a lower bound of H's largest eigenvalue, as any diagonal entry is."""
    return float(self.info["lambda_max"])


def fit(source: Source, key: jax.Array, settings: EkfacSettings = EkfacSettings()) -> Ekfac:  # noqa: B008, it is frozen
  """Fits factors and corrected eigenvalues: two passes over the examples (and one more for the diagonal leaves).

  An example's labels depend on the key and on its row of the data set alone, so that neither the cut into batches nor
  the pass changes them. Examples without response count in the mean, with a gradient of 0; padding rows do not.

  Args:
    source: objective, parameters and batches.
    key: PRNG key of the labels (unused for fisher).
    settings: what is fitted.

  Returns:
    Ekfac.

  Raises:
    UserError: no example; ggn without `relabel`; a pattern that matches no matrix; a matrix that no token reaches.
    DivergenceError: NaN or infinity.
  """
  if settings.curvature == "ggn" and source.relabel is None:
    raise UserError("EK-FAC of the ggn draws labels from the model: give Source.relabel, or use curvature=fisher")
  leaves = traverse_util.flatten_dict(source.sub, sep="/")
  paths = _matrix_paths(leaves, settings.matrices)
  factors, diagonals = {}, {}
  if paths:
    zeros = {path: moment_probes.covariance_probe(leaves[path]) for path in paths}
    moments, examples = _sum_over(source, key, settings, ("moments", _probe_step), zeros, {})
    bases = {path: _basis(path, moment, examples, settings.eigen_dtype) for path, moment in moments.items()}
    zeros = {path: moment_probes.square_probe(base["left"], base["right"]) for path, base in bases.items()}
    fixed = {path: {name: probe.pop(name) for name in ("left", "right")} for path, probe in zeros.items()}
    squares, examples = _sum_over(source, key, settings, ("squares", _probe_step), zeros, fixed)
    factors = {path: Factor(values=squares[path]["squares"] / examples, **bases[path]) for path in paths}
  if len(paths) < len(leaves):
    zeros = {path: jnp.zeros(leaf.shape, _wide(leaf)) for path, leaf in leaves.items() if path not in factors}
    step = partial(_diagonal_step, settings.microbatch)
    squares, examples = _sum_over(source, key, settings, ("diagonals", step), zeros, {})
    diagonals = {path: leaf / examples for path, leaf in squares.items()}
  every = {path: factor.values for path, factor in factors.items()} | diagonals
  for path, values in every.items():
    _require_finite(path, values)
  info = {
    "solver": "ekfac",
    "curvature": settings.curvature,
    "draws": settings.draws,
    "eigen_dtype": settings.eigen_dtype,
    "examples": int(round(examples / settings.draws)),
    "matrices": len(factors),
    "diagonals": len(diagonals),
    "lambda_max": max(float(jnp.max(values)) for values in every.values()),
  }
  return Ekfac(factors, diagonals, info)


def ekfac(
  v: Tree,
  fitted: Ekfac,
  damping: float | None = None,
  damping_ratio: float | None = None,
  matvec: Matvec | None = None,
) -> SolveResult:
  """x = U_A ((U_A^T V U_S) / (lambda + damping)) U_S^T for matrices, v / (lambda + damping) for other leaves.

  Args:
    v: right-hand side, leaves [Q, ...], the subtree's structure.
    fitted: from `fit` or `ekfac_store.load`; reused for all queries.
    damping: absolute, above 0.
    damping_ratio: relative to `fitted.lambda_max`, instead.
    matvec: H v; when given, the residual is measured, which says how far from the inverse of H this is.

  Returns:
    SolveResult; residual is NaN without `matvec`.

  Raises:
    UserError: a damping that is not positive, both or none, or a v of another subtree.
    DivergenceError: v holds NaN or infinity.
  """
  queries = tree_math.num_queries(v)
  damping = resolve_damping(damping, damping_ratio, fitted.lambda_max)
  v = tree_math.promote(v)
  if not np.all(np.isfinite(np.asarray(tree_math.norm(v)))):
    raise DivergenceError("ekfac: the right-hand side holds NaN or infinity: look for NaN in the weights or in a loss")
  solution = preconditioner(fitted, damping)(v)
  measured = matvec is not None
  residual = relative_residual(matvec, solution, v, damping) if measured else np.full(queries, np.nan)
  info = fitted.info | {"damping": damping, "residual_measured": measured}
  return SolveResult(solution, residual, 1, [(1, residual)] if measured else [], info)


def preconditioner(fitted: Ekfac, damping: float) -> Callable[[Tree], Tree]:
  """r -> M^-1 r for `cg(precondition=...)`: symmetric and positive definite; M = fitted curvature + damping I.

  With `EkfacSettings(matrices=None)` it is the diagonal (Jacobi) preconditioner of the Fisher.

  Raises:
    UserError: damping not above 0, or (when called) a tree of another subtree.
  """
  damping = check_damping(damping, positive=True)
  return lambda r: apply_inverse(fitted, damping, r)


def apply_inverse(fitted: Ekfac, damping: float | jax.Array, r: Tree) -> Tree:
  """(fitted curvature + damping I)^-1 r, leaves [Q, ...]; pure: arrays of `fitted` and damping may be traced.

  Raises:
    UserError: a tree of another subtree.
  """
  flat = traverse_util.flatten_dict(r, sep="/")
  _check_like(flat, fitted)
  return traverse_util.unflatten_dict(_apply(fitted.factors, fitted.diagonals, flat, damping), sep="/")


@jax.jit
def _apply(factors, diagonals, v, damping):
  times = partial(jnp.matmul, precision="highest")
  turned = {}
  for path, leaf in v.items():
    if path in diagonals:
      turned[path] = leaf / (diagonals[path] + damping).astype(leaf.dtype)
      continue
    factor = jax.tree.map(lambda part, dtype=leaf.dtype: part.astype(dtype), factors[path])
    middle = times(times(factor.left.mT, leaf), factor.right) / (factor.values + damping)
    turned[path] = times(times(factor.left, middle), factor.right.mT)
  return turned


def diagonal_parts(fitted: Ekfac, damping: float | jax.Array, leaves: dict[str, jax.Array]) -> dict[str, dict]:
  """The inverse as `moment_probes.measure_probe` takes it: leaf path -> values, damping, and a basis where it has one.

  Raises:
    UserError: leaves of another subtree than was fitted.
  """
  _check_like({path: leaf[None] for path, leaf in leaves.items()}, fitted)
  damping = jnp.asarray(damping)
  turned = {
    path: {"values": factor.values, "left": factor.left, "right": factor.right, "damping": damping}
    for path, factor in fitted.factors.items()
  }
  return turned | {path: {"values": leaf, "damping": damping} for path, leaf in fitted.diagonals.items()}


def _check_like(flat: dict, fitted: Ekfac) -> None:
  known = {path: factor.values.shape for path, factor in fitted.factors.items()}
  known |= {path: values.shape for path, values in fitted.diagonals.items()}
  for path in sorted(set(known) | set(flat)):
    if path not in known or path not in flat or flat[path].shape[1:] != known[path]:
      found = flat[path].shape[1:] if path in flat else "nothing"
      raise UserError(
        f"EK-FAC was fitted to another subtree: at {path} it has {known.get(path, 'nothing')}, the vector has {found}; "
        "fit it again with these --layers and --modules"
      )


def _matrix_paths(leaves: dict, pattern: str | None) -> list[str]:
  if pattern is None:
    return []
  found = [path for path, leaf in leaves.items() if re.fullmatch(pattern, path) and leaf.ndim >= 2]
  if not found:
    raise UserError(
      f"EK-FAC: no matrix of the subtree matches {pattern}; it has {', '.join(leaves)}. "
      "Choose matrices with --modules, or give matrices=None for a diagonal"
    )
  return found


def _sum_over(source: Source, key, settings: EkfacSettings, named_step, zeros, fixed) -> tuple[dict, float]:
  """Adds a step's sums over all batches and draws -> (sums, examples counted in them)."""
  name, step = named_step
  sampled = settings.curvature == "ggn"
  functions = (source.objective, source.relabel if sampled else None)
  found = (jax.tree.map(jnp.copy, zeros), jnp.zeros(()))
  for draw in range(settings.draws):
    draw_key = jax.random.fold_in(key, draw)

    def add(found, item, draw_key=draw_key):
      (total, examples), (rows, batch) = found, item
      padded = np.zeros(batch.valid.shape[0], np.uint32)
      padded[: len(rows)] = rows
      total = step(functions, source.sub, source.frozen, batch, (draw_key, padded), zeros, fixed, total)
      return total, examples + jnp.sum(batch.valid)

    found = resumable.total(source.stream, f"{name}-{draw:04d}", add, found)
  if not float(found[1]) > 0:
    raise UserError("EK-FAC got no example: give at least one training example with a response")
  return found[0], float(found[1])


def _relabelled(relabel, sub, frozen, batch, labels):
  if relabel is None:
    return batch
  key, rows = labels
  return relabel(sub, frozen, batch, jax.vmap(lambda row: jax.random.fold_in(key, row))(rows))


@partial(jax.jit, static_argnums=0, donate_argnums=7)
def _probe_step(functions, sub, frozen, batch, labels, zeros, fixed, total):
  """Adds the moments of one batch: gradients in the probes' zeros (`fixed`: the probes' other parts)."""
  objective, relabel = functions
  objective.separate(batch)  # refuses rows that hold several examples: squares are taken of whole rows
  batch = _relabelled(relabel, sub, frozen, batch, labels)
  flat = traverse_util.flatten_dict(sub, sep="/")

  def loss(zeros):
    added = {f"{path}_probe": probe | fixed.get(path, {}) for path, probe in zeros.items()}
    with_probes = traverse_util.unflatten_dict(flat | added, sep="/")
    return jnp.sum(gradients.per_example_losses(objective, with_probes, frozen, batch))

  return jax.tree.map(jnp.add, total, jax.grad(loss)(zeros))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=8)
def _diagonal_step(microbatch, functions, sub, frozen, batch, labels, zeros, fixed, total):
  """Adds sum_i g_i^2 of the leaves in `zeros`: `vmap` of `grad` over a microbatch, added up at once."""
  del fixed
  objective, relabel = functions
  batch = objective.separate(_relabelled(relabel, sub, frozen, batch, labels))
  flat = traverse_util.flatten_dict(sub, sep="/")

  def squares(example):
    one = jax.tree.map(lambda leaf: leaf[None], example)
    loss = lambda chosen: jnp.sum(  # noqa: E731
      gradients.per_example_losses(objective, traverse_util.unflatten_dict(flat | chosen, sep="/"), frozen, one)
    )
    gradient = gradients.widen(jax.grad(loss)({path: flat[path] for path in zeros}))
    return jax.tree.map(jnp.square, gradient)

  size = batch.valid.shape[0]
  count = min(microbatch, size)
  short = -size % count
  keep = (jnp.arange(size + short) < size).reshape(-1, count)
  cut = jax.tree.map(
    lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], short, axis=0)]).reshape(-1, count, *leaf.shape[1:]),
    batch,
  )

  def add(carry, part):
    examples, kept = part
    found = jax.vmap(squares)(examples)
    return jax.tree.map(lambda t, f: t + jnp.tensordot(kept.astype(f.dtype), f, axes=1), carry, found), None

  return jax.lax.scan(add, total, (cut, keep))[0]


def _basis(path: str, moment: dict, examples: float, eigen_dtype: str) -> dict[str, jax.Array]:
  """Eigenvectors and eigenvalues of A and S of one leaf from its summed moments."""
  tokens = np.asarray(moment["tokens"], np.float64)
  # Examples may leave out some experts, whose gradients are 0 then: any basis does, with lambda = 0.
  reached = np.any(tokens != 0, axis=-1) if subtree.is_of_experts(path) else tokens != 0
  if not np.all(reached):
    raise UserError(
      f"EK-FAC: no token of the loss reaches {path} (layer rows {np.flatnonzero(~reached).tolist()}): either no "
      "example has a response, or this model's matrix reads no probe; leave it out of `matrices` then"
    )
  mean_inputs = moment["inputs"] / jnp.asarray(np.maximum(tokens, 1), moment["inputs"].dtype)[..., None, None]
  left_values, left = _eigen(f"{path} (inputs)", mean_inputs, eigen_dtype)
  right_values, right = _eigen(f"{path} (output gradients)", moment["outputs"] / examples, eigen_dtype)
  return {"left": left, "right": right, "left_values": left_values, "right_values": right_values}


def _eigen(name: str, matrix: jax.Array, eigen_dtype: str) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues (not below 0) and eigenvectors of symmetric matrices [..., d, d], in the matrix's dtype."""
  _require_finite(name, matrix)
  if eigen_dtype == "float32":
    values, vectors = jnp.linalg.eigh(matrix.astype(jnp.float32))
  else:
    values, vectors = np.linalg.eigh(np.asarray(processes.to_host(matrix), np.float64))
  return jnp.maximum(jnp.asarray(values, matrix.dtype), 0), jnp.asarray(vectors, matrix.dtype)


def _require_finite(name: str, values: jax.Array) -> None:
  if not bool(jnp.all(jnp.isfinite(values))):
    raise DivergenceError(f"EK-FAC: {name} holds NaN or infinity: look for NaN in the weights or in an example's loss")


def _wide(leaf) -> Any:
  return jnp.promote_types(leaf.dtype, jnp.float32)
