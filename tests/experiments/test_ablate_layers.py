"""The layer ablation: sums over the table against scores of the choice alone, files, resuming, what is said."""

import csv
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny
from tiny import open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

from experiments.ablate_layers import ablate_layers, report
from experiments.ablate_layers.ablate_layers import Choice
from experiments.ablate_layers.settings import AblateLayersSettings
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.influence import decompose
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.params import subtree
from in2core_jax.pipeline import scoring, solver_inputs
from in2core_jax.pipeline import session as sessions
from in2core_jax.runs import run_folder
from in2core_jax.runs.unfinished import Work


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ablation")
  return run_settings(
    folder,
    kind=AblateLayersSettings,
    train_limit=24,
    eval_limit=6,
    test_limit=6,
    trainable_layers="last:1",
    steps=3,
    ablate_counts="1,2,8",
    ablate_modules="all,mlp",
    ablate_retrain="last:1",
    ablate_measure="",
    depth=3,
  )


@pytest.fixture(scope="module")
def session(settings):
  return open_session(settings)


@pytest.fixture(scope="module")
def finished(settings, session):
  """The folder of a finished ablation."""
  return pathlib.Path(ablate_layers.run(settings, session))


def alone(session, s, choice, solver, folder):
  """Scores of a choice by the road of `select`, which knows no table."""
  own = s.replace(solver=solver, layers=choice.flag, modules=choice.modules, run_dir=str(folder))
  chosen = sessions.choose(session, session.model.params, own.layers, own.modules)
  work = Work(run_folder.RunDir.open(str(folder), {"stage": "alone"}), 16)
  return scoring.score(session, own, chosen, work).influence


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("solver", ablate_layers.ADDITIVE)
def test_sums_are_the_scores_of_the_choice_alone(settings, session, finished, tmp_path, solver):
  run_dir = run_folder.RunDir.load(str(finished))
  scores = ablate_layers.Ablation(session, settings, run_dir).scores()[solver]
  for name in ("last:1", "spread:2/mlp"):
    (choice,) = ablate_layers.named(name, scores, "ablate_retrain")
    wanted = alone(session, settings, choice, solver, tmp_path / name.replace("/", "-"))
    assert np.ptp(wanted) > 0
    np.testing.assert_allclose(scores[choice], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.real
def test_the_table_is_there_and_says_what_it_must(finished, session, settings):
  result = json.loads((finished / "ablate_layers.json").read_text())
  with open(finished / "ablate_layers.csv") as file:
    rows = {(row["solver"], row["choice"]): row for row in csv.DictReader(file)}
  names = [choice.name for choice in ablate_layers.choices_of(settings, 4)]
  assert len(names) == len(set(names)) == 2 + 4 * 2 * 2  # eight layers are more than there are
  assert set(rows) == {(solver, name) for solver in ablate_layers.ADDITIVE for name in names}
  task = ablate_layers.Ablation(session, settings, run_folder.RunDir.load(str(finished)))
  for solver, scores in task.scores().items():
    tops = {choice.name: set(task.top(values).tolist()) for choice, values in scores.items()}
    share = len(tops["all"] & tops["first:1"]) / len(tops["all"])
    assert float(rows[solver, "first:1"]["overlap"]) == pytest.approx(share)
    few = ablate_layers.Ablation(session, settings.replace(budget=3), run_folder.RunDir.load(str(finished)))
    values = ablate_layers.table_of(few, solver, scores)
    assert {3 * row["overlap"] for row in values} <= {0, 1, 2, 3} and len(values[0]["top"]) == 3
    whole = rows[solver, "all"]
    assert float(whole["Spearman"]) == float(whole["overlap"]) == float(whole["FLOPs, share of all"]) == 1
    assert (
      float(rows[solver, "last:1"]["FLOPs, share of all"]) < float(rows[solver, "first:1"]["FLOPs, share of all"]) < 1
    )
    assert all(-1 <= float(rows[solver, name]["Spearman"]) <= 1 for name in names)
    assert float(whole["test perplexity"]) > 1 and float(rows[solver, "last:1"]["test perplexity"]) > 1
  assert rows["identity", "first:2/mlp"]["score pass, s"] == ""
  text = (finished / "ablate_layers.md").read_text()
  assert all(sentence in text for sentence in result["sentences"]) and len(result["sentences"]) == 2
  assert text.rstrip().endswith(result["notes"][-1]) and "Measured on these" in result["notes"][-1]
  assert "random: test perplexity" in text
  assert (finished / "ablate_layers.tex").read_text().count("last:2/mlp") == 2
  for name in ("svg", "png"):
    assert (finished / f"plots/ablate_layers.{name}").stat().st_size > 1000
  assert not (finished / "unfinished").exists() or not any((finished / "unfinished").iterdir())


@pytest.mark.slow
@pytest.mark.real
def test_finished_cells_are_kept_and_other_choices_join_them(settings, session, finished, monkeypatch):
  before = (finished / "ablate_layers.csv").read_text()
  monkeypatch.setattr(decompose, "leaf_table", lambda *_: pytest.fail("the pass was run again"))
  monkeypatch.setattr(solver_inputs, "solve", lambda *_: pytest.fail("solved again"))
  monkeypatch.setattr(ablate_layers, "Retrainer", lambda *_: pytest.fail("trained again"))
  ablate_layers.run(settings, session)
  assert (finished / "ablate_layers.csv").read_text() == before
  monkeypatch.undo()
  # Another module and a solver that does not add up, in the same folder.
  more = settings.replace(
    ablate_modules="mlp", ablate_counts="", ablate_positions="last", ablate_solvers="lissa", ablate_retrain=""
  )
  ablate_layers.run(more, session)
  result = json.loads((finished / "ablate_layers.json").read_text())
  assert [row["choice"] for row in result["rows"]] == ["all", "all/mlp"]
  assert {row["solver"] for row in result["rows"]} == {"lissa"} and result["rows"][0]["Spearman"] == 1
  assert result["rows"][1]["Spearman"] < 1


@pytest.mark.slow
@pytest.mark.real
def test_measured_costs_join_a_report_that_is_already_there(settings, session, finished, monkeypatch, caplog):
  def start(s, *_):
    assert json.loads((finished / "ablate_layers.json").read_text())["rows"]  # written before it measures
    assert s.alone == "score" and s.train_limit == 24 and s.mesh == ""
    if s.layers == "3":
      raise UserError("the device is gone")
    return {"seconds": 2.5, "peak memory": 3e8}

  monkeypatch.setattr(ablate_layers.isolated, "start", start)
  asked = settings.replace(ablate_measure="last:1", ablate_modules="all", ablate_solvers="identity")
  monkeypatch.setattr(report, "enough", lambda rows: None)
  (finished / "ablate_layers.json").unlink()
  ablate_layers.run(asked.replace(ablate_counts="1"), session)
  with open(finished / "ablate_layers.csv") as file:
    seconds = {row["choice"]: row["score pass, s"] for row in csv.DictReader(file)}
  assert float(seconds.pop("all")) == 2.5 and set(seconds.values()) == {""}
  assert "last:1 stays empty" in caplog.text and "the device is gone" in caplog.text
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(ablate_layers.isolated, "start", lambda *_: pytest.fail("the device is taken"))
  (finished / "ablate_layers.json").unlink()
  ablate_layers.run(asked.replace(ablate_counts="1"), session)
  assert "holds the tpu" in caplog.text and "experiments.benchmark --flagfile=" in caplog.text
  assert (finished / "ablate_layers.json").exists()


@pytest.mark.slow
@pytest.mark.real
def test_a_choice_is_measured_in_a_process_of_its_own(settings, session, tmp_path, monkeypatch):
  for name, value in tiny.child_environment(devices=2).items():
    monkeypatch.setenv(name, value)
  run_dir = run_folder.RunDir.open(str(tmp_path / "run"), {"stage": "ablate_layers"})
  small = settings.replace(ablate_examples=6, mesh="data:2")
  ablation = ablate_layers.Ablation(session, small, run_dir)
  found = ablation.measured(Choice("spread", "mlp", (0, 3)))
  assert found["examples"] == 6 and found["devices"] == 1
  assert found["seconds"] > 0 and found["peak memory"] > 50e6


class Retrained:
  """An ablation whose trainings give set numbers, and which notes what was trained on."""

  def __init__(self, perplexities):
    self.choices, self.session, self.settings = [Choice("all", "all", (0, 1))], None, None
    self.perplexities, self.trained = perplexities, []

  def yardsticks(self, seeds):
    return {"full": [np.arange(4)] * len(seeds), "random": [np.arange(2)] * len(seeds)}

  def retrained(self, name, sets, seeds, judge):
    self.trained.append(name)
    values = self.perplexities.get(name.rpartition(" ")[2], [5.0, 5.2])
    tokens, hard = np.full(30, 7), np.linspace(-1, 1, 30)
    return [
      statistics.RetrainRow(name, seed, 2, 9, 4, 1, 4, value, value, np.log(value) + hard, tokens)
      for seed, value in zip(seeds, values, strict=True)
    ]


def test_the_cheapest_that_agree_are_retrained_until_one_is_enough():
  names = {"all": 1.0, "dear": 0.9, "good": 0.3, "bad": 0.2, "last:1": 0.1, "apart": 0.05}
  overlap = {"all": 1.0, "apart": 0.5, "last:1": 0.6}
  rows = [made(name, overlap.get(name, 0.95), flops) | {"top": np.arange(2)} for name, flops in names.items()]
  ablation = Retrained({"bad": [9.0, 9.1]})
  intervals = ablate_layers.retrain(ablation, {"identity": rows}, [Choice("last", "all", (1,))], (0, 1))
  trained = [name.removeprefix("identity, ") for name in ablation.trained]
  # "bad" is the cheapest that agrees and is worse, "good" the next and enough; "dear" could not be the cheapest.
  assert set(intervals.perplexity) == {"full", "random"}
  assert "comparisons by token or by example" in intervals.notes[0] and "Measured on these 30" in intervals.notes[1]
  assert trained == ["full", "random", "all", "last:1", "bad", "good"]
  assert rows[3]["perplexity"].mean > 9 and rows[3]["ratio"].low > 1 and rows[1]["perplexity"] is None
  assert report.enough(rows) is rows[2]


def test_names_of_neighbours_in_the_figure_do_not_cover_each_other():
  names = {"all": 1.0, "last:4": 0.35, "last:4/mlp": 0.34, "last:4/attention": 0.33}
  rows = [
    made(name, 1.0, flops, (1.0, 0.9, 1.1)) | {"position": "last", "modules": "all"} for name, flops in names.items()
  ]
  drawn = report.figure({"identity": rows}, {})
  labels = [text for text in drawn.axes[1].texts if text.get_text() in names]
  boxes = [label.get_window_extent() for label in labels]
  assert len(boxes) == 4 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.slow
def test_the_table_of_leaves_is_the_score_apart():
  t = tiny.make_tiny("1,3", "attention,mlp")
  direction = tiny.direction(t.sub, queries=2)
  problem = CompiledObjective(t.objective, t.sub, t.frozen, microbatch=3)
  size = len(tiny.ROLES)
  stream = lambda: iter([(np.arange(size), t.batch)])  # noqa: E731
  table = decompose.leaf_table(problem, t.subtree, stream, size, direction, 3)
  assert table.shape == (2, size, 2, len(t.subtree.paths))
  whole = problem.scores(stream, size, direction, "vmap")
  np.testing.assert_allclose(decompose.sum_over(table, t.subtree, t.subtree), whole, rtol=1e-5, atol=1e-5)
  part = subtree.make_subtree(t.params, "3", "mlp")
  cut = {"layers": {"mlp": jax.tree.map(lambda leaf: leaf[:, 1:], direction["layers"]["mlp"])}}
  other = CompiledObjective(tiny.make_tiny("3", "mlp").objective, *subtree.split(t.params, part), microbatch=3)
  wanted = other.scores(stream, size, cut, "vmap")
  np.testing.assert_allclose(decompose.sum_over(table, t.subtree, part), wanted, rtol=1e-5, atol=1e-5)
  assert not table[:, tiny.NO_RESPONSE].any()
  with pytest.raises(UserError, match="does not have layer 2, attention_norm/scale"):
    decompose.sum_over(table, t.subtree, subtree.make_subtree(t.params, "2,3", "attention_norm"))
  with pytest.raises(UserError, match="final_norm is in no layer"):
    decompose.leaf_table(problem, subtree.make_subtree(t.params, "3", "mlp,final_norm"), stream, size, direction)


def test_spread_layers_are_even():
  assert ablate_layers.spread(1, 30) == (15,) and ablate_layers.spread(2, 8) == (2, 6)
  assert ablate_layers.spread(4, 30) == (3, 11, 18, 26) and ablate_layers.spread(8, 8) == tuple(range(8))


def interval(mean, low=np.nan, high=np.nan):
  return statistics.Interval(mean, low, high, 30)


def made(name, overlap, flops, ratio=None):
  """A choice; `ratio` (estimate, low, high) to all layers' own choice where it was retrained."""
  row = {"solver": "identity", "name": name, "overlap": overlap, "flops": flops, "bytes": 1e6 * flops, "seconds": None}
  ratios = dict.fromkeys(("ratio", "ratio by example"), None if ratio is None else interval(*ratio))
  return row | ratios | {"perplexity": None if ratio is None else interval(5 * ratio[0]), "peak": None}


def whole():
  return made("all", 1.0, 1.0) | {"perplexity": interval(5.0, 3.0, 8.0)}


def test_a_whole_that_loses_to_random_is_told():
  against = lambda *ratio: report.worse_than_random([whole() | {"to random": interval(*ratio)}])  # noqa: E731
  (line,) = against(1.2, 1.1, 1.3)
  assert "retrain to 5, worse than random sets of the size (1.200 (1.100 to 1.300) times theirs)" in line
  assert against(1.2, 0.9, 1.6) == against(0.8, 0.7, 0.9) == against(1.2) == []
  assert report.worse_than_random([whole()]) == []


def test_enough_is_the_cheapest_that_agrees_and_is_not_worse():
  worse, unsure, equal = (1.8, 1.5, 2.1), (1.02, 0.96, 1.08), (1.0, 0.995, 1.005)
  rows = [whole(), made("cheap", 0.7, 0.1, equal), made("last:8", 0.95, 0.4, worse)]
  assert report.enough(rows) is None
  assert "no choice is enough" in report.sentence(rows) and "(last:8)" in report.sentence(rows)
  rows += [made("spread:8", 0.9, 0.6, equal), made("first:16", 0.99, 0.9, equal), made("last:9", 0.9, 0.65)]
  assert report.enough(rows)["name"] == "spread:8"
  assert "spread:8 is enough" in report.sentence(rows)
  rows[3] |= made("spread:8", 0.9, 0.6, unsure)  # not told apart is not as good
  said = report.sentence(rows)
  assert "spread:8 may be enough" in said and "1.020 (0.960 to 1.080) times: up to 8 % worse is not excluded" in said
  rows[3] |= made("spread:8", 0.9, 0.6, (0.9, 0.85, 0.95))
  assert "spread:8 is enough" in report.sentence(rows) and "lower (better)" in report.sentence(rows)
  rows[3]["overlap"] = 0.89
  # last:9 agrees, but so did last:8, which failed: what was not retrained is not enough then.
  assert report.enough(rows)["name"] == "first:16"
  del rows[4]
  assert report.enough(rows) is None
  assert "retrained (last:8) are above" in report.sentence(rows)
  assert "not retrained: last:9." in report.sentence(rows)
  plain = [row | {"perplexity": None, "ratio": None} for row in rows]
  assert "last:8 may be enough" in report.sentence(plain)
  assert "it was not retrained" in report.sentence(plain)
  once = [whole(), made("last:8", 0.95, 0.4, (1.8,))]
  assert "last:8 may be enough" in report.sentence(once)
  assert "9, all layers' 5, and one training each cannot show a difference" in report.sentence(once)
  few = [rows[0], rows[1]]
  assert "none that is cheaper" in report.sentence(few) and "cheap, shares 70%" in report.sentence(few)
  rows[1] |= {"overlap": 0.93, "seconds": 1.0, "peak": 2e8}
  rows[0] |= {"seconds": 4.0, "peak": 3e8}
  assert "1 s instead of 4 s and 200 MB instead of 300 MB" in report.sentence(rows)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"ablate_positions": "top"}, "positions are last, first, middle, spread"),
    ({"ablate_counts": "0"}, "^ablate_counts=0: '0' is wrong in this list of whole numbers, each at least 1"),
    ({"ablate_retrain": "last:3"}, "'last:3' is none of the choices all, all/mlp, last:1"),
    ({"ablate_modules": "heads"}, "^--ablate_modules=heads: this model has no 'heads'"),
    ({"ablate_solvers": "newton"}, "must name some of"),
    ({"policy": "topic_quota"}, "--policy=topic_quota: ablate_layers compares"),
    ({"fractions": "0.1,0.5"}, "--fractions=0.1,0.5: ablate_layers .* one budget; leave it out"),
    ({"write": "layer"}, "--write=layer: .* leave it out"),
    ({"score_path": "projected"}, "--score_path=projected: "),
    (
      {"ablate_solvers": "identity,ekfac", "curvature": "hessian"},
      "^--ablate_solvers=.*: --solver=ekfac with --curvature=hessian",
    ),
    (
      {"ablate_solvers": "datainf,exact"},
      "^--ablate_solvers=datainf,exact, exact of all: .* 9,344 parameters, more than",
    ),
    ({"budget": 99}, "budget=99 is more than the 24 examples"),
    ({"seeds": ""}, "--seeds is empty: give at least one"),
    ({"ablate_counts": "8", "ablate_modules": "all"}, "nothing is left to compare with all of the 4 layers"),
  ],
)
def test_what_means_nothing_is_refused(settings, session, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    ablate_layers.run(settings.replace(run_dir=str(tmp_path / "run"), **changes), session)
  assert not (tmp_path / "run").exists()


def test_a_choice_is_named_as_flags_name_it():
  assert Choice("all", "all", (0, 1)).name == "all" and Choice("last", "mlp", (2, 3)).name == "last:2/mlp"
  assert Choice("spread", "all", (0, 3)).flag == "0,3"
