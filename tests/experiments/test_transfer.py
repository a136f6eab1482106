"""One model selects, another is trained, on small random models; truncated models."""

import dataclasses
import json
import pathlib
import types

import jax
import numpy as np
import pytest
from tiny import CONFIG, open_session, quick_compile, run_settings, write_model  # noqa: F401, an autouse fixture

from experiments.transfer import report, scorers, transfer
from experiments.transfer.settings import TransferSettings
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.model import decoder, weights
from in2core_jax.params import subtree
from in2core_jax.pipeline import scoring
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.runs import run_folder
from in2core_jax.selection import matching
from in2core_jax.selection.inputs import inputs_of


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp("transfer")
  spec = f"hf:{folder / 'model'}"
  return run_settings(
    folder,
    dataclasses.replace(CONFIG, num_layers=2),
    kind=TransferSettings,
    train_limit=24,
    eval_limit=6,
    test_limit=6,
    trainable_layers="last:1",
    layers="last:1",
    steps=3,
    solver="identity",
    sketch_size=4,
    # The whole of it under another name, and half of it.
    score_models=f"truncated:{spec}:2;truncated:{spec}:1",
  )


@pytest.fixture(scope="module")
def session(settings):
  return open_session(settings)


@pytest.fixture(scope="module")
def folder(settings, session):
  return pathlib.Path(transfer.run(settings, session))


@pytest.mark.slow
@pytest.mark.real
def test_the_same_model_by_another_name_chooses_the_same(settings, folder):
  result = json.loads((folder / "transfer.json").read_text())
  own, same, half = result["table"]
  assert own["scores by"] == settings.model and [row["layers"] for row in (own, same, half)] == [
    *["last:1 of 2", "last:1 of 2", "last:1 of 1"]
  ]
  for name in ("Spearman", "top-half overlap", "overlap of the choices", "ratio to own"):
    assert same[name] == pytest.approx(1, abs=1e-9)
  assert same["perplexity"] == own["perplexity"] and all(same[name] == own[name] for name in report._LOSSES)
  assert half["Spearman"] < 0.99 and half["parameters"] < own["parameters"]
  assert all(half[name] != own[name] for name in report._LOSSES)
  policies = {row["policy"]: (row["seeds"], row["examples"]) for row in result["retrained"]}
  chosen = {f"chosen by {row['scores by']}": (1, 12) for row in (own, same, half)}
  yardsticks = {"full": (1, 24), "longest": (1, 12)}
  yardsticks |= dict.fromkeys(("random", scorers.AS_LONG, scorers.COPIES_LAST), (2, 12))
  assert policies == yardsticks | chosen
  tokens = {row["policy"]: row["response_tokens"] for row in result["retrained"]}
  mine = tokens[f"chosen by {own['scores by']}"]
  assert abs(tokens[scorers.AS_LONG] - mine) < abs(tokens["longest"] - mine)
  assert tokens["longest"] == max(count for name, count in tokens.items() if name != "full")
  text = (folder / "transfer.md").read_text()
  assert "perplexity not distinguishable from that of the model's own choice (" in text and "plots/transfer.svg" in text
  assert text.count(" comparisons by token or by example, each at 95%") == 1 and "Measured on these 6 test" in text
  assert len([line for line in text.splitlines() if f" times {scorers.AS_LONG}'s, 95% interval" in line]) == 3
  names = ["transfer.csv", "transfer.tex", "retrained.csv", "retrained.tex", "plots/transfer.png"]
  assert all((folder / name).stat().st_size > 100 for name in names)


def test_without_copies_there_are_no_random_sets_without_copies(settings, session, tmp_path, monkeypatch):
  monkeypatch.setattr(transfer, "distinct_points", lambda points: np.arange(len(points.ids)))
  task = transfer.Transfer(session, settings, run_folder.RunDir.open(str(tmp_path / "run"), {}))
  names = [candidate.policy for candidate in task.candidates({"hf:x": np.arange(12)})]
  assert names == ["full", "random", "random", *[scorers.AS_LONG] * 2, scorers.LONGEST, "chosen by hf:x"]
  row = lambda policy, seed: statistics.RetrainRow(policy, seed, 2, 9, 4, 1, 4, 2.0, 2.0)  # noqa: E731
  (line,) = report.beside([row(name, seed) for seed, name in enumerate(names)])
  assert scorers.AS_LONG in line and scorers.COPIES_LAST not in line


@pytest.mark.slow
@pytest.mark.real
def test_scores_are_taken_after_the_fine_tuning(settings, session, folder):
  task = transfer.Transfer(session, settings, run_folder.RunDir.load(str(folder)))
  cell = task.scored(transfer.scorers_of(settings)[0])
  judge = Retrainer(session, settings, [np.arange(24)])
  tuned = judge.train(np.flatnonzero(session.splits["train"].num_response_tokens), 0, "again").sub
  counted = session.splits["eval"].num_response_tokens > 0
  losses, before = (judge.losses(sub, "eval")[counted].mean() for sub in (tuned, judge.sub))
  assert cell["eval loss as given"] == pytest.approx(before, rel=1e-6)
  assert cell["eval loss"] == pytest.approx(losses, rel=1e-6) and losses != pytest.approx(before, rel=1e-5)
  chosen = sessions.choose(session, subtree.merge(tuned, judge.frozen, judge.chosen), "last:1", "all")
  wanted = scoring.score(
    session, settings, chosen, scoring.Work(run_folder.RunDir.open(str(folder) + "-w", {}))
  ).influence
  found = [cell["influence"][example] for example in session.splits["train"].ids]
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
  assert [session.splits["train"].ids[row] for row in task.rows_of(cell["selected"])] == sorted(
    cell["selected"], key=session.splits["train"].ids.index
  )


@pytest.mark.slow
@pytest.mark.real
def test_finished_cells_are_kept_and_other_flags_refused(settings, session, folder, monkeypatch):
  before = (folder / "transfer.md").read_bytes()
  (folder / "transfer.json").unlink()
  with monkeypatch.context() as patch:
    patch.setattr(Retrainer, "train", lambda *_: pytest.fail("a finished training was done again"))
    patch.setattr(transfer, "score", lambda *_: pytest.fail("finished scores were computed again"))
    transfer.run(settings, session)
  assert (folder / "transfer.md").read_bytes() == before and (folder / "transfer.json").exists()
  with pytest.raises(UserError, match="solver is 'identity' there and 'cg' now"):
    transfer.run(settings.replace(solver="cg"), session)
  with pytest.raises(UserError, match="leave it out"):
    transfer.run(settings.replace(checkpoint=str(folder)), session)
  with pytest.raises(UserError, match="nothing is fine-tuned with --score_at=base"):
    transfer.run(settings.replace(score_at="base", model_rates="1e-3"), session)
  with pytest.raises(UserError, match="--score_path=projected: transfer .* has no store"):
    transfer.run(settings.replace(score_path="projected"), session)


@pytest.mark.slow
@pytest.mark.real
def test_matching_selects_by_each_models_own_gradients(settings, session, tmp_path):
  matching = settings.replace(policy="matching", score_at="base", run_dir=str(tmp_path / "run"))
  found = json.loads((pathlib.Path(transfer.run(matching, session)) / "transfer.json").read_text())["table"]
  assert found[1]["overlap of the choices"] == 1 and found[1]["Spearman"] == pytest.approx(1)
  assert 0 <= found[2]["overlap of the choices"] < 1
  assert not (tmp_path / "projected").exists()


@pytest.mark.real
def test_other_weights_under_the_same_word_are_scored_again(settings, session, tmp_path, monkeypatch):
  folders = []
  monkeypatch.setattr(transfer.Transfer, "score_anew", lambda *given: folders.append(given[-1]) or {"of": len(folders)})
  task = transfer.Transfer(session, settings, run_folder.RunDir.open(str(tmp_path / "run"), {}))
  scorer = transfer.Scorer(write_model(tmp_path / "other", CONFIG), "last:1", "last:1", 1e-2)
  assert [task.scored(scorer)["of"] for _ in range(2)] == [1, 1]
  config, params, tokenizer, _ = weights.load_model(scorer.model)
  weights.save_hf_dir(tmp_path / "other", config, jax.tree.map(lambda leaf: leaf * 1.5, params), tokenizer)
  assert task.scored(scorer)["of"] == 2
  assert len(set(folders)) == 2  # what the first left unfinished is not the second's


def test_a_scorer_weighs_its_gradients_by_its_own_tokens():
  """An example whose response the scorer cuts off can be chosen; the pool's mean is that of the scorer's tokens."""
  ids = ["a", "b", "c"]
  part = lambda *responses: types.SimpleNamespace(  # noqa: E731
    num_tokens=np.array(responses) + 5,
    num_response_tokens=np.array(responses),
    topics=[""] * 3,
    ids=ids,
    copies=np.arange(3),
  )
  ours, theirs = part(4, 4, 4), part(9, 3, 0)
  queries = {"target": np.array([[1.0, 0.0], [0.9, 0.3], [1.1, -0.2]]), "query_tokens": np.array([2, 1, 1])}
  queries |= {"features": np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), "target_mean": "tokens", "shrink": True}
  found = transfer.inputs_for(ours, theirs, scores=None, loss=None, **queries)
  assert sorted(found.pool()) == [0, 1, 2]
  wanted = matching.shrunk_target(queries["target"], queries["features"], np.array([2.0, 1, 1]), np.array([9, 3, 0]))
  np.testing.assert_allclose(found.aim.target, wanted.target)
  plain = inputs_of(ours, **queries).aim.target
  assert not np.allclose(found.aim.target, plain)


def test_scorers_are_read_with_their_layers():
  s = TransferSettings(model="smollm2", layers="last:8", trainable_layers="last:2", score_models="hf:x;smollm2")
  assert transfer.scorers_of(s) == [
    transfer.Scorer("smollm2", "last:8", "last:2", 1e-4),
    transfer.Scorer("hf:x", "last:8", "last:2", 1e-4),
  ]
  changes = {"score_models": "hf:x", "model_layers": "0,1", "model_trains": "all", "model_rates": "3e-5"}
  named = transfer.scorers_of(s.replace(**changes))
  assert named == [transfer.Scorer("smollm2", "last:8", "last:2", 1e-4), transfer.Scorer("hf:x", "0,1", "all", 3e-5)]
  for bad in ("fast", "0", "nan"):
    with pytest.raises(UserError, match=f"^model_rates={bad}: '{bad}' is wrong in this list of numbers, each above 0"):
      transfer.scorers_of(s.replace(model_rates=bad))
  with pytest.raises(UserError, match="3 words for 2 models"):
    transfer.scorers_of(s.replace(model_layers="all;all;all"))
  with pytest.raises(UserError, match="given twice"):
    transfer.scorers_of(s.replace(score_models="hf:x;hf:x"))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"score_models": "foo"}, "^--score_models, 'foo': --model=foo is not understood; use smollm2"),
    ({"score_models": "hf:nowhere"}, "^--score_models, 'hf:nowhere': .*nowhere"),
    ({"model_layers": "last:1;last:2"}, "^--score_models, 'truncated:.*:1': --model_layers=last:2: 2 is not between"),
    ({"model_trains": "last:1;last:2"}, "^--score_models, 'truncated:.*:1': --model_trains=last:2: 2 is not between"),
    ({"layers": "last:9", "model_layers": "last:1"}, "^--layers=last:9: 9 is not between 1 and 2"),
    ({"solver": "exact", "layers": "all"}, "^--solver=exact: the subtree has 4,672 parameters"),
    ({"fractions": "0.1,0.5"}, "^--fractions=0.1,0.5: transfer .* one budget .*; leave it out"),
    ({"budget": 99}, "budget=99 is more than the 24 examples"),
  ],
)
def test_what_a_later_model_cannot_do_is_refused_before_the_first_training(
  settings, session, tmp_path, monkeypatch, changes, words
):
  monkeypatch.setattr(Retrainer, "train", lambda *_: pytest.fail("trained for what cannot be scored"))
  with pytest.raises(UserError, match=words):
    transfer.run(settings.replace(run_dir=str(tmp_path / "run"), **changes), session)
  assert not (tmp_path / "run").exists()


def test_sentences_follow_the_intervals():
  row = {"scores by": "a", "Spearman": 0.5, "ratio to own": 1.1, "ratio low": 1.01, "ratio high": 1.2}
  row |= {"ratio by example to own": 1.1, "ratio by example low": 0.9, "ratio by example high": 1.3}
  row |= {"overlap of the choices": 0.7, "fine-tuned": True, "learning rate": 1e-3}
  row |= dict(zip(report._LOSSES, (4.0, 3.0), strict=True))
  said = lambda **changes: report.sentences([row, row | changes], 0.5)  # noqa: E731
  assert "by token perplexity above that" in said()[0] and len(said()) == 1
  assert "by example perplexity not distinguishable from that" in said()[0]
  assert "shares 70% with the model's own, 50% by chance; Spearman of the scores 0.50)" in said()[0]
  assert "Spearman" not in report.sentences([row, row], 0.5, by_scores=False)[0]
  assert "perplexity below that" in said(**{"ratio low": 0.9, "ratio high": 0.99})[0]
  assert "not distinguishable" in said(**{"ratio low": 0.9})[0]
  assert "one training each" in said(**{"ratio low": np.nan, "ratio high": np.nan})[0]
  worse = {report._LOSSES[1]: 4.1}
  assert "evaluation loss of a (4.000 before, 4.100 after): overfitted or diverged" in said(**worse)[1]
  assert len(said(**worse, **{"fine-tuned": False})) == 1


# ---- truncated models ----------------------------------------------------------------


def test_a_truncated_model_is_the_first_layers(settings):
  config, params, _, digest = weights.load_model(settings.model)
  less, cut, tokenizer, other = weights.load_model(f"truncated:{settings.model}:1")
  assert (less.num_layers, less.hidden_size) == (1, config.hidden_size) and other != digest
  assert other == weights.load_model(f"truncated:{settings.model}:1")[3]
  assert other != weights.load_model(f"truncated:{settings.model}:2")[3] != digest
  for whole, part in zip(jax.tree.leaves(params["layers"]), jax.tree.leaves(cut["layers"]), strict=True):
    np.testing.assert_array_equal(part, whole[:1])
  np.testing.assert_array_equal(cut["embed"]["embedding"], params["embed"]["embedding"])
  tokens = np.arange(12).reshape(2, 6)
  assert np.isfinite(np.asarray(decoder.logits(less, cut, tokens))).all()
  assert weights.describe_model(f"truncated:{settings.model}:1")[0] == less and len(tokenizer)
  assert less == weights.load_model(f"truncated:truncated:{settings.model}:2:1")[0]


@pytest.mark.parametrize("layers", ["0", "3", "x", ""])
def test_truncated_refuses_layers_that_are_not_there(settings, layers):
  spec = f"truncated:{settings.model}:{layers}"
  for load in (weights.load_model, weights.describe_model):
    with pytest.raises(UserError, match="keep 1 to 2" if layers.isdecimal() else "is not understood"):
      load(spec)
