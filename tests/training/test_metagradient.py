"""The metagradient against finite differences of real trainings, on a tiny decoder in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from in2core_jax import gradients
from in2core_jax.data import packing
from in2core_jax.params import subtree
from in2core_jax.training.metagradient import Unrolled
from in2core_jax.training.recipe import Recipe
from in2core_jax.training.train_loop import Trainer

quick_compile = tiny.quick_compile


def made(clip: float, decay: float):
  """(unrolled training of 5 steps, its start, the losses of the first two examples, the same training by `Trainer`)."""
  config = tiny.smaller_config()
  params = tiny.make_params(config, jnp.float64)
  chosen = subtree.make_subtree(params, "2", "all")
  objective, (sub, frozen) = tiny.make_objective(config, chosen), subtree.split(params, chosen)
  packer = packing.Packer(tiny.make_dataset(config.vocab_size))
  packer = packing.Packer(packer.dataset, shapes=[packing.training_shape([packer], 3)])
  trainer = Trainer(objective, Recipe(5, 3, 0.02, 0.2, decay, clip))
  asked = tiny.make_batch(config, rows=[0, 1], size=2)
  loss_fn = lambda own: gradients.per_example_losses(objective, own, frozen, asked)[:2]  # noqa: E731
  unrolled = Unrolled(objective, trainer, frozen, packer, 0, 5)
  return unrolled, sub, jax.jit(loss_fn), trainer.train(sub, frozen, packer, 0).sub


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "decay"), [(0.0, 0.0), (0.5, 0.1)])
def test_a_metagradient_is_the_slope_of_real_trainings(clip, decay, x64):
  unrolled, sub, loss_fn, plain = made(clip, decay)
  size = unrolled.size
  ones = np.ones(size)
  tiny.assert_trees_close(unrolled.train(sub, ones), plain, rtol=1e-10)
  found = unrolled.metagradient(sub, jax.jacrev(loss_fn), ones)
  after = lambda weights: np.asarray(loss_fn(unrolled.train(sub, weights)))  # noqa: E731
  step = 1e-5
  slopes = [(after(ones + step * one) - after(ones - step * one)) / (2 * step) for one in np.eye(size)]
  np.testing.assert_allclose(-found.T, slopes, rtol=1e-4, atol=1e-8)
  assert np.all(found[:, tiny.NO_RESPONSE] == 0) and np.ptp(found, axis=1).min() > 1e-3
