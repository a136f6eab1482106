"""The metagradient: how a loss after a training changes with the weight of each training example, exactly.

  m_i = -d L(theta_T(w)) / d w_i   at w = 1,
  theta_{t+1} = step(theta_t, gradient of (1/B) sum_{i in batch t} w_i l_i(theta_t))

by reverse mode through all T steps, optimiser and clipping among them (MAGIC, arXiv 2503.13751). Positive = proponent,
not divided by N. What an influence function approximates near an optimum, this is for the training as it was done.

Kept are the states of every sqrt(T)-th step, and of one such stretch at a time, which is walked through again.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from in2core_jax import gradients
from in2core_jax.data.packing import Packer
from in2core_jax.errors import UserError
from in2core_jax.gradients import Objective
from in2core_jax.training.recipe import Recipe, make_optimizer, make_schedule
from in2core_jax.training.train_loop import Trainer, stream

Tree = Any
Step = tuple[np.ndarray, Any, np.float32]  # places of the examples (-1: none), batch, learning rate


def weighted_step(objective: Objective, recipe: Recipe, carry: Tree, weights: jax.Array, frozen: Tree, batch, rate):
  """One step of `Trainer` with a weight on the loss of every example of the batch.

  Args:
    objective: the loss.
    recipe: clipping and decay.
    carry: (trained parameters, the optimiser's state).
    weights: [slots of the batch]; all 1: the step of `Trainer`.
    frozen: everything else.
    batch: of the training set.
    rate: learning rate.
  """
  sub, state = carry

  def loss_fn(s):
    losses = gradients.per_example_losses(objective, s, frozen, batch)[: len(weights)]  # the rest is padding
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(batch.valid), 1)

  optimizer = make_optimizer(recipe, lambda count: rate)
  updates, state = optimizer.update(gradients.widen(jax.grad(loss_fn)(sub)), state, sub)
  return optax.apply_updates(sub, updates), state


class Unrolled:
  """A training whose steps can be walked back."""

  def __init__(self, objective: Objective, trainer: Trainer, frozen: Tree, packer: Packer, seed: int, steps: int):
    """Lays out the batches of `Trainer.train` with the same arguments; trains nothing yet."""
    self._recipe = recipe = dataclasses.replace(trainer.recipe, steps=steps)
    self._packer, self._trainer, self._frozen = packer, trainer, frozen
    self.size, self.steps = len(packer), self._laid_out(seed)
    plain = functools.partial(weighted_step, objective, recipe)
    self._forward = jax.jit(plain)
    self._backward = jax.jit(functools.partial(_pulled_back, plain), donate_argnums=5)

  def _laid_out(self, seed: int) -> list[Step]:
    rates = np.asarray(jax.vmap(make_schedule(self._recipe))(np.arange(self._recipe.steps)), np.float32)
    batches = itertools.islice(stream(self._packer, self._recipe, seed), self._recipe.steps)
    return [(np.asarray(places), batch, rate) for (places, batch), rate in zip(batches, rates)]  # noqa: B905

  def in_order_of(self, seed: int) -> "Unrolled":
    """The training with the data in another order; nothing is compiled again."""
    other = copy.copy(self)
    other.steps = self._laid_out(seed)
    return other

  def _weights(self, weights: np.ndarray, step: Step) -> np.ndarray:
    places = step[0]
    return np.where(places >= 0, weights[places], 0.0).astype(weights.dtype)

  def _walk(self, carry: Tree, weights: np.ndarray, steps: Sequence[Step]) -> Tree:
    for step in steps:
      _, batch, rate = step
      own = self._weights(weights, step)
      carry = self._forward(carry, own, self._frozen, self._trainer.place(batch), rate)
    return carry

  def train(self, sub: Tree, weights: np.ndarray) -> Tree:
    """The trained parameters where every example's loss has a weight, [N]."""
    return self._walk(self._trainer.init(sub), weights, self.steps)[0]

  def metagradient(
    self,
    sub: Tree,
    gradient_fn: Callable[[Tree], Tree],
    weights: np.ndarray,
    on_step: Callable[[], None] = lambda: None,
  ) -> np.ndarray:
    """m_i of every training example for each of Q losses, f64 [Q, N].

    Args:
      sub: start.
      gradient_fn: gradients of the losses L at the trained parameters, leaves [Q, ...] like them.
      weights: [N], at which it is taken; ones for a plain training.
      on_step: called after every step that was walked back.

    Returns:
      3 Q P numbers are held on the way: cotangents of the parameters and of both moments.

    Raises:
      UserError: it is not finite.
    """
    length = max(1, math.isqrt(len(self.steps)))
    starts, carry = list(range(0, len(self.steps), length)), self._trainer.init(sub)
    kept = []
    for start in starts:
      kept.append(jax.device_get(carry))
      carry = self._walk(carry, weights, self.steps[start : start + length])
    (floats, _), asked = _parted(carry), jax.tree.leaves(gradient_fn(carry[0]))
    queries = len(asked[0])
    back = [jnp.asarray(own, leaf.dtype) for own, leaf in zip(asked, floats, strict=False)]  # parameters come first
    back += [jnp.zeros((queries, *leaf.shape), leaf.dtype) for leaf in floats[len(asked) :]]
    found = np.zeros((queries, self.size))
    for start, first in zip(reversed(starts), reversed(kept), strict=True):
      stretch = self.steps[start : start + length]
      carries = [first]
      for step in stretch[:-1]:
        carries.append(self._walk(carries[-1], weights, [step]))
      for step, before in zip(reversed(stretch), reversed(carries), strict=True):
        places, batch, rate = step
        own = self._weights(weights, step)
        back, of_weights = self._backward(before, own, self._frozen, self._trainer.place(batch), rate, back)
        there = places >= 0
        found[:, places[there]] -= np.asarray(of_weights, np.float64)[:, there]  # no example is twice in a step
        on_step()
    if not np.isfinite(found).all():
      raise UserError(
        "the metagradient is not finite: Adam's square root has no slope where a gradient is exactly 0, as that of "
        "fresh LoRA factors; train the weights of layers (--trainable=full)"
      )
    return found


def _parted(carry: Tree) -> tuple[list, Callable[[list], Tree]]:
  """(the leaves that have derivatives, a function that puts them back beside counters)."""
  leaves, treedef = jax.tree.flatten(carry)
  smooth = [jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact) for leaf in leaves]

  def whole(floats: list) -> Tree:
    left = iter(floats)
    return treedef.unflatten([next(left) if own else leaf for leaf, own in zip(leaves, smooth, strict=True)])

  return [leaf for leaf, own in zip(leaves, smooth, strict=True) if own], whole


def _pulled_back(step_fn, carry: Tree, weights, frozen: Tree, batch, rate, back: list) -> tuple[list, jax.Array]:
  """(cotangents of the state before a step, of its weights) from those of the state after it, leaves [Q, ...]."""
  floats, whole = _parted(carry)
  after = lambda floats, weights: _parted(step_fn(whole(floats), weights, frozen, batch, rate))[0]  # noqa: E731
  _, pull = jax.vjp(after, floats, weights)
  return jax.lax.map(pull, back)  # one after the other: the vocabulary's cotangents of a step exist once
