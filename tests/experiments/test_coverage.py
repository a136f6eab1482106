"""Coverage: aggregates and bootstrap against numbers worked out, folds, and the experiment on a small random model."""

import csv
import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest
from tiny import CONFIG, open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

from experiments.coverage import coverage as experiment
from experiments.coverage import report
from experiments.coverage.settings import CoverageSettings
from in2core_jax.errors import UserError
from in2core_jax.evaluation import coverage, statistics
from in2core_jax.influence import normalize
from in2core_jax.params import subtree
from in2core_jax.pipeline import hidden_states, scoring
from in2core_jax.pipeline import session as sessions
from in2core_jax.selection.whitening import WhitenedMetric


def test_received_influence_is_its_definition():
  found = coverage.received(np.array([[1.0, -3.0, 0.0, 4.0], [-1.0, -1.0, -2.0, 0.0]]))
  np.testing.assert_allclose(found["mean"], [0.5, -1.0])
  np.testing.assert_allclose(found["maximum"], [4.0, 0.0])
  np.testing.assert_allclose(found["positive mass"], [1.25, 0.0])
  with pytest.raises(UserError, match="one or more"):
    coverage.received(np.zeros((3, 0)))
  with pytest.raises(UserError, match="not finite"):
    coverage.received(np.array([[np.nan]]))


def test_relative_maximum_is_its_definition():
  scores = np.array([[1.0, 3.0], [0.5, -1.0], [-1.0, -2.0], [0.0, 0.0]])
  among = np.array([[9.0, 9.0, 1.0, 0.0], [9.0, 9.0, 1.5, 0.1], [0.0, 1.0, 9.0, 0.5], [0.0, 0.0, 0.0, 9.0]])
  copies = np.eye(4, dtype=bool)
  copies[0, 1] = copies[1, 0] = True
  found = coverage.relative_maximum(scores, among, copies)
  # A point's copies say nothing of what others would give it; (0 - 0) / 0 counts as neither.
  np.testing.assert_allclose(found, [(3 - 1) / 4, (0.5 - 1.5) / 2, (-1 - 1) / 2, 0])
  np.testing.assert_allclose(coverage.relative_maximum(7 * scores, 7 * among, copies), found)
  with pytest.raises(UserError, match="test point 0 has no other"):
    coverage.relative_maximum(scores, among, np.ones((4, 4), bool))


def test_folds_are_whole_topics_each_once():
  topics = ["d", "a", "c", "b", "a", "e", "f"]
  folds = coverage.deal_topics(topics, 2, 3, seed=0)
  assert sorted(name for fold in folds for name in fold) == list("abcdef")
  assert folds == coverage.deal_topics(topics[::-1], 2, 3, seed=0)
  assert any(coverage.deal_topics(topics, 2, 3, seed=seed) != folds for seed in range(1, 4))
  for size, count in ((2, 4), (6, 1)):
    with pytest.raises(UserError, match="topics with training examples and test points: a, b, c, d, e, f"):
      coverage.deal_topics(topics, size, count, seed=0)
  with pytest.raises(UserError, match="1 fold of 0 held-out topics: both must be at least 1"):
    coverage.deal_topics(topics, 0, 1, seed=0)
  with pytest.raises(UserError, match="the data has none: give every record a column topic"):
    coverage.deal_topics([], 3, 1, seed=0)


def test_area_is_high_where_low_signals_are_uncovered():
  uncovered = np.array([True, True, False, False])
  assert coverage.area([0.0, 1.0, 2.0, 3.0], uncovered) == 1
  assert coverage.area([3.0, 1.0, 2.0, 3.0], uncovered) == 2.5 / 4  # 3 ties one, 1 is below both


def test_points_are_redrawn_with_all_their_observations():
  rng = np.random.default_rng(0)
  effect = rng.standard_normal(60)
  once = coverage.by_point(lambda rows: effect[rows].mean(), np.arange(60))
  copied, points = np.repeat(effect, 4), np.repeat(np.arange(60), 4)
  four_times = coverage.by_point(lambda rows: copied[rows].mean(), points)
  # Copies of the same points say nothing new; taken as independent they would halve the interval.
  assert four_times.high - four_times.low == pytest.approx(once.high - once.low, rel=1e-9)
  assert once.count == four_times.count == 60
  width = 2 * 1.96 * effect.std(ddof=1) / np.sqrt(60)
  assert once.high - once.low == pytest.approx(width, rel=0.15)


def test_difference_of_areas_tells_a_better_signal():
  rng = np.random.default_rng(1)
  uncovered = rng.random(200) < 0.3
  points = np.arange(200) // 2
  good = -2.0 * uncovered + rng.standard_normal(200)
  found = coverage.area_difference(good, rng.standard_normal(200), uncovered, points, draws=300)
  assert found.low > 0.1 and found.low < found.mean < found.high
  assert coverage.area_difference(good, good, uncovered, points, draws=20).high == 0


def test_copies_are_one_point_as_far_as_they_are_read():
  tokens = tuple(np.array(row, np.int32) for row in ([1, 2], [3], [1, 2], [1, 2]))
  masks = tuple(np.array(row, bool) for row in ([0, 1], [1], [0, 1], [1, 1]))
  points = types.SimpleNamespace(tokens=tokens, response_mask=masks)
  assert experiment.distinct_points(points).tolist() == [0, 1, 0, 3]
  one = types.SimpleNamespace(topics=(), signals={"a": np.arange(4.0)}, after=np.zeros(4), before=np.ones(4))
  pooled = experiment.pool([one, one], ["a"] * 4, np.array([0, 2, 3]))
  assert pooled.points.tolist() == pooled.signals["a"].tolist() == [0, 2, 3] * 2


def test_topics_are_told_apart_from_what_is_covered_in_their_fold():
  signals = {"own": np.array([0.0, 1.0, 2.0, 3.0, 9.0])} | dict.fromkeys(report.YARDSTICKS, np.ones(5))
  one = types.SimpleNamespace(topics=("a", "b"), signals=signals, before=np.ones(5), after=np.array([1, 1, 0, 0, 0]))
  # Point 4 is not judged, and those of b are no comparison for a.
  rows = experiment.by_topic([one], ["a", "c", "b", "c", "c"], np.arange(4), "own")
  found = [(row["topic"], row["test points"], row["AUC, own"], row["AUC, loss drop"]) for row in rows]
  assert found == [("a", 1, 1.0, 0.75), ("b", 1, 0.5, 0.25)]
  assert {row["AUC, embedding, maximum"] for row in rows} == {0.5}


def test_interval_of_an_area_redraws_points():
  rng = np.random.default_rng(2)
  uncovered = rng.random(300) < 0.4
  signal = rng.standard_normal(300) - uncovered
  found = coverage.area_interval(signal, uncovered, np.arange(300), draws=400)
  exact = statistics.roc_auc(-signal, uncovered)
  assert found.mean == pytest.approx(exact.mean) and found.low == pytest.approx(exact.low, abs=0.02)
  copied = coverage.area_interval(np.tile(signal, 3), np.tile(uncovered, 3), np.tile(np.arange(300), 3), draws=400)
  assert copied.high - copied.low == pytest.approx(found.high - found.low, rel=1e-9)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp("coverage")
  return run_settings(
    folder,
    dataclasses.replace(CONFIG, num_layers=2),
    kind=CoverageSettings,
    train_data="chatterbot:food,sports,movies,humor",
    split="0.5,0.3,0.2",
    test_limit=6,
    trainable_layers="last:1",
    layers="last:1",
    solver="identity",
    steps=3,
    query_block=64,
    hold_out_topics="1",
    folds=2,
  )


@pytest.fixture(scope="module")
def session(settings):
  return open_session(settings)


@pytest.fixture(scope="module")
def finished(settings, session):
  """The folder of a finished run."""
  return pathlib.Path(experiment.run(settings, session))


@pytest.mark.slow
@pytest.mark.real
def test_the_tables_hold_every_signal(finished, session):
  result = json.loads((finished / "coverage.json").read_text())
  with open(finished / "coverage.csv") as file:
    rows = {row["signal"]: row for row in csv.DictReader(file)}
  signals = {
    f"{name}{kind}, {at}"
    for name in ("mean", "maximum", "positive mass", "relative maximum")
    for kind in ("", " cosine")
    for at in ("base", "trained")
  }
  assert signals < set(rows) and {"embedding, maximum", "BM25, relative maximum", "loss before"} < set(rows)
  assert all(0 <= float(row["AUC"]) <= 1 for row in rows.values())
  folds = result["folds"]
  assert len(folds) == 2 and not set(folds[0]["topics"]) & set(folds[1]["topics"])
  train, evals = session.splits["train"], session.splits["eval"]
  for fold in folds:
    assert fold["training_examples"] == sum(topic not in fold["topics"] for topic in train.topics)
    assert fold["uncovered"] == sum(topic in fold["topics"] for topic in evals.topics) > 0
  assert result["observations"] == 2 * int((evals.num_response_tokens > 0).sum())
  assert [row["topic"] for row in result["by_topic"]] == sorted(topic for fold in folds for topic in fold["topics"])
  for name in ("coverage.md", "coverage.tex", "points.csv", "plots/coverage.svg", "plots/coverage.png"):
    assert (finished / name).stat().st_size > 300, name
  text = (finished / "coverage.md").read_text()
  assert evals.records[0].messages[0]["content"][:15] in (finished / "points.csv").read_text()
  assert text.rstrip().endswith(result["sentence"])


@pytest.mark.slow
@pytest.mark.real
def test_a_fold_trains_and_scores_without_its_topics(settings, session, finished):
  rows = np.flatnonzero(np.array(session.splits["train"].topics) != "food")
  fold = session.with_train(rows)
  assert "food" not in fold.splits["train"].topics and len(fold.splits["train"]) == len(rows)
  assert fold.splits["eval"] is session.splits["eval"]
  chosen = sessions.choose(fold, fold.model.params, settings.layers, settings.modules)
  both = experiment.measured(fold, settings, chosen, scoring.NOTHING_KEPT)
  found, among = both["train"], both["eval"]
  everything = sessions.choose(session, session.model.params, "last:1", "all")
  whole = experiment.measured(session, settings, everything, scoring.NOTHING_KEPT)["train"]
  np.testing.assert_allclose(among.scores, among.scores.T, rtol=1e-4, atol=1e-5 * np.abs(among.scores).max())
  np.testing.assert_allclose(np.diag(normalize.cosine(among))[among.norms > 0], 1, atol=1e-4)
  np.testing.assert_allclose(found.scores, whole.scores[:, rows], rtol=1e-4, atol=1e-5 * np.abs(whole.scores).max())
  wanted = scoring.query_scores(fold, settings, chosen, scoring.Work(experiment.run_folder.RunDir.load(str(finished))))
  np.testing.assert_allclose(found.scores, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
  np.testing.assert_allclose(normalize.cosine(found).max(), 1, atol=1e-3 if np.isclose(found.norms.min(), 0) else 1)


@pytest.mark.slow
@pytest.mark.real
def test_projected_gradients_give_nearly_the_same_tables(settings, session):
  both = {}
  for path in ("auto", "projected"):
    s = settings.replace(score_path=path, sketch_size=32)
    both[path] = experiment.tables_of(session, s, session.model.params, scoring.NOTHING_KEPT)
  size = (len(session.splits["eval"]), sum(map(len, (session.splits["train"], session.splits["eval"]))))
  assert both["auto"].shape == (2, *size) and both["projected"].shape == (3, *size)
  for exact, sketched in zip(both["auto"], both["projected"][:2], strict=True):
    assert np.corrcoef(exact.ravel(), sketched.ravel())[0, 1] > 0.97


def test_the_whitened_table_is_of_the_training_sets_metric():
  rng = np.random.default_rng(0)
  train, points = rng.normal(size=(30, 9)) + 2, rng.normal(size=(5, 9)) + 2
  scores, cosines, whitened = experiment.tables_from(train, points, [f"{row}" for row in range(30)])
  every = np.concatenate([train, points])
  np.testing.assert_allclose(scores, points @ every.T)
  np.testing.assert_allclose(np.diag(cosines[:, 30:]), 1)
  np.testing.assert_allclose(whitened, WhitenedMetric.fit(train).cosines(points, every))
  assert np.abs(whitened).mean() < np.abs(cosines).mean()  # what all share is gone


def test_hidden_states_of_one_trained_model_stay(session, monkeypatch):
  own = session.with_splits(session.splits).hidden
  monkeypatch.setattr(hidden_states, "_below_hash", lambda params, *_: params)
  monkeypatch.setattr(hidden_states.hidden_cache, "compute_boundary", lambda job, *_: [job])
  chosen = subtree.Subtree((1,), 2, ())
  made = {}
  for params in ("base", "first", "second"):
    for part in ("train", "eval"):
      made[part, params] = own.below(part, chosen, params)
  assert own.below("train", chosen, "base") is made["train", "base"]
  assert own.below("eval", chosen, "second") is made["eval", "second"]
  assert sorted(key[-1] for key in own.kept) == ["base", "base", "second", "second"]


@pytest.mark.slow
@pytest.mark.real
def test_finished_folds_are_kept(settings, session, finished, monkeypatch):
  before = {name: (finished / name).read_bytes() for name in ("coverage.md", "coverage.csv", "points.csv")}
  monkeypatch.setattr(experiment, "Retrainer", lambda *_: pytest.fail("trained again"))
  monkeypatch.setattr(experiment, "measured", lambda *_: pytest.fail("scored again"))
  experiment.run(settings, session)
  assert before == {name: (finished / name).read_bytes() for name in before}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"hold_out_topics": "opera"}, "no test point and training example of 'opera'"),
    ({"folds": 9}, "need 9 topics"),
    ({"policy": "longest"}, "--policy=longest: coverage .* leave it out"),
    ({"coverage_signal": "vibes"}, "is none of mean, base"),
    ({"solver": "exact", "layers": "all"}, "--solver=exact: the subtree has 4,672 parameters, more than"),
    ({"solver": "ekfac", "curvature": "hessian"}, "--solver=ekfac with --curvature=hessian"),
    ({"layers": "last:9"}, "--layers=last:9: 9 is not between 1 and 2"),
    ({"score_path": "projected", "solver": "lissa"}, "coverage has no inverse of projected gradients"),
  ],
)
def test_what_means_nothing_is_refused(settings, session, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    experiment.run(settings.replace(run_dir=str(tmp_path / "run"), **changes), session)
  assert not (tmp_path / "run").exists()


def test_points_of_topics_that_are_in_no_training_set_are_not_judged():
  """They would count as covered in every fold, though nothing of their topic is ever trained on."""
  part = lambda topics, tokens: types.SimpleNamespace(topics=topics, num_response_tokens=np.array(tokens))  # noqa: E731
  parts = {"train": part(["a", "b", "b"], [1, 1, 1]), "eval": part(["a", "c", "b", "b"], [2, 2, 0, 3])}
  found = experiment.judged_points(types.SimpleNamespace(splits=parts))
  assert found.tolist() == [0, 3]


def test_pooled_statistics_are_those_of_the_definition():
  signal, loss = np.array([3.0, 1.0, 2.0, 0.0]), np.array([0.1, 0.9, 0.4, 2.0])
  found = experiment.correlation(signal, loss, np.arange(4))
  assert found.mean == statistics.spearman(signal, loss) == -1
