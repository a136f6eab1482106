"""Gradients and hidden states together: the similarity by its definition, and how far queries are from the pool."""

import numpy as np
import pytest

from in2core_jax.errors import UserError
from in2core_jax.selection import coreset, cosines, hybrid, two_samples, whitening
from in2core_jax.selection.whitening import WhitenedMetric


def kinds(size, which, seed, width=50):
  """Vectors of a kind, around a direction that all kinds share."""
  rng = np.random.default_rng(seed)
  center = np.random.default_rng(100 + which).normal(size=width) + 4 * np.random.default_rng(99).normal(size=width)
  return center + 2 * rng.normal(size=(size, width))


def pools(seed=0):
  """(gradients, hidden states) of a pool of two kinds, 60 and 20."""
  made = [np.concatenate([kinds(60, 0, seed + part), kinds(20, 1, seed + 10 + part)]) for part in (0, 1, 2)]
  return made[0], np.stack(made[1:], axis=1)


def queries(which, size, seed=50):
  return kinds(size, which, seed), np.stack([kinds(size, which, seed + view) for view in (1, 2)], axis=1)


def found_for(asked, pool, counted=None):
  size = len(pool[0])
  ids = [f"id{row}" for row in range(size)]
  counted = np.ones(size, bool) if counted is None else counted
  return Found(hybrid.HybridMetric.fit(*pool, ids, counted), asked)


class Found:
  """What a metric says of some queries."""

  def __init__(self, metric, asked):
    queries = metric.asked(*asked)
    self.similarity, self.apart = metric.similarity(queries), metric.apart(queries)


def test_similarity_is_the_mean_of_the_cosines_in_metrics_of_what_is_counted():
  pool, asked = pools(), queries(1, 6)
  counted = np.arange(80) % 7 > 0
  pool[0][~counted] = 0  # without a response there is no gradient
  found = found_for(asked, pool, counted)
  gradients = WhitenedMetric.fit(pool[0][counted]).cosines(asked[0], pool[0])
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
  texts = 0
  for view in (0, 1):
    image = cosines.whitening(pool[1][counted, view], hybrid.EMBEDDING_DAMPING)
    texts = texts + unit(image(asked[1][:, view])) @ unit(image(pool[1][:, view])).T
  np.testing.assert_allclose(found.similarity, (gradients + texts) / 3, atol=1e-6)


def test_the_examples_of_the_queries_kind_are_most_similar():
  found = found_for(queries(1, 20), pools())
  best = np.argsort(-found.similarity.mean(axis=0))[:20]
  assert np.mean(best >= 60) > 0.9


def test_queries_of_another_kind_are_apart_and_draws_of_the_pool_are_not():
  pool = pools()
  far = found_for(queries(1, 20), pool).apart
  assert far.share > 0.5 and far.p == 1 / 200 and coreset.apart_enough(far)
  own = [np.concatenate([kinds(15, 0, 70 + part), kinds(5, 1, 80 + part)]) for part in (0, 1, 2)]
  own = own[0], np.stack(own[1:], axis=1)
  near = found_for(own, pool).apart
  assert near.distance < far.distance / 5 and near.p > 0.01 and not coreset.apart_enough(near)
  assert found_for(queries(1, 1), pool).apart is None  # one query tells nothing of its error


def test_apart_is_the_distance_of_the_means_without_their_sampling_error():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(7, 4)) + 1, rng.normal(size=(9, 4))
  biased = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
  noise = sum(z.var(axis=0, ddof=1).sum() / len(z) for z in (x, y))
  both = np.concatenate([x, y])
  found = two_samples.apart(both @ both.T, 7)
  np.testing.assert_allclose((found.distance, found.share), (biased - noise, 1 - noise / biased))


def test_p_is_that_of_a_test():
  """Draws of one kind are called apart as often as p says, however many there are; the distance does not grow."""
  rng, found = np.random.default_rng(0), []
  for queries in (5, 20, 80):
    for _ in range(60):
      both = rng.normal(size=(queries + 60, 6))
      found.append(two_samples.apart(both @ both.T, queries))
  ps = np.array([one.p for one in found])
  assert np.mean(ps <= 0.1) < 0.17 and abs(np.mean([one.distance for one in found])) < 0.1


def test_the_order_of_the_pool_changes_nothing(monkeypatch):
  monkeypatch.setattr(hybrid, "_PAIRS", 30)
  monkeypatch.setattr(whitening, "MOST_ROWS", 40)
  pool, asked, order = pools(), queries(1, 6), np.random.default_rng(1).permutation(80)
  ids, counted = [f"id{row}" for row in range(80)], np.ones(80, bool)
  here = Found(hybrid.HybridMetric.fit(*pool, ids, counted), asked)
  mixed = [part[order] for part in pool]
  there = Found(hybrid.HybridMetric.fit(*mixed, [ids[row] for row in order], counted), asked)
  np.testing.assert_allclose(there.similarity, here.similarity[:, order], atol=1e-6)
  np.testing.assert_allclose(there.apart.distance, here.apart.distance, atol=1e-6)


def test_gradients_that_are_not_finite_are_refused():
  pool, asked = pools(), queries(1, 6)
  asked[0][2, 3] = np.inf
  with pytest.raises(UserError, match="1 evaluation example are not finite"):
    found_for(asked, pool)


def test_a_pool_of_one_text_tells_nothing_apart():
  pool = tuple(np.repeat(part[:1], 3, axis=0) for part in pools())
  found = found_for(queries(1, 4), pool)
  assert np.ptp(found.similarity, axis=1).max() < 1e-9 and not coreset.apart_enough(found.apart)


def test_a_query_speaks_with_those_most_like_it():
  similarity = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.2]])
  among = np.array([[1.0, 0.1, 0.9], [0.1, 0.2, 0.3], [0.9, 0.3, 1.0]])  # the second is like none, itself least of all
  found = hybrid.smoothed(similarity, among, 2)
  np.testing.assert_allclose(found, [[0.75, 0.1], [0.25, 0.6], [0.75, 0.1]])
  np.testing.assert_allclose(hybrid.smoothed(similarity, among, 1), similarity)
  np.testing.assert_allclose(hybrid.smoothed(similarity, among, 9), np.tile(similarity.mean(axis=0), (3, 1)))
