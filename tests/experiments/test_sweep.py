"""Tables of many trainings: the sweep of evaluate, the study of selection rules, all of them in one command."""

import csv
import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest
from tiny import Killed, open_session, quick_compile, run_settings  # noqa: F401, quick_compile is an autouse fixture

from experiments.paper import job, paper
from experiments.paper.settings import PaperSettings
from experiments.paper.steps import STEPS, Step
from experiments.study import report, study, variants
from experiments.study.settings import StudySettings
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.influence import kernels
from in2core_jax.pipeline import compared, evaluate, select
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.compared import plan_of
from in2core_jax.pipeline.evaluate_results import report_names
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.retraining import Retrainer, TrainingSubset
from in2core_jax.runs import run_folder
from in2core_jax.selection import coreset, cosines
from in2core_jax.selection.inputs import Budget


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  small = {"solver": "identity", "sketch_size": 4, "epochs": 1.0, "train_limit": 32}
  return run_settings(tmp_path_factory.mktemp("sweep"), kind=StudySettings, **small)


@pytest.fixture(scope="module")
def session(settings):
  return open_session(settings)


def table_of(folder, name):
  with (pathlib.Path(folder) / name).open(newline="") as file:
    return list(csv.DictReader(file))


def no_training(monkeypatch):
  monkeypatch.setattr(Retrainer, "train", lambda *_: pytest.fail("a finished training was done again"))


# ---- evaluate --fractions ------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(settings, session, tmp_path_factory):
  """(flags, run folder) of a finished sweep."""
  folder = tmp_path_factory.mktemp("runs")
  selected = select.run(settings.replace(run_dir=str(folder / "select")), session)
  chosen = settings.replace(
    run_dir=str(folder / "sweep"),
    select_runs=selected,
    fractions="0.5,0.25,1",
    equal="steps,epochs,tokens",
    policies="full,random,bm25,embedding",
  )
  return chosen, evaluate.run(chosen, session)


def test_a_sweep_has_every_policy_at_every_budget(sweep):
  _, folder = sweep
  rows = table_of(folder, "evaluation.csv")
  assert {(row["equal"], row["fraction"]) for row in rows} == {
    (equal, fraction) for equal in ("steps", "epochs", "tokens") for fraction in ("0.25", "0.5")
  }
  for row in rows:
    assert row["policy"] in ("full", "random", "bm25", "embedding", "proponents")
    size = 32 if row["policy"] == "full" else 32 * float(row["fraction"])
    assert int(row["examples"]) == size
    if row["equal"] == "steps":
      assert int(row["steps"]) == 4
    if row["equal"] == "epochs":
      assert int(row["steps"]) == max(1, round(4 * size / 32))
  assert sum(row["policy"] == "random" and row["seeds"] == "2" for row in rows) == 6
  page = (pathlib.Path(folder) / "evaluation.md").read_text()
  assert "## Equal epochs, 0.25 of the examples" in page and "](plots/sweep-tokens.png)" in page
  overview = page.split("## Test perplexity by token at equal tokens, by share of the examples\n\n")[1].split("\n\n")[0]
  assert overview.startswith("| policy | 25 % | 50 % |")
  mine = {(row["policy"], row["equal"], row["fraction"]): float(row["perplexity"]) for row in rows}
  assert f"| {mine['bm25', 'tokens', '0.25']:.3f} |" in next(
    line for line in overview.splitlines() if line.startswith("| bm25 |")
  )
  # Three policies against random sets and full data and the one of these two, by token and by example, two budgets,
  # three times something equal: said once for all of them.
  words = json.loads((pathlib.Path(folder) / "evaluation.json").read_text())["verdict"]
  (said,) = [line for line in words if " comparisons by token or by example, each at 95%: " in line]
  assert said.startswith("84 ") and page.count("comparisons by token or") == 1
  assert sum(line.startswith("Measured on these ") for line in words) == 1


def test_equal_tokens_are_equal_within_a_step(sweep, session):
  _, folder = sweep
  responses = session.splits["train"].num_response_tokens
  full = 4 * 8 * responses.mean()
  for row in table_of(folder, "evaluation.csv"):
    if row["equal"] == "tokens":
      per_step = 8 * int(row["response_tokens"]) / int(row["examples"])
      assert abs(int(row["steps"]) * per_step - full) <= per_step / 2 + 8  # a random row is a mean of two sets


def test_the_same_training_is_done_once(sweep, session, monkeypatch):
  chosen, folder = sweep
  files = list((pathlib.Path(folder) / "trainings").iterdir())
  kept = {json.loads(path.read_text())["policy"] for path in files}
  assert kept == {"full", "random", "bm25", "embedding", "proponents"}
  # Full data once, whatever is equal; of the others one for each number of steps.
  assert sum(json.loads(path.read_text())["policy"] == "full" for path in files) == 1
  no_training(monkeypatch)
  evaluate.run(chosen, session)


def test_similar_texts_are_chosen(sweep, session):
  chosen, folder = sweep
  inputs = ChoiceInputs(session, chosen, session.model.params).of({"bm25", "embedding"})
  ids = np.array(session.splits["train"].ids)
  for name in ("bm25", "embedding"):
    kept = {json.loads(line)["messages"][0]["content"] for line in coreset_lines(folder, f"{name}-0.25-0")}
    order = np.argsort(-inputs["similarities"][name].mean(axis=0), kind="stable")
    best = coreset.copies_last(order, inputs["alike"])[:8]
    assert len(kept) <= 8 and set(ids[best]) <= set(ids)
    assert kept == {session.splits["train"].records[row].messages[0]["content"] for row in best}


def coreset_lines(folder, name):
  return (pathlib.Path(folder) / "coresets" / f"{name}.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"fractions": "0.5,2"}, "^fractions=0.5,2: '2' is wrong in this list of numbers, each above 0 and at most 1"),
    ({"fractions": "half"}, "^fractions=half: 'half' is wrong in this list of numbers"),
    ({"fractions": "0.5,0.5"}, "--fractions=0.5,0.5 is not a list of different shares"),
    ({"fractions": "0.5", "budget": 3}, "--fractions=0.5 with --budget=3: give one of them"),
    ({"equal": "cost", "policies": "full"}, "--equal=cost: unknown 'cost'; use some of steps, epochs, tokens"),
    ({"fractions": "0.5", "policies": "proponents"}, "proponents needs the scores of a select run"),
  ],
)
def test_sweeps_that_cannot_be_are_refused(settings, session, tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    evaluate.run(settings.replace(run_dir=str(tmp_path / "run"), **changes), session)
  assert not (tmp_path / "run").exists()


def test_a_sweep_matches_as_its_select_run_did(settings, session, tmp_path):
  made = select.run(settings.replace(policy="matching", run_dir=str(tmp_path / "select")), session)
  sweep = settings.replace(fractions="0.5", policies="full", select_runs=made, run_dir=str(tmp_path / "run"))
  assert plan_of(session, sweep).policies == [("full", 0), ("matching", 0)]
  for name, value in {"layers": "last:1", "matching_target": "tokens", "matching_shrink": False}.items():
    with pytest.raises(UserError, match=f"has --{name}=.* and not {value}: give evaluate the same"):
      plan_of(session, sweep.replace(**{name: value}))
  model = dataclasses.replace(session.model, load=lambda: (session.model.params, "0" * 64))
  other = dataclasses.replace(session, model=model)
  with pytest.raises(UserError, match="another --model .* than hf:.*hash 000000000000.*: give evaluate the same"):
    plan_of(other, sweep)


def test_selections_of_several_sizes_have_no_random_set_in_common(settings, session, monkeypatch):
  chosen = {"a/run": ("matching", 12), "b/run": ("proponents", 16), "c": ("longest", 16)}
  columns = lambda count: {"selected": np.arange(32) < count}  # noqa: E731
  monkeypatch.setattr(compared, "read_selection", lambda folder, _: (chosen[folder][0], columns(chosen[folder][1])))
  plan = lambda runs, policies: plan_of(session, settings.replace(select_runs=runs, policies=policies))  # noqa: E731
  with pytest.raises(UserError, match="have selected 12, 16 examples, and random of --policies would have one size"):
    plan("a/run,b/run", "full,random")
  assert len(plan("a/run,b/run", "full").runs) == len(plan("b/run,c", "full,random").runs) == 2


def test_reports_of_select_runs_have_names_of_their_own():
  found = report_names(["x/run-2", "a/run", "b/run/", "gs://bucket/c/run"])
  assert found == ["report-run-2.html", "report-run.html", "report-run-3.html", "report-run-4.html"]


def test_the_flagfile_of_the_study_names_rules_that_there_are():
  line = (job.FLAGS / "study.flags").read_text().split("--variants=")[1].splitlines()[0]
  assert len(variants.variants_of(StudySettings(variants=line))) > 10
  for step in STEPS:
    for change in step.changes:
      if change.startswith("--variants="):
        assert variants.variants_of(StudySettings(variants=change.removeprefix("--variants=")))


def test_evaluation_topics(settings, session):
  topics = set(session.splits["eval"].topics) & set(session.splits["test"].topics)
  topic = sorted(topics)[0]
  some = open_session(settings.replace(eval_topics=topic, eval_limit=0, test_limit=0), session.model)
  assert set(some.splits["eval"].topics) == set(some.splits["test"].topics) == {topic}
  assert some.splits["train"].ids == session.splits["train"].ids
  with pytest.raises(UserError, match="the eval set has nothing of 'cars'; its topics: "):
    open_session(settings.replace(eval_topics=f"{topic},cars"))


# ---- study ---------------------------------------------------------------------------


def test_study_compares_rules_and_keeps_what_is_finished(settings, session, tmp_path, monkeypatch):
  names = "proponents; proponents, quota; matching; random, copies last; matching, again"
  every = variants.make_variant("matching", trained=True, matching_target="both")
  monkeypatch.setattr(variants, "VARIANTS", variants.VARIANTS | {"matching, again": every})
  chosen = settings.replace(run_dir=str(tmp_path / "study"), variants=names, eval_limit=10)
  folder = study.run(chosen, session)
  rows = {row["rule"]: row for row in table_of(folder, "study.csv")}
  assert list(rows) == ["full", "random", *[name.strip() for name in names.split(";")]]
  assert all(int(row["examples"]) == (32 if name == "full" else 16) for name, row in rows.items())
  for row in rows.values():
    assert float(row["perplexity"]) > 1
  ratio = float(rows["matching"]["perplexity"]) / float(rows["full"]["perplexity"])
  assert float(rows["matching"]["to full"].split(" (")[0]) == pytest.approx(ratio, abs=1e-3)
  assert " to " in rows["matching"]["by example, to random"]
  # The same examples are chosen, and the same training is not done again.
  assert rows["matching"]["perplexity"] == rows["matching, again"]["perplexity"]
  page = (tmp_path / "study" / "study.md").read_text()
  assert "## Equal steps" in page and "comparisons by token or by example" in page and "Measured on these " in page
  rules = {line.split(" | ")[0].strip("| "): line for line in page.split("## Rules")[1].splitlines() if "|" in line}
  assert (
    "| matching | the fine-tuned model |" in rules["matching"]
    and "no text twice before every text is in" in rules["random, copies last"]
  )
  no_training(monkeypatch)
  study.run(chosen, session)
  longer = tmp_path / "study" / "plots" / "study-tokens.svg"
  longer.write_text("of an earlier --equal=steps,tokens")
  study.run(chosen.replace(variants="matching"), session)  # fewer rules: the same folder
  assert not longer.exists() and longer.with_name("study-steps.svg").exists()
  with pytest.raises(UserError, match="unknown 'best'; use some of proponents; proponents, base model; "):
    study.run(chosen.replace(variants="best"), session)
  with pytest.raises(UserError, match="no rule 'proponents, cg, cut at 96': name 'proponents, cg', and change"):
    variants.variants_of(chosen.replace(variants="matching; proponents, cg, cut at 96"))
  with pytest.raises(UserError, match="--variants=; names no rule"):
    variants.variants_of(chosen.replace(variants=";"))


@pytest.mark.slow
def test_rules_can_score_examples_that_are_cut(settings, session, tmp_path, monkeypatch):
  """The same examples and model, shorter; what no cut reaches is the rule itself, and is not trained again."""
  length = int(max(part.num_tokens.max() for part in session.splits.values()))
  short = length // 2
  cut = session.with_settings(max_length=short)
  for part, dataset in cut.splits.items():
    assert dataset.ids == session.splits[part].ids
    np.testing.assert_array_equal(dataset.num_tokens, np.minimum(session.splits[part].num_tokens, short))
  assert cut.model.params is session.model.params and session.splits["train"].num_tokens.max() > short
  rules = {"matching": variants.VARIANTS["matching"]}
  of_length = lambda n: variants.make_variant("matching", trained=True, max_length=n)  # noqa: E731
  rules |= {f"matching, cut at {n}": of_length(n) for n in (short, length)}
  monkeypatch.setattr(variants, "VARIANTS", rules)
  folder = study.run(settings.replace(run_dir=str(tmp_path / "cut"), variants="; ".join(rules)), session)
  rows = {row["rule"]: row for row in table_of(folder, "study.csv")}
  whole, half = rows[f"matching, cut at {length}"], rows[f"matching, cut at {short}"]
  assert whole["shared with its rule"] == "1.00" and whole["perplexity"] == rows["matching"]["perplexity"]
  assert 0 < float(half["shared with its rule"]) < 1 and half["perplexity"] != whole["perplexity"]
  assert half["examples"] == whole["examples"] == "16"


def test_a_cut_changes_what_is_chosen_and_not_how_much(settings):
  part = lambda *responses: types.SimpleNamespace(  # noqa: E731
    num_tokens=np.full(len(responses), 9), num_response_tokens=np.array(responses)
  )
  whole, cut = part(*[3] * 8, 0), part(*[2] * 5, *[0] * 4)
  rule = variants.make_variant("matching", trained=True, max_length=48)
  assert study.budget_for(settings.replace(budget=0.5), rule, whole, cut) == Budget(num_examples=4)
  tokens = settings.replace(budget="30tok")
  assert study.budget_for(tokens, rule, whole, cut) == Budget(token_budget=30)
  with pytest.raises(UserError, match="choose 6 examples, but only 5 have a response within 48 tokens"):
    study.budget_for(variants.settings_of(settings.replace(budget=0.75, max_length=96), rule), rule, whole, cut)
  assert variants.settings_of(settings.replace(max_length=32), rule).max_length == 32  # no more than is trained on


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"checkpoint": "runs/x"}, "--checkpoint=runs/x: study's rules say themselves"),
    ({"damping": 0.1}, "--damping=0.1: "),
    ({"normalize": "cosine"}, "--normalize=cosine: "),
    ({"policy": "longest"}, "--policy=longest: "),
    ({"fractions": "0.1,0.5"}, "--fractions=0.1,0.5: study's rules .* one budget, .*; leave it out"),
    ({"variants": "matching; matching, 16 queries"}, "16 queries' won nowhere and is gone: .*--eval_limit=16"),
    ({"score_path": "projected"}, "--score_path=projected: "),
    ({"variants": "matching; proponents, cg", "precondition": "ekfac"}, ""),
    ({"variants": "proponents, datainf", "precondition": "ekfac"}, "'proponents, datainf': --precondition=ekfac with"),
    ({"variants": "matching", "layers": "last:9"}, "--variants, 'matching': --layers=last:9"),
    ({"variants": "proponents", "solver": "exact"}, "--variants, 'proponents': --solver=exact: .* 4,672 parameters"),
    ({"variants": "matching; proponents, cg", "solver": "exact"}, ""),
    ({"variants": "matching, cut at 2"}, "'matching, cut at 2': .* has a response token within max_length=2"),
  ],
)
def test_a_study_that_cannot_be_is_refused_before_the_work(settings, session, tmp_path, monkeypatch, changes, words):
  rules = variants.VARIANTS | {"matching, cut at 2": variants.make_variant("matching", trained=True, max_length=2)}
  monkeypatch.setattr(variants, "VARIANTS", rules)
  if not words:
    assert study.check_variants(session, settings.replace(**changes)) is None
    return
  with pytest.raises(UserError, match=words):
    study.run(settings.replace(run_dir=str(tmp_path / "run"), **changes), session)
  assert not list(tmp_path.iterdir())


def test_fewer_evaluation_examples_have_the_losses_that_they_had_among_all(settings, session):
  evals = session.splits["eval"]
  limited = open_session(settings.replace(eval_limit=4), session.model)
  few = session.with_evals(np.array([evals.ids.index(name) for name in limited.splits["eval"].ids]))
  assert few.splits["eval"].ids == limited.splits["eval"].ids != evals.ids[:4] and len(session.splits["eval"].ids) > 4
  chosen = sessions.choose(session, session.model.params, settings.layers, settings.modules)
  rows = [evals.ids.index(name) for name in few.splits["eval"].ids]

  def of(one, part):
    stream = one.stream(one.packer(part, chosen.tree, chosen.params))
    return chosen.problem.losses(stream, len(one.splits[part]))

  np.testing.assert_allclose(of(few, "eval"), of(session, "eval")[rows], rtol=1e-5)
  np.testing.assert_allclose(of(few, "train"), of(session, "train"))


def test_copies_come_last(settings, session, tmp_path, monkeypatch):
  monkeypatch.setattr(study, "distinct_points", lambda points: np.arange(len(points)) // 4 * 4)
  run_dir = run_folder.RunDir.open(str(tmp_path / "copies"), {})
  judged = study.Study(session, settings, "", run_dir)
  chosen = [judged.rows(variants.VARIANTS["random, copies last"], seed) for seed in range(3)]
  for rows in chosen:  # half of 8 texts with 4 copies each: two of each text
    np.testing.assert_array_equal(np.bincount(rows // 4), np.full(8, 2))
  assert len({tuple(rows) for rows in chosen}) == 3
  few = study.Study(session, settings.replace(budget=0.25), "", run_dir)
  np.testing.assert_array_equal(few.rows(variants.VARIANTS["random, copies last"], 0) // 4, np.arange(8))


def test_comparison_by_hand():
  row = lambda policy, seed, *found: statistics.RetrainRow(policy, seed, 2, 9, 4, 1, 4, *found)  # noqa: E731
  rows = [
    row("full", 0, 8.0, 9.0),
    row("random", 0, 10.0, 10.0),
    row("random", 1, 12.0, 12.0),
    row("mine", 0, 9.0, 11.0),
  ]
  full, random, mine = report.comparison(rows)
  assert (full["random sets beaten"], full["beaten by example"], full["to full"]) == ("2 of 2", "2 of 2", "")
  assert (random["perplexity"], random["by example"], random["seeds"], random["random sets beaten"]) == (11, 11, 2, "")
  assert (mine["random sets beaten"], mine["beaten by example"]) == ("2 of 2", "1 of 2")
  assert mine["to full"] == "1.125" and mine["to random"].startswith("0.82")
  assert report.ranges(rows).endswith(": random 10.000 to 12.000 (10.000 to 12.000).") and report.ranges(rows[:1]) == ""


def test_shares_of_rules_that_change_another_by_hand():
  sets = {
    "matching": [1, 2, 3, 4],
    "matching, quota": [3, 4, 5, 6],
    "cg": [1, 2],
    "cg, cut": [2, 9],
    "cg, cut, more": [2, 9],
    "lone, cut": [1, 2],
  }
  chosen = [TrainingSubset(name, seed, np.array(rows) + seed) for seed in (0, 1) for name, rows in sets.items()]
  shared = report.shared_with_their_rule(chosen)
  assert shared == {"matching, quota": 0.5, "cg, cut": 0.5, "cg, cut, more": 1.0}
  table = report.comparison(
    [statistics.RetrainRow(name, 0, 2, 9, 4, 1, 4, 9.0, 9.0) for name in ("full", "random", "cg", "cg, cut")],
    report.SetFacts(shared, {"random": 0.25, "cg": 1.0}),
  )
  assert [row["shared with its rule"] for row in table] == ["", "", "", "0.50"]
  assert [row["of the target"] for row in table] == ["", "0.25", "1.00", ""]


@pytest.mark.slow
def test_a_killed_study_does_not_take_the_pieces_of_another_rule(settings, session, tmp_path, monkeypatch):
  def kill(*_):
    raise Killed

  names = "proponents, base model", "proponents, no curvature"
  folders = [str(tmp_path / name) for name in ("killed", "alone")]
  with monkeypatch.context() as patch, pytest.raises(Killed):  # the evaluation gradient of the first rule is kept
    patch.setattr(kernels.CompiledObjective, "losses_and_scores", kill)
    study.run(settings.replace(run_dir=folders[0], variants=names[0]), session)
  assert list((tmp_path / "killed" / "unfinished").rglob("*.shard"))
  for folder in folders:
    study.run(settings.replace(run_dir=folder, variants=names[1]), session)
  cells = [
    [json.loads(path.read_text()) for path in sorted((pathlib.Path(folder) / "cells").glob("*.json"))]
    for folder in folders
  ]
  scores = [[cell["influence"] for cell in found if cell["name"][0] == "scores"] for found in cells]
  assert scores[0] == scores[1] and len(scores[0]) == 1


def test_unit_gradients_have_length_1():
  vectors = np.array([[3.0, 4.0], [0.0, 0.0], [0.1, 0.0]])
  np.testing.assert_allclose(cosines.unit(vectors), [[0.6, 0.8], [0, 0], [1, 0]])


# ---- paper ---------------------------------------------------------------------------


@pytest.mark.slow
def test_paper_runs_its_steps_and_publishes(settings, tmp_path, monkeypatch):
  flagfile = tmp_path / "tiny.flags"
  flagfile.write_text("\n".join(settings.as_flags()))
  steps = (
    Step("first", "select", "report", "tiny.flags", "scores", ("--fraction=0.25",)),
    Step("broken", "select", "report", "tiny.flags", "a mistake", ("--fraction=2",)),
  )
  monkeypatch.setattr(paper, "STEPS", steps)
  monkeypatch.setattr(job, "FLAGS", tmp_path)
  s = PaperSettings.of(settings, run_dir=str(tmp_path / "paper"), results_dir=str(tmp_path / "results"))
  assert paper.run(s) == 1  # the second step fails, the first is there
  page = (tmp_path / "results" / "quick" / "first" / "report.md").read_text()
  assert "python -m experiments.select --flagfile=" in page and "--fraction=0.25" in page and "cores of" in page
  assert "--num_processes=1" in page and str(tmp_path) not in page
  assert "](plots/scores.svg)" in page and (tmp_path / "results" / "quick" / "first" / "plots" / "scores.svg").exists()
  assert len((tmp_path / "paper" / "first" / "coreset.jsonl").read_text().splitlines()) == 8
  index = (tmp_path / "results" / "quick" / "README.md").read_text()
  assert "first/report.md" in index and "broken" not in index
  seconds = json.loads((tmp_path / "paper" / "first.json").read_text())["seconds"]
  monkeypatch.setattr(paper, "STEPS", steps[:1])
  assert paper.run(s) == 0
  assert json.loads((tmp_path / "paper" / "first.json").read_text())["seconds"] == seconds  # not run again


def test_paper_knows_its_steps():
  settings = PaperSettings()
  assert [each.step.name for each in paper.jobs_of(settings)] == [s.name for s in STEPS if not s.needs_alpaca]
  with pytest.raises(UserError, match="there is no 'x'"):
    paper.jobs_of(settings.replace(only="x"))
  with pytest.raises(UserError, match="needs --alpaca"):
    paper.jobs_of(settings.replace(only="study-alpaca"))
  for step in STEPS:
    assert (job.FLAGS / step.flagfile).exists(), step.name
