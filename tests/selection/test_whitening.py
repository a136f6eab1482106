"""Cosines in the whitened metric: against the dense matrix, in both forms, and what must not change them."""

import numpy as np
import pytest

from in2core_jax.errors import UserError
from in2core_jax.selection import whitening
from in2core_jax.selection.whitening import WhitenedMetric


def pool(size, width, seed=0):
  rng = np.random.default_rng(seed)
  shared = rng.normal(size=width)  # what all gradients have in common
  return (rng.normal(size=(size, width)) + 3 * shared) * rng.lognormal(size=(size, 1))


def dense_cosines(features, x, y, ratio):
  """By the definition, with the matrix."""
  unit = features / np.linalg.norm(features, axis=1, keepdims=True)
  c = unit.T @ unit / len(unit)
  metric = np.linalg.inv(c + ratio * np.linalg.eigvalsh(c)[-1] * np.eye(len(c)))
  norm = lambda z: np.sqrt(np.einsum("nd,de,ne->n", z, metric, z))  # noqa: E731
  return x @ metric @ y.T / np.outer(norm(x), norm(y))


@pytest.mark.parametrize("ratio", [1e-3, 0.03, 0.1, 10.0])
@pytest.mark.parametrize(("size", "width"), [(20, 90), (90, 20), (70, 200), (200, 70), (1, 5)])
def test_cosines_are_those_of_the_dense_matrix(size, width, ratio):
  features, queries = pool(size, width), pool(7, width, seed=1)
  metric = WhitenedMetric.fit(features, ratio)
  assert metric.over_rows == (size < width)
  np.testing.assert_allclose(
    metric.cosines(queries, features), dense_cosines(features, queries, features, ratio), rtol=0, atol=1e-9
  )
  np.testing.assert_allclose(np.diag(metric.cosines(features, features)), 1, atol=1e-9)


@pytest.mark.parametrize(("size", "width"), [(40, 200), (200, 40)])
def test_the_length_of_a_gradient_and_the_order_of_the_pool_change_nothing(size, width):
  features, queries = pool(size, width), pool(5, width, seed=1)
  cosines = WhitenedMetric.fit(features, 0.1).cosines(queries, features)
  longer = features * np.random.default_rng(2).lognormal(sigma=3, size=(size, 1))
  np.testing.assert_allclose(WhitenedMetric.fit(longer, 0.1).cosines(queries * 7, longer), cosines, atol=1e-10)
  order = np.random.default_rng(3).permutation(size)
  again = WhitenedMetric.fit(features[order], 0.1).cosines(queries, features[order])
  np.testing.assert_allclose(again, cosines[:, order], atol=1e-10)


def test_rows_of_zeros_count_for_nothing():
  features, queries = pool(30, 60), pool(4, 60, seed=1)
  with_zeros = np.insert(features, [0, 13, 30], 0.0, axis=0)
  found = WhitenedMetric.fit(with_zeros, 0.1).cosines(queries, with_zeros)
  rows = np.flatnonzero(np.any(with_zeros, axis=1))
  np.testing.assert_allclose(found[:, rows], WhitenedMetric.fit(features, 0.1).cosines(queries, features), atol=1e-12)
  assert not found[:, np.setdiff1d(np.arange(33), rows)].any()


def test_of_a_large_pool_the_same_rows_make_the_metric_in_any_order(monkeypatch):
  monkeypatch.setattr(whitening, "MOST_ROWS", 50)
  features, queries = pool(120, 200), pool(4, 200, seed=1)
  ids = [f"example-{row}" for row in range(120)]
  cosines = WhitenedMetric.fit(features, 0.1, ids).cosines(queries, features)
  order = np.random.default_rng(3).permutation(120)
  again = WhitenedMetric.fit(features[order], 0.1, [ids[row] for row in order]).cosines(queries, features[order])
  np.testing.assert_allclose(again, cosines[:, order], atol=1e-10)
  # Close to the metric of all rows: what they share is known from a part of them.
  every = dense_cosines(features, queries, features, 0.1)
  assert np.corrcoef(cosines.ravel(), every.ravel())[0, 1] > 0.9


def test_float32_features_are_summed_in_float64():
  features, queries = pool(40, 5000).astype(np.float32), pool(4, 5000, seed=1).astype(np.float32)
  wide = WhitenedMetric.fit(features.astype(np.float64), 0.03).cosines(queries.astype(np.float64), features)
  np.testing.assert_allclose(WhitenedMetric.fit(features, 0.03).cosines(queries, features), wide, atol=1e-5)


@pytest.mark.parametrize(("features", "ratio"), [(np.zeros((3, 4)), 0.1), (pool(3, 4), 0.0), (pool(3, 4), np.nan)])
def test_a_metric_of_nothing_is_refused(features, ratio):
  with pytest.raises(UserError, match="whitened metric"):
    WhitenedMetric.fit(features, ratio)


def test_rows_that_are_measured_once_give_the_same_cosines():
  for size, width in ((40, 90), (90, 40)):
    features, queries = pool(size, width), pool(5, width, seed=1)
    metric = WhitenedMetric.fit(features)
    once = metric.measured(features)
    np.testing.assert_allclose(metric.cosines(queries, once), metric.cosines(queries, features), atol=1e-12)
    some = np.array([3, 1, 8])
    np.testing.assert_allclose(metric.cosines(queries, once.take(some)), metric.cosines(queries, features)[:, some])


def test_gradients_that_are_not_finite_are_refused():
  features = pool(40, 90)
  features[3, 2] = np.nan
  with pytest.raises(UserError, match="1 training example are not finite"):
    whitening.check_gradients(features, "training")
