"""Many targets in a mixed pool, on a small random model: what is counted, what is judged, what is refused."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest
from tiny import CONFIG, open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

from experiments.study.variants import VARIANTS
from experiments.targets import retraining, targets
from experiments.targets.settings import TargetsSettings
from in2core_jax.data import records
from in2core_jax.errors import UserError
from in2core_jax.pipeline.policy_inputs import ChoiceInputs

RULES = "hybrid, base model; auto, base model; whitened cosine, base model; bm25; rds; matching, base model"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return run_settings(
    tmp_path_factory.mktemp("targets"),
    dataclasses.replace(CONFIG, num_layers=2),
    kind=TargetsSettings,
    train_data="chatterbot:food,sports,movies,humor",
    split="0.5,0.3,0.2",
    train_limit=0,
    eval_limit=0,
    test_limit=0,
    trainable_layers="last:1",
    layers="last:1",
    sketch_size=4,
    steps=3,
    targets="sports; movies, humor",
    target_queries=6,
    target_tests=4,
    variants=RULES,
    retrained="hybrid, base model; bm25",
    fractions="0.2",
    equal="epochs,budget_tokens",
  )


@pytest.fixture(scope="module")
def finished(settings):
  """(folder, session with what the targets need) of a finished run."""
  session = open_session(settings)
  return pathlib.Path(targets.run(settings, session)), targets.with_targets(session, settings)[0]


@pytest.mark.real
def test_recall_is_the_share_of_the_target_in_a_choice_of_its_size(settings, finished):
  folder, session = finished
  table = {row["rule"]: row for row in json.loads((folder / "targets.json").read_text())["recall"]}
  assert list(table) == ["random, expected", *(name.strip() for name in RULES.split(";"))]
  train, evals = session.splits["train"], session.splits["eval"]
  topics = np.array(train.topics)
  assert len(evals) == 12 and set(evals.topics) == {"sports", "movies", "humor"}  # 6 of each target, 3 of each topic
  size = int((topics == "sports").sum())
  asked = [row for row in range(len(evals)) if evals.topics[row] == "sports"]
  chooser = targets.Chooser(session, settings, {"base": ""})
  target = targets.Target("sports", np.array(asked), np.arange(1), topics == "sports")
  order = chooser.order(VARIANTS["bm25"], target, 0)
  assert table["bm25"]["sports"] == f"{np.mean(topics[order[:size]] == 'sports'):.2f}"
  assert table["random, expected"]["sports"] == f"{size / len(train):.2f}"


@pytest.mark.real
def test_choices_are_judged_on_the_targets_own_test_examples(finished, settings):
  folder, session = finished
  result = json.loads((folder / "targets.json").read_text())
  titles = [f"{name}, 20 % of the pool, equal {word}" for word in ("epochs", "budget_tokens") for name in _names()]
  compared = [row["compared"] for row in result["overview"]]
  assert compared == [row["compared"] for row in result["by_token"]]
  for row in result["first"]:  # the same numbers, held against another rule
    ours, theirs = (
      next(one for one in result["tables"][row["compared"]] if one["rule"] == name)
      for name in ("hybrid, base model", "bm25")
    )
    for by, cell in (("token", "perplexity"), ("example", "by example")):
      ratio = float(row[f"bm25, by {by}"].split()[0])
      assert ratio == pytest.approx(float(ours[cell]) / float(theirs[cell]), rel=5e-3)
  assert list(result["tables"]) == titles and compared == [*titles, "geometric mean"]
  for title in titles:
    rows = {row["rule"]: row for row in result["tables"][title]}
    assert set(rows) == {"full", "random", "hybrid, base model", "bm25"}
    assert rows["bm25"]["examples"] == rows["random"]["examples"] == round(0.2 * rows["full"]["examples"])
    assert float(rows["bm25"]["of the target"]) >= float(rows["random"]["of the target"])
  assert [row["test examples"] for row in result["sizes"]] == [4, 4]
  text = (folder / "targets.md").read_text()
  assert "## What rules find" in text and "intervals that hold for new test" in text


def _names():
  return "sports", "movies+humor"


@pytest.mark.real
def test_a_finished_run_neither_chooses_nor_trains_again(settings, finished, monkeypatch):
  folder, _ = finished
  before = (folder / "targets.md").read_bytes()
  monkeypatch.setattr(targets.Chooser, "order", lambda *_: pytest.fail("chosen again"))
  monkeypatch.setattr(retraining.Retrainer, "train", lambda *_: pytest.fail("trained again"))
  targets.run(settings, open_session(settings))
  assert (folder / "targets.md").read_bytes() == before


@pytest.mark.real
@pytest.mark.slow
def test_a_target_outside_of_the_pool_has_random_sets_of_its_rules_lengths_and_recommend_as_a_rule(settings, tmp_path):
  own = settings.replace(
    run_dir=str(tmp_path / "run"),
    train_data="chatterbot:trivia,psychology,ai",
    targets="trivia; psychology",
    absent="psychology",
    target_queries=20,
    variants="bm25; length-matched random",
    retrained="bm25; length-matched random",
    fractions="0.2,0.4",
    equal="epochs",
    recommend_minutes=60.0,
  )
  folder = pathlib.Path(targets.run(own, open_session(own)))
  found = json.loads((folder / "targets.json").read_text())
  assert [row["in the pool"] for row in found["sizes"]] == ["yes", "no"] and "psychology" not in found["recall"][0]
  assert set(found["recommended"]) == {"trivia", "psychology"} and len(found["tables"]) == 4
  for table in found["tables"].values():
    rows = {row["rule"]: row for row in table}
    assert set(rows) == {"full", "random", "bm25", "length-matched random", "recommend"}
    assert rows["recommend"]["examples"] == rows["random"]["examples"] == rows["length-matched random"]["examples"]
    assert rows["bm25"]["by example, to length-matched random"] and rows["recommend"]["seeds"] == 2
  assert all("recommend" in row and "length-matched random" not in row for row in found["over_matched"])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(retraining.Retrainer, "train", lambda *_: pytest.fail("trained again"))
    targets.run(own, open_session(own))


@pytest.mark.real
@pytest.mark.slow
def test_similarities_at_several_models_are_averaged(settings, finished, tmp_path):
  _, session = finished
  own = settings.replace(run_dir=str(tmp_path / "run"), gradients_at="base,warm")
  checkpoints = targets.checkpoints_of(session, own, {"warm"})
  target = targets.Target("sports", np.arange(6), np.arange(1), np.zeros(len(session.splits["train"]), bool))
  rule = VARIANTS["whitened cosine, mean"]
  places = [checkpoints[name] for name in ("base", "warm")]
  cosines = [
    ChoiceInputs(session, own.replace(checkpoint=one), session.checkpoint_params(one), stored=False) for one in places
  ]
  base, warm = (one.of({"whitened_cosine"}, target.queries)["similarities"]["whitened_cosine"] for one in cosines)
  assert not np.allclose(base, warm)
  order = targets.Chooser(session, own, checkpoints).order(rule, target, 0)
  firsts = order[: records.firsts(session.splits["train"].records).sum() // 2]  # near copies come last
  values = (base + warm).mean(axis=0)[firsts]
  assert (np.diff(values) <= 1e-9).all()
  with pytest.raises(UserError, match="'matching, base model' has no similarities to average"):
    targets.check(own.replace(variants="matching, base model"))
  with pytest.raises(UserError, match="gradients_at=cold"):
    targets.check(own.replace(gradients_at="cold"))


def test_without_variants_all_rules_that_can_be_tried_are():
  rules, retrained, _ = targets.check(TargetsSettings(targets="sports"))
  assert {"hybrid, base model", "bm25", "rds", "layer ranks", "density"} <= rules.keys() and retrained == []
  refused = {"proponents, cg", "matching, along a warm-up", "hybrid, 4 rounds"}
  assert not {*refused, "influence distillation, base model", "longest"} & rules.keys()
  for name in rules:
    targets.check(TargetsSettings(targets="sports", variants=name))
  for name in refused:
    with pytest.raises(UserError, match="needs scores or trainings"):
      targets.check(TargetsSettings(targets="sports", variants=name))


def test_equal_ids_of_other_examples_are_other_choices():
  choices = {"rule": {"target": ["a", "b"]}}

  def contents(*keys):
    records = [types.SimpleNamespace(example_id=one, content_key=key) for one, key in zip("abc", keys, strict=True)]
    return targets.contents_of(choices, types.SimpleNamespace(splits={"train": types.SimpleNamespace(records=records)}))

  assert contents("1", "2", "3") == contents("1", "2", "4") != contents("1", "3", "2")


@pytest.mark.real
def test_what_another_model_chose_is_trained_on_too(settings, finished, monkeypatch):
  folder, session = finished
  own = json.loads((folder / "targets.json").read_text())
  monkeypatch.setattr(
    retraining.Retrainer, "train", lambda *_: pytest.fail("trained again")
  )  # the same sets: all are kept
  targets.run(settings.replace(choices_of=str(folder)), open_session(settings))
  both = json.loads((folder / "targets.json").read_text())
  for title, table in both["tables"].items():
    rows = {row["rule"]: row for row in table}
    for name in ("hybrid, base model", "bm25"):
      other = rows.pop(f"{name}, chosen by {settings.model}")
      assert {key: value for key, value in other.items() if key != "rule"} == {
        key: value for key, value in rows[name].items() if key != "rule"
      }
    assert list(rows.values())[2:] == [
      row for row in own["tables"][title] if row["rule"] in ("hybrid, base model", "bm25")
    ]
  chosen = own["choices"]["bm25"]["sports"]
  assert len(chosen) == round(0.2 * len(session.splits["train"])) and set(chosen) <= set(session.splits["train"].ids)
  with pytest.raises(UserError, match="--choices_of=.*it chose [0-9]+ examples, [0-9]+ are needed"):
    targets.run(settings.replace(choices_of=str(folder), fractions="0.6"), open_session(settings))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"targets": ""}, "--targets is empty"),
    ({"targets": "opera"}, "the train set has nothing of 'opera'; it has chatterbot, food"),
    ({"targets": "food, sports, movies, humor"}, "all training examples are of"),
    ({"targets": "sports", "target_queries": 2}, "has 2 queries; a target needs 5"),
    ({"variants": "proponents, cg"}, "'proponents, cg' needs scores or trainings of each target; use some of"),
    ({"retrained_targets": "humor"}, "'humor' is not among --targets=sports; movies, humor"),
    ({"retrained": "longest"}, "--retrained=longest: unknown 'longest'"),
    ({"fractions": "0.5,1"}, "a budget below 1"),
    ({"absent": "opera"}, "--absent=opera: the training set has nothing of 'opera'"),
    ({"absent": "chatterbot"}, "--absent=chatterbot: nothing of the training set is left"),
    (
      {"variants": "length-matched random", "retrained": "length-matched random"},
      "also name a rule whose response lengths",
    ),
    ({"source_limits": "3,4"}, "need 1 number of at least 0, one for each source .*: chatterbot"),
  ],
)
def test_what_means_nothing_is_refused(settings, tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    targets.run(settings.replace(run_dir=str(tmp_path / "run"), **changes))
  assert not (tmp_path / "run").exists()


def test_limits_of_sources_count_each_by_itself(settings):
  one = open_session(settings.replace(source_limits="9"))
  assert len(one.splits["train"]) == 9 and len(one.splits["eval"]) == len(open_session(settings).splits["eval"])


def test_files_beside_the_pools_are_sources_too(settings, tmp_path):
  for name in ("b.json", "a.jsonl", "c.json", "notes.txt"):
    (tmp_path / name).write_text("[]")
  own = targets.with_siblings(settings.replace(train_data=f"chatterbot+jsonl:{tmp_path}/b.json", with_siblings=True))
  names = [pathlib.Path(source).name for source in own.train_data.split("+")]
  assert names == ["chatterbot", "b.json", "a.jsonl", "c.json"] and not own.with_siblings
  assert targets.with_siblings(settings) == settings
