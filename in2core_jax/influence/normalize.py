"""Variants of the influence score: per-example norms and what is divided by them, and self-influence.

  cosine           g_i.r_q / (|g_i| |r_q|)
  relatif          g_i.r_q / sqrt(g_i.M g_i)      l-RelatIF, M = (H + damping I)^-1
  theta_relatif    g_i.r_q / |M g_i|
  self_influence   g_i.M g_i                      large for mislabelled examples

Positive = proponent in all of them, as in `influence`. One walk over a stream serves all, and nothing of size N * P
ever exists. Without an inverse and with EK-FAC's, all is taken out of inputs and output gradients in the backward pass
of a batch (`moment_probes.measure_probe`) where the model reads probes beside all chosen leaves; else each example's
gradient is made in microbatches and reduced at once. Normalisations are NumPy functions of what was measured: solvers
and curvatures change the directions and the inverse, not the walk.

Letters: B batch, N training examples, Q queries, P size of the subtree, M an inverse.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from in2core_jax import gradients
from in2core_jax.errors import UserError, how_many
from in2core_jax.gradients import Tree
from in2core_jax.ihvp import datainf_probes, ekfac, low_rank, tree_math
from in2core_jax.ihvp.operators import check_damping
from in2core_jax.influence.kernels import CompiledObjective, Stream
from in2core_jax.params import moment_probes
from in2core_jax.runs import resumable


@dataclasses.dataclass(frozen=True)
class GradientMap:
  """A map of gradients to gradients; arrays go into `context`, never into a closure.

  Attributes:
    function: function(context, g) -> like g, leaves [Q, ...]; pure, row by row. It is the key of a compiled program:
      make it once.
    context: pytree handed through.
  """

  function: Callable[[Tree, Tree], Tree]
  context: Tree = ()


def _unchanged(context: Tree, g: Tree) -> Tree:
  return g


IDENTITY = GradientMap(_unchanged)


@dataclasses.dataclass(frozen=True)
class Measures:
  """Of every example, float64 on the host: squares of float32 gradients of 1e-25 would be 0 in float32.

  Attributes:
    scores: [Q, N], f_i . r_q; f_i is the feature, g_i itself unless told otherwise.
    losses: [N], l_i.
    norms: [N], |f_i|.
    self_influence: [N], f_i . M f_i: how much the loss of i falls when i gets more weight (Koh and Liang 2017, arXiv
      1703.04730, section 5.4), large where the model learnt i from i alone, as it must learn a wrong label.
    inverse_norms: [N], |M f_i|.
    direction_norms: [Q], |r_q|.
  """

  scores: np.ndarray
  losses: np.ndarray
  norms: np.ndarray
  self_influence: np.ndarray
  inverse_norms: np.ndarray
  direction_norms: np.ndarray


def measure(
  problem: CompiledObjective,
  stream: Stream,
  size: int,
  directions: Tree | None,
  inverse: GradientMap = IDENTITY,
  feature: GradientMap = IDENTITY,
) -> Measures:
  """Scores, losses, norms and self-influence of every example in one pass over the stream.

  Examples whose gradient is 0 (without response) have 0 everywhere, whatever the feature makes of a gradient of 0.
  Memory: out of inputs and output gradients that of the gradient of a batch, and of four gradients in one matrix at a
  time; else 3 to 6 times P numbers for each of `problem.microbatch` examples.

  Args:
    problem: where gradients are taken.
    stream: training batches.
    size: N.
    directions: r, leaves [Q, ...]; None for no scores, Q = 0.
    inverse: M of the self-influence, linear, symmetric: from `inverse_map`.
    feature: f_i of g_i, what stands for the gradient; `trajectory.AdamDirection` is one.

  Returns:
    Measures.

  Raises:
    UserError: no example, or one with a loss, gradient or score that is not finite.
  """
  if feature is IDENTITY and observes(problem, inverse):
    compiled = partial(_observed, problem.objective, inverse.context)
  else:
    maps, contexts = (feature.function, inverse.function), (feature.context, inverse.context)
    compiled = partial(_kernel, problem.objective, maps, problem.microbatch, contexts)
  found = _gather(stream, size, lambda batch: compiled(problem.sub, problem.frozen, batch, directions))
  norms = found["norm"]
  measures = Measures(
    scores=found["along"].T * norms if "along" in found else np.zeros((0, size)),
    losses=found["loss"],
    norms=norms,
    self_influence=found["quotient"] * norms**2,
    inverse_norms=found["inverse_norm"] * norms,
    direction_norms=np.zeros(0) if directions is None else np.asarray(tree_math.norm(directions), np.float64),
  )
  for name in ("losses", "norms", "scores", "self_influence", "inverse_norms"):
    bad = np.flatnonzero(~np.isfinite(np.atleast_2d(getattr(measures, name))).all(axis=0))
    if len(bad):
      raise UserError(
        f"{len(bad)} of {size} {name.replace('_', ' ')} are not finite (first rows {bad[:5].tolist()}): "
        "look for NaN in the weights, in the directions, or in the losses of these examples"
      )
  return measures


@partial(jax.jit, static_argnums=(0, 1, 2))
def _kernel(objective, maps, microbatch, contexts, sub, frozen, batch, directions):
  """Of each example of a batch: length of its feature, and the rest of the feature's unit vector, leaves [B, ...]."""
  feature, inverse = maps

  def one_example(one):
    total = lambda s: jnp.sum(gradients.per_example_losses(objective, s, frozen, one))  # noqa: E731
    loss, gradient = jax.value_and_grad(total)(sub)
    g = jax.tree.map(lambda leaf: leaf[None], gradients.widen(gradient))
    answered = tree_math.norm(g)[0] != 0  # NaN counts, so that it shows
    f = jax.tree.map(lambda leaf: jnp.where(answered, leaf, 0), feature(contexts[0], g))
    norm = tree_math.norm(f)[0]
    unit = jax.tree.map(lambda leaf: leaf / jnp.where(norm == 0, 1, norm).astype(leaf.dtype), f)
    mapped = inverse(contexts[1], unit)
    quotient, inverse_norm = tree_math.vdot(unit, mapped)[0], tree_math.norm(mapped)[0]
    found = {"loss": loss, "norm": norm, "quotient": quotient, "inverse_norm": inverse_norm}
    if directions is not None:
      first = jax.tree.map(lambda leaf: leaf[0], unit)
      found["along"] = jax.vmap(lambda r: gradients.tree_dot(r, first))(directions)
    return found

  return gradients.map_examples(one_example, objective.separate(batch), microbatch)


def observes(problem: CompiledObjective, inverse: GradientMap = IDENTITY) -> bool:
  """Whether `measure` forms no gradient of P numbers: no inverse or EK-FAC's, probes beside all leaves."""
  return inverse.function in (_unchanged, _apply_ekfac) and datainf_probes.serves(problem.objective, problem.sub)


@partial(jax.jit, static_argnums=0)
def _observed(objective, inverse, sub, frozen, batch, directions):
  """What `_kernel` gives, out of inputs and output gradients; `inverse` is EK-FAC's context, or empty."""
  flat, size = traverse_util.flatten_dict(sub, sep="/"), batch.valid.shape[0]
  r = {} if directions is None else traverse_util.flatten_dict(directions, sep="/")
  parts = ekfac.diagonal_parts(_ekfac_of(inverse), inverse[2], flat) if inverse else {}
  probes = {
    path: moment_probes.measure_probe(
      r.get(path), parts.get(path), leaf.shape[0], size, jnp.promote_types(leaf.dtype, jnp.float32)
    )
    for path, leaf in flat.items()
  }
  found, losses = datainf_probes.gradient_in_probes(objective, sub, frozen, batch, probes, moment_probes.MEASURED)
  join = lambda name: jnp.concatenate([found[path][name] for path in sorted(flat)])  # noqa: E731
  peak, norm = join("peak"), join("norm")
  length = lambda x: tree_math.norm(x.T)  # noqa: E731, over all leaves and layers
  total = length(peak * norm)
  share = peak / jnp.where(total == 0, jnp.inf, total)  # of the unit vector
  own, mapped = (join("own"), join("mapped")) if inverse else (norm, norm)
  measured = {
    "loss": losses,
    "norm": total,
    "quotient": jnp.sum((own * share) ** 2, axis=0),
    "inverse_norm": length(mapped * share),
  }
  if directions is not None:
    measured["along"] = jnp.sum(join("along") * share[..., None], axis=0)
  return measured


def _gather(stream: Stream, size: int, kernel) -> dict[str, np.ndarray]:
  """Puts kernel(batch), leaves [B, ...], into float64 [N, ...]."""
  out: dict[str, np.ndarray] = {}
  for rows, values in resumable.results(stream, "measures", kernel):
    for name, part in values.items():
      into = out.setdefault(name, np.zeros((size, *part.shape[1:])))
      into[rows] = part[: len(rows)]
  if not out:
    raise UserError("there is no training example to score: the stream of batches is empty")
  return out


def cosine(measures: Measures) -> np.ndarray:
  """g_i.r_q / (|g_i| |r_q|), float32 [Q, N] in [-1, 1]; 0 where either is 0."""
  lengths = measures.norms * measures.direction_norms[:, None]
  return np.clip(np.divide(measures.scores, lengths, out=np.zeros_like(lengths), where=lengths > 0), -1, 1).astype(
    np.float32
  )


def relatif(measures: Measures) -> np.ndarray:
  """g_i.r_q / sqrt(g_i . (H + damping I)^-1 . g_i): l-RelatIF, Barshan et al. 2020 (arXiv 2003.11630).

  The influence of an example per unit of its influence on itself: what is an outlier everywhere no longer wins.

  Args:
    measures: with r_q and the inverse of the same H and damping. Another inverse gives another normalisation; only
      with the same one is the score at most sqrt(g_q . (H + damping I)^-1 . g_q).

  Returns:
    float32 [Q, N]; 0 for examples whose gradient is 0.

  Raises:
    UserError: a self-influence that is not positive: the inverse is not positive definite.
  """
  return _per_example(measures, np.sqrt(np.maximum(measures.self_influence, 0)))


def theta_relatif(measures: Measures) -> np.ndarray:
  """g_i.r_q / |(H + damping I)^-1 g_i|: theta-RelatIF of the same paper, influence per change of the parameters.

  Args, Returns, Raises: as `relatif`.
  """
  return _per_example(measures, measures.inverse_norms)


def _per_example(measures: Measures, lengths: np.ndarray) -> np.ndarray:
  there = measures.norms > 0
  bad = np.flatnonzero(there & ~(lengths > 0))
  if len(bad):
    raise UserError(
      f"{how_many(len(bad), 'example[s] [has|have]')} a gradient but no positive self-influence (first rows "
      f"{bad[:5].tolist()}): the inverse is not positive definite; use --curvature=ggn or a larger damping"
    )
  return np.where(there, measures.scores / np.where(there, lengths, 1), 0).astype(np.float32)


def inverse_map(
  solver: str, fitted: ekfac.Ekfac | low_rank.LowRank | None = None, damping: float | None = None
) -> GradientMap:
  """The inverse of a solver that can be applied to every training gradient, N times and not Q times.

  Args:
    solver: identity, ekfac or low_rank.
    fitted: from `ekfac.fit` or `low_rank.fit_low_rank`.
    damping: absolute, above 0; none for identity.

  Raises:
    UserError: a solver without such an inverse, a damping that is not positive, something else fitted.
    NegativeCurvatureError: low rank, an eigenvalue at or below -damping (when it is first applied).
  """
  if solver == "identity":
    if damping is not None or fitted is not None:
      raise UserError("the identity is no inverse of a curvature: it takes neither damping nor anything fitted")
    return IDENTITY
  kinds = {"ekfac": ekfac.Ekfac, "low_rank": low_rank.LowRank}
  if solver not in kinds:
    why = {
      "datainf": "its closed form needs all pairs of training examples here",
      "lissa": "it would need a recursion",
      "cg": "it would need an iteration",
      "exact": "it solves for a few right-hand sides",
    }.get(solver, "it is unknown")
    raise UserError(
      f"--solver={solver} gives no inverse to apply to every training gradient ({why}): for self-influence and RelatIF "
      f"use one of identity, {', '.join(kinds)}"
    )
  if not isinstance(fitted, kinds[solver]):
    raise UserError(f"the inverse of {solver} needs what it fitted ({kinds[solver].__name__}), got {type(fitted)}")
  if damping is None:
    raise UserError(f"the inverse of {solver} needs an absolute damping: give --damping, or resolve --damping_ratio")
  damping = check_damping(damping, positive=True)
  if solver == "ekfac":
    return GradientMap(_apply_ekfac, (fitted.factors, fitted.diagonals, damping))
  # Only the eigenvalues are constants of the program: what stays in the compilation cache holds no vectors.
  spectrum = dataclasses.replace(fitted, vectors=None)

  def apply_low_rank(vectors, g):
    return low_rank.low_rank(g, dataclasses.replace(spectrum, vectors=vectors), damping).solution

  return GradientMap(apply_low_rank, fitted.vectors)


def _apply_ekfac(context: Tree, g: Tree) -> Tree:
  return ekfac.apply_inverse(_ekfac_of(context), context[2], g)


def _ekfac_of(context: Tree) -> ekfac.Ekfac:
  factors, diagonals, _ = context
  return ekfac.Ekfac(factors, diagonals, {})
