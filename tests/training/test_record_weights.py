"""Weights of training examples: an integer weight is as many copies."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from in2core_jax.data import packing
from in2core_jax.errors import UserError
from in2core_jax.params import subtree
from in2core_jax.training.recipe import Recipe
from in2core_jax.training.train_loop import Trainer

quick_compile = tiny.quick_compile
KEPT = [0, 1, 4]
WEIGHTS = np.array([2.0, 1.0, 3.0])


def dataset(rows):
  every = tiny.make_dataset(tiny.smaller_config().vocab_size)
  return types.SimpleNamespace(**{name: tuple(values[row] for row in rows) for name, values in vars(every).items()})


def test_a_weight_scales_the_loss_of_its_example_and_the_mean_of_the_weights_is_1():
  (_, plain), (where, batch) = (
    next(iter(packing.Packer(dataset(KEPT), weights=weights).shuffled(3, 0, 0))) for weights in (None, 10 * WEIGHTS)
  )
  for place, row in enumerate(where):
    np.testing.assert_allclose(batch.weight[place], plain.weight[place] * WEIGHTS[row] / 2, rtol=1e-6)
  pairs = dataset(KEPT)
  pairs.second = np.array([2, 3, 4])
  with pytest.raises(UserError, match="preference pairs have no weights"):
    packing.Packer(pairs, weights=WEIGHTS)


@pytest.mark.slow
def test_a_step_on_all_examples_with_integer_weights_is_that_on_copies(x64):
  config = tiny.smaller_config()
  params = tiny.make_params(config, jnp.float64)
  chosen = subtree.make_subtree(params, "2", "all")
  objective, (sub, frozen) = tiny.make_objective(config, chosen), subtree.split(params, chosen)
  copies = [row for row, weight in zip(KEPT, WEIGHTS, strict=True) for _ in range(int(weight))]
  found = []
  for packer in (packing.Packer(dataset(KEPT), weights=WEIGHTS), packing.Packer(dataset(copies))):
    trainer = Trainer(objective, Recipe(3, len(packer), 0.02))
    found.append(trainer.train(sub, frozen, packer, 0))
  tiny.assert_trees_close(found[0].sub, found[1].sub, rtol=1e-6)
  np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-6)
