"""Weights of the sources of evaluation examples: what is read, what is refused, what the mean gradient becomes."""

import dataclasses
import types
from unittest import mock

import jax
import numpy as np
import pytest
from tiny import CONFIG, open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

from in2core_jax.data.records import Record
from in2core_jax.errors import UserError
from in2core_jax.ihvp import solvers
from in2core_jax.pipeline import scoring, target_weights
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.session import choose
from in2core_jax.pipeline.settings import Settings
from in2core_jax.report import facts
from in2core_jax.selection.aggregation import Sources


def session_of(*names):
  records = [Record(str(i), (), "", "{}", f"{name}.jsonl", 1, origin=name) for i, name in enumerate(names)]
  answered = np.array([not name.startswith("mute") for name in names], np.int64)
  return types.SimpleNamespace(splits={"eval": types.SimpleNamespace(records=records, num_response_tokens=answered)})


def test_weights_go_by_the_order_of_the_sources_and_add_up_to_1():
  found = target_weights.sources_of(session_of("b", "a", "b"), Settings(eval_weights="3, 1"))
  assert found.codes.tolist() == [0, 1, 0] and found.shares.tolist() == [0.75, 0.25]
  assert target_weights.sources_of(session_of("a"), Settings()) is None


def test_what_each_source_counts_is_told_with_how_many_examples_share_it():
  rows = target_weights.rows_of(session_of("b", "a", "b"), Settings(eval_weights="3, 1"))
  assert rows == [{"source": "b", "share": 0.75, "examples": 2}, {"source": "a", "share": 0.25, "examples": 1}]
  assert target_weights.in_words(rows) == "b 75.0% (2 examples), a 25.0% (1 example)"
  assert facts.target_rows(types.SimpleNamespace(summary={"eval_sources": rows}))[1]["share"] == "25.0%"
  assert target_weights.rows_of(session_of("a"), Settings()) == []
  assert facts.target_rows(types.SimpleNamespace(summary={})) == []


def test_a_source_without_a_response_is_refused():
  with pytest.raises(UserError, match="^--eval_weights=1,2: no evaluation example of mute has a response"):
    target_weights.check(session_of("b", "mute"), Settings(eval_weights="1,2"), {"auto"})


@pytest.mark.parametrize("given", ["1", "1,2,3", "1,0", "1,-1", "1,x", "1,nan"])
def test_other_than_a_positive_number_for_each_source_is_refused(given):
  with pytest.raises(UserError, match=r"need 2 numbers above 0, .*: b, a$"):
    target_weights.sources_of(session_of("b", "a"), Settings(eval_weights=given))


@pytest.mark.parametrize(
  ("policy", "aggregate", "refused"),
  [
    *[("auto", "auto", False), ("hybrid", "auto", False), ("matching", "auto", False), ("proponents", "auto", False)],
    *[("whitened_cosine", "auto", True), ("whitened_cosine", "mean", False), ("hybrid", "nearest", True)],
    *[("auto", "nearest", True), ("auto", "mean", False), ("random", "auto", False)],
    *[("density", "auto", True), ("loss_drop", "auto", True), ("proponents", "topic_max", True)],
  ],
)
def test_rules_that_would_pass_weights_over_are_refused(policy, aggregate, refused):
  s = Settings(eval_weights="1,2", policy=policy, aggregate=aggregate)
  if not refused:
    assert target_weights.check(session_of("b", "a"), s, {policy}) is None
    return
  with pytest.raises(UserError, match=f"--eval_weights=1,2 with policy {policy}"):
    target_weights.check(session_of("b", "a"), s, {policy})


@pytest.mark.parametrize(("aggregate", "expected"), [("mean", [0.75, 0.25]), ("round_robin", [2, 1])])
def test_whitened_cosines_are_weighed_by_the_sources_of_their_own_rows(monkeypatch, aggregate, expected):
  # Three evaluation examples; the second is a copy of the first, and whitened cosines have no row of it.
  evals = types.SimpleNamespace(num_response_tokens=np.ones(3, np.int64), ids=["0", "1", "2"])
  train = types.SimpleNamespace(ids=["x", "y"])
  session = mock.MagicMock(splits={"eval": evals, "train": train})
  whitened = np.eye(2), ["", ""], Sources(np.array([0, 1]), np.array([0.75, 0.25]))
  monkeypatch.setattr(scoring, "queries", lambda *_: ({"w": np.ones((1, 2))}, ["all"]))
  monkeypatch.setattr(scoring, "solve", lambda _session, _s, _chosen, v, _work: solvers.identity(v))
  monkeypatch.setattr(scoring, "ChoiceInputs", lambda *_: types.SimpleNamespace(whitened_cosines=lambda: whitened))
  s = Settings(policy="proponents", solver="identity", normalize="whitened_cosine", aggregate=aggregate)
  found = scoring.score(session, s.replace(eval_weights="3,1"), mock.MagicMock(), mock.MagicMock())
  assert found.influence.tolist() == expected


@pytest.mark.slow
@pytest.mark.real
def test_the_query_is_the_mean_of_the_sources_means(tmp_path):
  data = "few=chatterbot:trivia+many=chatterbot:ai,emotion,psychology"
  s = run_settings(tmp_path, dataclasses.replace(CONFIG, num_layers=2), train_data="chatterbot", eval_data=data)
  s = s.replace(eval_limit=20, layers="last:1", eval_weights="0.7,0.3", sketch_size=4)
  session = open_session(s)
  chosen = choose(session, session.model.params, "last:1", "all")
  sources = target_weights.sources_of(session, s)
  answered = session.splits["eval"].num_response_tokens > 0
  own = {str(code): np.flatnonzero(answered & (sources.codes == code)) for code in (0, 1)}
  each, _ = scoring.queries(session, s, chosen, groups=own)
  found, names = scoring.queries(session, s, chosen)
  plain, _ = scoring.queries(session, s.replace(eval_weights=""), chosen)
  assert names == ["all"]
  first = next(name for name, rows in own.items() if rows[0] == np.flatnonzero(answered)[0])
  shares = (0.7, 0.3)
  for one, whole, other in zip(*map(jax.tree.leaves, (each, found, plain)), strict=True):
    one = np.asarray(one)
    np.testing.assert_allclose(whole[0], shares[0] * one[0] + shares[1] * one[1], rtol=1e-4, atol=1e-7)
    assert not np.allclose(whole, other, rtol=1e-3)
  more = ChoiceInputs(session, s, session.model.params).of({"matching", "hybrid"})
  assert len(more["target_sources"].codes) == len(more["target"])
  weights = more["similar_sources"].spread(np.ones(len(more["similar_ids"])))
  assert weights[more["similar_sources"].codes == int(first)].sum() == pytest.approx(shares[int(first)])
