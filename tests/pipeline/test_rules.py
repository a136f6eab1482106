"""Rules that train or look at single layers, on a small random model: each against the same by another road."""

import dataclasses
import json
import logging
import pathlib

import numpy as np
import pytest
import tiny
from tiny import CONFIG, open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

from experiments.study import study
from experiments.study.settings import StudySettings
from in2core_jax.errors import UserError
from in2core_jax.pipeline import compared, finetune, select, sequential
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.along_training import along, warm_up
from in2core_jax.pipeline.loss_drop import loss_drop
from in2core_jax.pipeline.metagradient import metagradient
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.projection import Projection
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.pipeline.session import choose
from in2core_jax.runs import run_folder
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


def test_features_along_a_warm_up_are_those_of_its_checkpoints_beside_each_other(session, settings):
  (first, _), (share, last) = warm_up(session, settings, 2)
  assert first + share == pytest.approx(1) and 0 < share < first  # the learning rate falls
  more, train = along(session, settings, 2), session.splits["train"]
  alone = ChoiceInputs(session, settings, last, stored=False).of({"matching"})
  width = alone["features"].shape[1]
  for name in ("features", "target"):
    np.testing.assert_allclose(more[name][:, width:], np.sqrt(share) * alone[name], rtol=1e-3, atol=1e-5)
  base = ChoiceInputs(session, settings, session.model.params).of({"matching"})["features"]
  assert more["features"].shape[1] == 2 * width and not np.allclose(alone["features"], base, rtol=0.1)
  end = along(session, settings, 1)
  np.testing.assert_allclose(end["features"], alone["features"], rtol=1e-3, atol=1e-5)
  assert len(coreset.select_rows("matching", inputs_of(train, **more), Budget(num_examples=6))) == 6


def test_a_study_trains_by_the_weights_that_a_rule_gives(session, settings, monkeypatch):
  s = StudySettings.of(settings, run_dir=f"{settings.run_dir}-study", budget=6, seeds="0", fixed_seeds="0", steps=2)
  s = s.replace(variants="influence distillation, base model", policy="auto")
  trained, train = [], Retrainer.train
  monkeypatch.setattr(Retrainer, "train", lambda self, *given: trained.append(given) or train(self, *given))
  text = (pathlib.Path(study.run(s, session)) / "study.md").read_text()
  assert "weights of the losses" in text
  (weighted,) = (given for given in trained if given[4] is not None)
  assert len(weighted[0]) == 6 and weighted[4].mean() == pytest.approx(1) and weighted[4].std() > 0.01


def test_selected_weights_are_kept_and_trained_by(session, settings, caplog):
  s = settings.replace(run_dir=f"{settings.run_dir}-select", policy="distillation", budget=8, solver="identity")
  folder = select.run(s, session)
  lines = [json.loads(line) for line in pathlib.Path(folder, "coreset.jsonl").read_text("utf-8").splitlines()]
  columns = run_folder.RunDir.load(folder).read_parquet("scores.parquet")
  weights = columns["weight"][columns["selected"]]
  assert [line.get("weight", 1) for line in lines] == pytest.approx(weights, rel=1e-5)
  assert weights.mean() == pytest.approx(1) and np.all(columns["weight"][~columns["selected"]] == 0)
  assert "how much each example's loss counts" in pathlib.Path(folder, "train_with.md").read_text()
  name, found = compared.read_selection(folder, session)
  assert name == "distillation" and found["weight"].tolist() == columns["weight"].tolist()
  own = settings.replace(train_data=f"jsonl:{folder}/coreset.jsonl", eval_data="chatterbot", steps=2, train_limit=0)
  own = own.replace(run_dir=f"{settings.run_dir}-weighted")
  with caplog.at_level(logging.INFO):
    finetune.run(own, sessions.open_session(own, tiny.one_device(), weighted=True))
  assert "training examples have weights" in caplog.text
  with pytest.raises(UserError, match="which only finetune follows"):
    open_session(own)


def test_without_those_of_highest_metagradient_the_evaluation_loss_ends_higher(session, settings):
  found = metagradient(session, settings)
  assert np.all(found[session.splits["train"].num_response_tokens == 0] == 0) and np.isfinite(found).all()
  order, judge = np.argsort(-found), Retrainer(session, settings, [np.arange(len(found))])
  after = {
    name: judge.losses(judge.train(np.sort(kept), settings.seed, name).sub, "eval").mean()
    for name, kept in (("without the best", order[8:]), ("without the worst", order[:-8]))
  }
  assert after["without the best"] > after["without the worst"]
