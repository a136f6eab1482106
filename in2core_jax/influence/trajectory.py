"""Scores that follow a training: sums over its checkpoints, TracIn and LESS.

  tracin   sum_t weight_t g_i(t).g_q(t)
  less     sum_t weight_t cos(g_q(t), Gamma_i(t)),  Gamma_i(t) the Adam direction of example i

Positive = proponent, as in `influence`: a step along example i's gradient, or Adam direction, lowers the loss on q.

Letters: N training examples, Q queries, t a checkpoint, mu and nu the moments that Adam keeps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from in2core_jax.errors import UserError, how_many
from in2core_jax.gradients import Tree
from in2core_jax.influence import normalize
from in2core_jax.influence.kernels import CompiledObjective, Stream


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A moment of the training.

  Attributes:
    problem: at its parameters; `first.at(sub)` compiles nothing again.
    weight: eta_t, the learning rate there, or its mean over the steps since the checkpoint before; 0 or more.
    optimizer_state: the optax state that follows from the steps before it; `less` needs it.
  """

  problem: CompiledObjective
  weight: float
  optimizer_state: Any = None

  def __post_init__(self):
    if not np.isfinite(self.weight) or self.weight < 0:
      raise UserError(f"a checkpoint with weight {self.weight}: it is a learning rate, finite and not negative")


# (problem at a checkpoint) -> its queries, leaves [Q, ...]: gradients of the same evaluation examples at each.
Queries = Callable[[CompiledObjective], Tree]


def tracin(
  checkpoints: Sequence[Checkpoint], stream: Stream, size: int, queries: Queries, path: str = "auto"
) -> np.ndarray:
  """sum_t eta_t g_i(t) . g_q(t), float32 [Q, N]: TracInCP, Pruthi et al. 2020 (arXiv 2002.08484).

  Args:
    checkpoints: of one training.
    stream: training batches; hidden states of a boundary cache stay right as long as only the subtree was trained.
    size: N.
    queries: gradients at a checkpoint, for example `lambda problem: problem.mean_gradient(evaluation_stream)`.
    path: as in `CompiledObjective.scores`.

  Raises:
    UserError: no checkpoint, no positive weight, or a score that is not finite.
  """
  return _sum_over(checkpoints, lambda at: at.problem.scores(stream, size, queries(at.problem), path))


@dataclasses.dataclass(frozen=True)
class AdamDirection:
  """Gamma(g): the direction of the Adam step that would be taken with this gradient, before learning rate and sign.

    m = b1 mu + (1 - b1) g,   v = b2 nu + (1 - b2) g^2,   t = count + 1
    Gamma = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)             (Kingma and Ba 2015; optax.scale_by_adam)

  The step is theta - eta Gamma, so a positive g_q.Gamma_i lowers the loss on q: proponent. The clipping and the weight
  decay that an optimiser may have around Adam are left out, as in the paper.

  An instance is the function (state, g) -> Gamma; equal settings share compiled programs.

  Attributes:
    b1, b2, eps: of the optimiser; the defaults are those of optax and of `recipe.make_optimizer`.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8

  def __post_init__(self):
    if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps >= 0):
      raise UserError(f"Adam with b1={self.b1}, b2={self.b2}, eps={self.eps}: needs 0 <= b < 1 and eps not negative")

  def __call__(self, state: optax.ScaleByAdamState, g: Tree) -> Tree:
    """Gamma of each gradient, leaves [Q, ...]; mu and nu are shaped like the subtree, without a query axis."""
    step = optax.scale_by_adam(self.b1, self.b2, self.eps)
    return jax.vmap(lambda one: step.update(one, state)[0])(g)


def find_adam_state(optimizer_state: Any, sub: Tree) -> optax.ScaleByAdamState:
  """The Adam moments inside an optax state, such as that of `recipe.make_optimizer`.

  Args:
    optimizer_state: nested optax state.
    sub: the subtree whose moments they must be.

  Raises:
    UserError: no Adam in it, more than one, or moments of another subtree.
  """
  is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
  found = [node for node in jax.tree.leaves(optimizer_state, is_leaf=is_adam) if is_adam(node)]
  if len(found) != 1:
    raise UserError(
      f"the optimiser's state holds {how_many(len(found), 'Adam state')}, LESS needs exactly one: give the optax state "
      "of a training with adam or adamw"
    )
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
  if not shapes(found[0].mu) == shapes(found[0].nu) == shapes(sub):
    raise UserError("the optimiser's moments are those of another subtree: give the state of a training of this one")
  return found[0]


def less(
  checkpoints: Sequence[Checkpoint],
  stream: Stream,
  size: int,
  queries: Queries,
  direction: AdamDirection | None = AdamDirection(),
) -> np.ndarray:
  """Inf_Adam(i, q) = sum_t eta_t cos(g_q(t), Gamma_i(t)), float32 [Q, N]: LESS, Xia et al. 2024 (arXiv 2402.04333).

  Differences from its authors' code (princeton-nlp/LESS, `collect_grad_reps.py`, `matching.py`):
  - Gamma is the step that Adam takes. Theirs leaves out the bias correction (a common factor, which the cosine drops
    but for eps) and has eps inside of the root: there, entries with sqrt(v) below 1e-4 count less.
  - Gradients are whole and float32 or better; theirs are float16, randomly projected to 8192 numbers.
  - The weights stand as given; theirs are divided by their sum. The order is the same.
  - An example without response has score 0. Theirs has the cosine of the momentum alone, which is no property of it.
  - Theirs takes the mean over the queries of a subtask, then the maximum over subtasks: the caller's to do with [Q, N].
  The paper's subtree are LoRA factors, its checkpoints the ends of epochs of a warm-up training on a part of the data.

  Args:
    checkpoints: with the optimiser's state.
    stream: training batches.
    size: N.
    queries: gradients at a checkpoint.
    direction: the optimiser's settings; None takes plain gradients, TracIn of cosines (the paper's ablation).

  Raises:
    UserError: no checkpoint, one without Adam state, or a number that is not finite.
  """

  def cosines(at: Checkpoint) -> np.ndarray:
    feature = normalize.IDENTITY
    if direction is not None:
      feature = normalize.GradientMap(direction, find_adam_state(at.optimizer_state, at.problem.sub))
    at_t = (at.problem, stream, size, queries(at.problem))
    return normalize.cosine(normalize.measure(*at_t, feature=feature))

  return _sum_over(checkpoints, cosines)


def _sum_over(checkpoints: Sequence[Checkpoint], scores: Callable[[Checkpoint], np.ndarray]) -> np.ndarray:
  if not any(at.weight > 0 for at in checkpoints):
    raise UserError(
      f"{how_many(len(checkpoints), 'checkpoint')}, none with a positive weight: there is nothing to add up"
    )
  return sum(at.weight * scores(at).astype(np.float64) for at in checkpoints).astype(np.float32)
