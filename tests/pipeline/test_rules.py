"""Rules that train or look at single layers, on a small random model: each against the same by another road."""

import dataclasses

import numpy as np
import pytest
from tiny import CONFIG, open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

from in2core_jax.pipeline import sequential
from in2core_jax.pipeline.loss_drop import loss_drop
from in2core_jax.pipeline.metagradient import metagradient
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.projection import Projection
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.pipeline.session import choose
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import Budget, inputs_of
from in2core_jax.selection.whitening import WhitenedMetric

pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rules")
  return run_settings(folder, dataclasses.replace(CONFIG, num_layers=3), sketch_size=4, epochs=2.0, batch_size=4)


@pytest.fixture(scope="module")
def session(settings):
  return open_session(settings)


def test_a_loss_drop_is_that_of_a_training_on_the_queries(session, settings):
  queries, train = np.arange(0, 10, 2), session.splits["train"]
  found = loss_drop(session, settings, choose(session, session.model.params, "last:2", "all"), queries)
  parts = session.splits.with_parts(train=session.splits["eval"].take(queries), eval=train)
  judge = Retrainer(session.with_splits(parts), settings.replace(trainable_layers="last:2"), [np.arange(5)])
  trained = judge.train(np.arange(5), settings.seed, "queries")
  before, after = judge.losses(judge.sub, "eval"), judge.losses(trained.sub, "eval")
  assert found == pytest.approx((before - after) / before, rel=1e-4, abs=1e-5) and np.ptp(found) > 0
  made = ChoiceInputs(session, settings, session.model.params)
  inputs = inputs_of(train, **made.of({"loss_drop"}, queries))
  by_id = made._first_queries[np.isin(made._first_queries, queries)]
  found = loss_drop(session, settings, choose(session, session.model.params, "last:2", "all"), by_id)
  chosen = coreset.select_rows("loss_drop", inputs, Budget(num_examples=5))
  assert inputs.drop.tolist() == found.tolist() and set(chosen) == set(np.argsort(-found)[:5])


def test_ranks_of_layers_are_those_of_projections_of_single_layers(session, settings):
  both = Projection(session, settings.replace(layers="1,2"), session.model.params, 0)
  features, columns = both.features("train"), both.columns_of_layers()
  assert sorted(np.concatenate(columns)) == list(range(features.shape[1]))
  for layer, own in zip((1, 2), columns, strict=True):
    alone = Projection(session, settings.replace(layers=str(layer)), session.model.params, 0).features("train")
    np.testing.assert_allclose(features[:, own], alone, rtol=1e-4, atol=1e-6)
  made = ChoiceInputs(session, settings.replace(layers="1,2"), session.model.params)
  ranks = made.of({"layer_ranks"})["similarities"]["layer_ranks"]
  assert ranks.shape == (len(made._first_queries), len(features)) and 0 < ranks.min() < ranks.max() <= 1
  target, metric = both.features("eval")[made._first_queries][:, columns[0]], None
  metric = WhitenedMetric.fit(features[:, columns[0]], ids=session.splits["train"].ids, counted=made._counts)
  alone = made._of_layer(columns[0], made._first_queries)
  np.testing.assert_allclose(alone, metric.cosines(target, features[:, columns[0]]), rtol=1e-6)


def test_rounds_choose_on_by_what_the_choice_so_far_has_taught(session, settings):
  train = session.splits["train"]
  inputs = inputs_of(train, **ChoiceInputs(session, settings, session.model.params).of({"matching"}))
  at_once = coreset.select_rows("matching", inputs, Budget(num_examples=12))
  assert sequential.choose(session, settings, "matching", 12, 1).tolist() == sorted(at_once)
  half = sequential.choose(session, settings, "matching", 6, 1)
  found = sequential.choose(session, settings, "matching", 12, 2)
  assert len(set(found)) == 12 and set(half) <= set(found) and set(found) != set(at_once)
  assert sequential.choose(session, settings, "matching", 12, 2).tolist() == found.tolist()


def test_without_those_of_highest_metagradient_the_evaluation_loss_ends_higher(session, settings):
  found = metagradient(session, settings)
  assert np.all(found[session.splits["train"].num_response_tokens == 0] == 0) and np.isfinite(found).all()
  order, judge = np.argsort(-found), Retrainer(session, settings, [np.arange(len(found))])
  after = {
    name: judge.losses(judge.train(np.sort(kept), settings.seed, name).sub, "eval").mean()
    for name, kept in (("without the best", order[8:]), ("without the worst", order[:-8]))
  }
  assert after["without the best"] > after["without the worst"]
