"""How a training is done: steps, learning rate, optimiser."""

import dataclasses

import jax
import optax

from in2core_jax.errors import UserError, how_many


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How to train; two runs with equal recipes differ only in their data.

  Attributes:
    steps: optimiser steps.
    batch_size: examples per step.
    learning_rate: peak of the schedule.
    warmup_ratio: share of the steps with linear warm-up; a cosine decay to 0 follows.
    weight_decay: decoupled, on what is a matrix in each layer: kernels and LoRA factors; not on embedding, head, norms
      and biases.
    max_grad_norm: global clipping norm; 0 turns clipping off.
    seed: of the order of the data.
  """

  steps: int
  batch_size: int = 16
  learning_rate: float = 1e-4
  warmup_ratio: float = 0.1
  weight_decay: float = 0.0
  max_grad_norm: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if self.steps < 1 or self.batch_size < 1:
      raise UserError(
        f"training needs at least one step and one example a step, got {self.steps} and {self.batch_size}"
      )
    if not self.learning_rate > 0 or not 0 <= self.warmup_ratio < 1 or self.weight_decay < 0 or self.max_grad_norm < 0:
      raise UserError(
        f"learning_rate={self.learning_rate} must be above 0, warmup_ratio={self.warmup_ratio} in [0, 1), "
        f"weight_decay={self.weight_decay} and max_grad_norm={self.max_grad_norm} not negative"
      )


_MOST_STEPS = 10**7  # as `in2core_jax.pipeline.ranges` has it for --steps


def steps_for(num_examples: int, batch_size: int, epochs: float) -> int:
  """Steps of `epochs` passes over `num_examples`.

  Raises:
    UserError: more than any training takes.
  """
  steps = max(1, round(epochs * -(-num_examples // batch_size)))
  if steps > _MOST_STEPS:
    raise UserError(
      f"--epochs={epochs} of {how_many(num_examples, 'example')} are {steps:,} steps, more than {_MOST_STEPS:,}"
    )
  return steps


def make_schedule(recipe: Recipe) -> optax.Schedule:
  """Learning rate of each step: linear warm-up from lr / (warm-up steps + 1), then cosine decay to 0."""
  warmup = max(1, round(recipe.warmup_ratio * recipe.steps)) if recipe.warmup_ratio else 0
  return optax.warmup_cosine_decay_schedule(
    recipe.learning_rate / (warmup + 1), recipe.learning_rate, warmup, max(recipe.steps, warmup + 1)
  )


def make_optimizer(recipe: Recipe, schedule: optax.Schedule | None = None) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019) behind global-norm clipping, with warm-up and cosine decay.

  Args:
    recipe: how to train.
    schedule: another one than the recipe's.
  """
  schedule = schedule or make_schedule(recipe)
  is_matrix = lambda path, leaf: leaf.ndim >= 3 and getattr(path[-1], "key", "") != "expert_bias"  # noqa: E731
  matrices = lambda tree: jax.tree_util.tree_map_with_path(is_matrix, tree)  # noqa: E731
  adamw = optax.adamw(schedule, weight_decay=recipe.weight_decay, mask=matrices if recipe.weight_decay else None)
  return optax.chain(optax.clip_by_global_norm(recipe.max_grad_norm), adamw) if recipe.max_grad_norm else adamw
