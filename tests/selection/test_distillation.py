"""Influence distillation against brute force over supports, and what its weights must be."""

import itertools

import numpy as np
import pytest
from test_coreset import make_inputs

from in2core_jax.selection import coreset, distillation
from in2core_jax.selection.inputs import Budget, matching_target


def least(gram, products, spread):
  """The minimum by trying every support: linear equations of each, kept where all KKT conditions hold."""
  size, whole = len(gram), gram + spread * np.eye(len(gram))
  for count in range(1, size + 1):
    for support in map(list, itertools.combinations(range(size), count)):
      system = np.block(
        [[whole[np.ix_(support, support)], np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]]
      )
      found = np.linalg.solve(system, [*products[support], 1.0])
      v = np.zeros(size)
      v[support] = found[:-1]
      slope = whole @ v - products
      if v.min() >= 0 and slope.min() >= -found[-1] - 1e-9:
        return v
  raise AssertionError("a strictly convex problem has a minimum")


def drawn(seed, size=7, width=4):
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(size, width)) + 0.3
  return features @ features.T, features @ rng.normal(size=width)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_weights_are_those_of_the_kkt_conditions(seed, spread):
  gram, products = drawn(seed)
  np.testing.assert_allclose(distillation.solved(gram, products, spread), least(gram, products, spread), atol=2e-5)


def test_a_projection_onto_the_simplex_is_the_closest_point():
  rng = np.random.default_rng(0)
  for point in rng.normal(size=(20, 5)) * 3:
    found = distillation.simplex(point)
    assert found.min() >= 0 and found.sum() == pytest.approx(1)
    others = rng.dirichlet(np.ones(5), 200)
    assert np.all((point - found) @ (others - found).T <= 1e-9)


def test_as_many_as_asked_get_a_weight_and_more_strength_spreads_them():
  gram, products = drawn(1, size=60, width=8)
  before = 0.0
  for count in (15, 30, 50):
    order, strength = distillation.order(gram, products, count)
    v = distillation.solved(gram, products, strength * np.trace(gram) / 60)
    assert count - 1 <= np.count_nonzero(v) <= count + 2 and strength > before
    assert len({*np.flatnonzero(v)} & {*order[:count]}) >= count - 1
    before = strength
    weights = distillation.weights(gram[np.ix_(order[:count], order[:count])], products[order[:count]], strength)
    assert weights.min() > 0 and weights.mean() == pytest.approx(1) and weights.std() > 0.05


def test_equal_features_get_equal_weights_and_the_step_is_closer_than_that_of_the_plain_mean():
  inputs = make_inputs(size=30)
  inputs.features[20:] = inputs.features[:10]
  choice = coreset.select_by("distillation", inputs, Budget(num_examples=12))
  weight = dict(zip(choice.rows.tolist(), choice.weights, strict=True))
  pairs = [(row, row + 20) for row in range(10) if row in weight and row + 20 in weight]
  assert pairs and all(weight[one] == pytest.approx(weight[other], rel=1e-4) for one, other in pairs)
  target, chosen = matching_target(inputs), inputs.features[choice.rows]
  assert np.sum((choice.weights @ chosen / 12 - target) ** 2) <= np.sum((chosen.mean(axis=0) - target) ** 2)
  rows, weights = choice.in_source_order
  assert rows.tolist() == sorted(choice.rows) and weights.tolist() == [weight[row] for row in rows]
  assert coreset.select_by("matching", inputs, Budget(num_examples=12)).weights is None


def test_features_of_nothing_and_one_example_are_no_special_cases():
  inputs = make_inputs(size=8, features=np.zeros((8, 6)))
  assert coreset.select_by("distillation", inputs, Budget(num_examples=3)).weights.tolist() == [1, 1, 1]
  assert coreset.select_by("distillation", make_inputs(size=8), Budget(num_examples=1)).weights.tolist() == [1]
  every = coreset.select_by("distillation", make_inputs(size=8), Budget(fraction=1.0))
  assert len(every.rows) == 8 and every.weights.mean() == pytest.approx(1)
