"""Shapes of the parameters that a stage will have, and counts of what it will do, before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.model import decoder, peft_folder
from in2core_jax.params import adapters, quantisation, subtree
from in2core_jax.pipeline.settings import TRAINED, Settings
from in2core_jax.runs import adapter_folder
from in2core_jax.training import train_loop
from in2core_jax.training.recipe import steps_for


@functools.cache
def param_shapes(config: decoder.ModelConfig, dtype: str, lora_rank: int = 0, kind: str = quantisation.FULL) -> Any:
  """Shapes of the parameters, with LoRA factors beside the kernels when the rank is above 0.

  Args:
    config: the model's shape.
    dtype: of the weights.
    lora_rank: of the factors.
    kind: of matrices of layers, as --frozen_weights says it.
  """

  def make(key):
    params = decoder.init_params(config, key, jnp.dtype(dtype))
    return adapters.add_lora(params, lora_rank, key) if lora_rank else params

  found = jax.eval_shape(make, jax.random.key(0))
  return found if kind == quantisation.FULL else quantisation.quantise_tree(found, kind)


def scored_params(config: decoder.ModelConfig, s: Settings) -> Any:
  """Shapes of the scored parameters; the checkpoint says whether there are LoRA factors."""
  if adapter_folder.is_adapter(s.checkpoint):
    return peft_folder.read_adapter(s.checkpoint, config).shapes(param_shapes(config, s.dtype, 0, s.frozen_weights))
  rank = train_loop.checkpoint_meta(s.checkpoint)["lora_rank"] if s.checkpoint else 0
  return param_shapes(config, s.dtype, rank, s.frozen_weights)


@dataclasses.dataclass(frozen=True)
class ScoredPart:
  """What is known of the scored parameters before any work.

  Attributes:
    tree: the chosen subtree.
    size: its parameters.
    kernels: paths of all kernels of a layer, which a projected store covers.
    trained: for LESS, what the training changes, as `train_loop.subtree_meta` writes it; else None.
  """

  tree: subtree.Subtree
  size: int
  kernels: tuple[str, ...]
  trained: dict | None

  @classmethod
  def of(cls, s: Settings, params, trained: subtree.Subtree | None = None, layers: str = "--layers") -> ScoredPart:
    """Of `params`, arrays or shapes; arguments and errors of `checks.check_scores`."""
    saved = None
    if s.trajectory == "less":
      saved = train_loop.subtree_meta(trained) if trained else train_loop.checkpoint_meta(s.checkpoint)["subtree"]
    tree = subtree.make_subtree(params, s.layers, s.modules, (layers, "--modules"))
    kernels = subtree.make_subtree(params, s.layers, "matrices", (layers, "--modules")).paths
    return cls(tree, subtree.size_of(params, tree), kernels, saved)


def scored_shapes(config: decoder.ModelConfig, s: Settings) -> tuple[Any, subtree.Subtree]:
  """(shapes of the scored parameters, chosen subtree); without a checkpoint the LoRA factors of a demo to come."""
  to_come = s.trainable == "lora" and not s.checkpoint and "lora" in s.modules.split(",")
  params = param_shapes(config, s.dtype, s.lora_rank, s.frozen_weights) if to_come else scored_params(config, s)
  return params, subtree.make_subtree(params, s.layers, s.modules)


def trained_shapes(
  config: decoder.ModelConfig, s: Settings, named: tuple[str, str] = TRAINED
) -> tuple[Any, subtree.Subtree]:
  """(shapes of the trained model's parameters, what is trained), as `finetune.start_params`."""
  lora = s.trainable == "lora"
  params = param_shapes(config, s.dtype, s.lora_rank if lora else 0, s.frozen_weights)
  modules = "lora" if lora else s.trainable_modules
  return params, subtree.make_subtree(params, s.trainable_layers, modules, named)


def num_steps(s: Settings, examples: int) -> int:
  """Optimiser steps of a training, as `finetune.recipe_of`."""
  return s.steps or steps_for(examples, s.batch_size, s.epochs)


def num_checkpoints(session, s: Settings) -> int:
  """Checkpoints that a training on all examples makes, before --keep_checkpoints removes some."""
  return -(-num_steps(s, np.count_nonzero(session.splits["train"].num_response_tokens)) // s.checkpoint_every)


def num_summed(session, s: Settings) -> int:
  """Checkpoints that --trajectory adds up over: those that --checkpoint has, or those that a demo is to make."""
  return len(train_loop.kept_weights(s.checkpoint)) if s.checkpoint else num_checkpoints(session, s)
