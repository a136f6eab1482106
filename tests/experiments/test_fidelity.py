"""LDS and leave-out curves on a small random model: what is written, that it resumes, that the numbers fit together."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from tiny import CONFIG, open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

from experiments.fidelity import fidelity, report
from experiments.fidelity.settings import FidelitySettings
from in2core_jax.errors import UserError
from in2core_jax.evaluation import datamodeling, statistics
from in2core_jax.pipeline.metagradient import metagradient, query_metagradients
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.pipeline.scoring import query_scores
from in2core_jax.pipeline.session import choose
from in2core_jax.pipeline.settings import refuse
from in2core_jax.runs import run_folder
from in2core_jax.runs.unfinished import Work


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp("fidelity")
  return run_settings(
    folder,
    dataclasses.replace(CONFIG, num_layers=2),
    kind=FidelitySettings,
    train_limit=30,
    eval_limit=8,
    test_limit=6,
    trainable_layers="last:1",
    steps=4,
    depth=4,
    cg_steps=4,
    krylov=3,
    query_block=8,
    halves=6,
    halves_again=4,
    solver="cg",
    lds_solvers="identity,cg",
    lds_layers="last:1",
    lds_ratios="0.5,0.1",
    lds_at="full,base",
    curve_solvers="cg",
    left_out="0.2",
  )


@pytest.fixture(scope="module")
def session(settings):
  return open_session(settings)


@pytest.mark.real
def test_scores_belong_to_the_losses_that_judge_them(settings, session, tmp_path):
  """A small step along an example's gradient changes Retrainer's losses by the step times its identity scores."""
  rows = np.arange(len(session.splits["train"]))
  judge = Retrainer(session, settings, [rows])
  chosen = choose(session, session.model.params, "last:1", "all")
  run_dir = run_folder.RunDir.open(str(tmp_path / "run"), {"stage": "test"})
  scores = query_scores(session, settings.replace(solver="identity"), chosen, Work(run_dir))
  example, step = int(np.argmax(np.abs(scores).sum(axis=0))), 1e-2
  batcher = session.batcher("train", chosen.tree, chosen.params, [example])
  gradient = chosen.problem.gradients(session.stream(batcher), 1)
  moved = [jax.tree.map(lambda x, g, t=t: x - t * g[0], judge.sub, gradient) for t in (step, -step)]
  change = (judge.losses(moved[1], "eval") - judge.losses(moved[0], "eval")) / (2 * step)
  np.testing.assert_allclose(change, scores[:, example], atol=0.02 * np.abs(scores[:, example]).max())
  assert np.abs(scores[:, example]).max() > 1e-3


def test_copies_among_the_evaluation_examples_are_one_query(settings, session, tmp_path):
  evals = session.splits["eval"].take(np.array([3, 1, 3, 2, 1]))
  doubled = session.with_splits(session.splits.with_parts(eval=evals))
  run_dir = run_folder.RunDir.open(str(tmp_path / "run"), {"stage": "test"})
  task = fidelity.Task(doubled, settings, run_dir)
  assert task.queries.tolist() == [0, 1, 3] and task.query_of.tolist() == [0, 1, 0, 2, 1]
  cell = task.scores(fidelity.Variant("identity", "last:1", np.nan, "base"))
  chosen = choose(doubled, doubled.model.params, "last:1", "all")
  every = query_scores(doubled, settings.replace(solver="identity"), chosen, Work(run_dir))
  np.testing.assert_allclose(np.array(cell["scores"])[task.query_of], every, rtol=1e-4, atol=1e-6)


def test_mean_loss_weighs_as_the_gradients_do(settings, session):
  tokens = session.splits["eval"].num_response_tokens
  losses = np.arange(1.0, len(tokens) + 1)
  losses[tokens == 0] = 0
  assert fidelity.mean_loss(session, "eval", losses) == pytest.approx(losses[tokens > 0].mean())
  by_sum = open_session(settings.replace(loss_reduction="sum"))
  assert fidelity.mean_loss(by_sum, "eval", losses) == pytest.approx((losses * tokens).sum() / tokens.sum())


def test_variants_change_one_thing_at_a_time(settings):
  found = fidelity.variants_of(settings.replace(lds_layers="last:1;0,1", lds_ratios="0.5,0.1"))
  assert found[0] == fidelity.Variant("cg", "last:1", 0.5, "full") and len(found) == len(set(found)) == 7
  assert all(len(variant.differs(found[0])) <= 2 for variant in found)
  assert [v.name for v in found if v.solver == "identity"] == [
    "identity, last:1, full",
    "identity, 0,1, full",
    "identity, last:1, base",
  ]
  assert found[1].differs(found[0]) == ["ratio"]
  some = settings.replace(lds_solvers="identity,cg,ekfac", lds_every=False)
  assert [v.name for v in fidelity.variants_of(some) if v.solver == "ekfac"] == ["ekfac, last:1, damping 0.5, full"]
  assert fidelity.variants_of(some)[:-1] == fidelity.variants_of(settings)
  exact = fidelity.variants_of(settings.replace(lds_solvers="metagradient,identity,cg"))
  assert exact[:-1] == fidelity.variants_of(settings) and exact[-1].name == "metagradient, last:1, training"
  for changes, text in (
    ({"lds_solvers": "identity"}, "lacks it"),
    ({"lds_solvers": "cg,newton"}, "unknown 'newton'"),
    ({"lds_at": "full,full"}, "given twice"),
    ({"lds_layers": ""}, "at least one word"),
    ({"lds_ratios": "0"}, "above 0"),
  ):
    with pytest.raises(UserError, match=text):
      fidelity.variants_of(settings.replace(**changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"halves": 2, "halves_again": 0}, "--halves=2: .* needs 3 or more"),
    ({"halves_again": 1}, "--halves_again=1: .* or 0 for no noise ceiling"),
    ({"left_out": "0.2,1"}, "1 of 30 training examples leaves nothing to train on"),
    ({"left_out": "0.01"}, "0.01 of 30 training examples leaves nothing out"),
    ({"checkpoint": "runs/x"}, "--checkpoint=runs/x: fidelity compares plain influence"),
    ({"damping": 0.1}, "--damping=0.1: "),
    ({"normalize": "cosine"}, "--normalize=cosine: "),
    ({"score_path": "projected"}, "--score_path=projected: "),
    ({"precondition": "ekfac"}, "^--lds_solvers=identity,cg: --precondition=ekfac with --solver=identity"),
    ({"lds_solvers": "cg,ekfac", "curvature": "hessian"}, "^--lds_solvers=cg,ekfac: --solver=ekfac with --curvature"),
    (
      {"lds_solvers": "cg,exact", "lds_layers": "all"},
      "^--lds_solvers=cg,exact, exact, all, .* 4,672 parameters, more",
    ),
    ({"lds_solvers": "cg,metagradient", "trainable": "lora"}, "^--lds_solvers=cg,meta.*, metagradient: fresh LoRA"),
    ({"lds_solvers": "cg,low_rank", "krylov": 9999}, "^--lds_solvers=cg,low_rank, .*: lower --krylov"),
    ({"lds_layers": "last:1;last:9"}, "^--lds_layers=last:9: 9 is not between"),
  ],
)
def test_what_has_no_answer_is_refused_before_the_work(settings, session, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    fidelity.run(settings.replace(run_dir=str(tmp_path / "run"), **changes), session)
  assert not (tmp_path / "run").exists()


def test_what_is_of_no_use_is_not_refused(settings):
  """Flagfiles are shared between stages: a budget, a list of seeds, another way to the same scores."""
  shared = settings.replace(budget=0.1, score_path="vmap", damping_ratio=0.5, layers="all", write="query")
  assert refuse(shared, fidelity._REFUSED, fidelity._DOES) is None


def test_half_of_is_a_half_and_does_not_depend_on_the_others():
  rows = np.arange(3, 34)
  first, second = (fidelity.half_of(rows, 0, number) for number in (0, 1))
  assert len(first) == len(set(first)) == 15 and set(first) <= set(rows) and set(first) != set(second)
  np.testing.assert_array_equal(first, fidelity.half_of(rows, 0, 0))
  assert set(fidelity.half_of(rows, 1, 0)) != set(first)


@pytest.mark.slow
@pytest.mark.real
def test_fidelity_writes_its_tables_and_keeps_finished_cells(settings, session, monkeypatch):
  folder = pathlib.Path(fidelity.run(settings, session))
  result = json.loads((folder / "fidelity.json").read_text())
  assert [(row["solver"], row["gradients at"]) for row in result["lds"]] == [
    *[("cg", "full"), ("cg", "full"), ("cg", "base"), ("identity", "full"), ("identity", "base")]
  ]
  assert all(-1 <= row["both low"] <= row["LDS"] <= row["both high"] <= 1 for row in result["lds"])
  assert len({row["LDS"] for row in result["lds"]}) > 2  # each with scores of its own
  assert [row["minus that of"] for row in result["differences"]] == ["identity, last:1, full"] * 2 + [
    "identity, last:1, base"
  ]
  assert [(row["left out"], row["seeds"]) for row in result["curves"]] == [
    *[("nothing", 1), ("top, cg", 1), ("opponents, cg", 1), ("random", 2)]
  ]
  assert [row["examples"] for row in result["curves"]] == [0, 6, 6, 6]
  assert -1 <= result["ceiling"]["mean"] <= 1
  text = (folder / "fidelity.md").read_text()
  assert "Solver: " in text and "Damping ratio: " in text and "random halves" in text and "Without top, cg" in text
  names = ["fidelity.csv", "fidelity.tex", "curves.csv", "curves.tex", "plots/lds.svg", "plots/curve-eval.png"]
  assert all((folder / name).stat().st_size > 100 for name in names)
  # The cells hold what the table was made of: the first half, trained again by hand.
  task = fidelity.Task(session, settings, run_folder.RunDir.load(str(folder)))
  judge = Retrainer(session, settings, [task.rows, *task.halves])
  again = judge.losses(judge.train(task.halves[0], 0, "again").sub, "eval")
  np.testing.assert_allclose(task.losses()[0][0], again, rtol=1e-6)
  assert not np.allclose(task.losses()[1][0], again, rtol=1e-6)  # the other seed
  # Again: the same files, and nothing is trained or solved.
  (folder / "fidelity.json").unlink()
  monkeypatch.setattr(Retrainer, "train", lambda *_: pytest.fail("a finished training was done again"))
  monkeypatch.setattr(fidelity, "query_scores", lambda *_: pytest.fail("finished scores were computed again"))
  fidelity.run(settings, session)
  assert json.loads((folder / "fidelity.json").read_text()) == result and (folder / "fidelity.md").read_text() == text
  fewer = settings.replace(halves=5, lds_ratios="0.5", curve_solvers="")  # shows fewer of the same cells
  fidelity.run(fewer, session)
  assert json.loads((folder / "fidelity.json").read_text())["curves"] == []
  with pytest.raises(UserError, match="cg_steps is 4 there and 5 now"):
    fidelity.run(settings.replace(cg_steps=5), session)
  with pytest.raises(UserError, match="at most as many"):
    fidelity.run(settings.replace(halves_again=7), session)


@pytest.mark.slow
@pytest.mark.real
def test_metagradients_foretell_the_losses_of_retrained_halves(settings, session, tmp_path):
  s = settings.replace(run_dir=str(tmp_path / "run"), lds_solvers="cg,metagradient", halves=24, halves_again=0)
  s = s.replace(lds_ratios="0.5", lds_at="full", curve_solvers="", learning_rate=3e-3, query_block=3)
  folder = pathlib.Path(fidelity.run(s, session))
  rows = {row["solver"]: row for row in json.loads((folder / "fidelity.json").read_text())["lds"]}
  assert (rows["metagradient"]["gradients at"], rows["metagradient"]["damping ratio"]) == ("training", None)
  print({name: (row["LDS"], row["both low"]) for name, row in rows.items()})
  assert rows["metagradient"]["both low"] > 0
  assert "Metagradient: exact through the training" in (folder / "fidelity.md").read_text()
  # Blocks of queries are not seen in the numbers: their mean is the metagradient of the mean loss.
  run_dir = run_folder.RunDir.open(str(tmp_path / "other"), {"stage": "test"})
  queries = np.arange(len(session.splits["eval"]))
  found = query_metagradients(session, s, queries, (s.seed,), Work(run_dir))
  np.testing.assert_allclose(found.mean(axis=0), metagradient(session, s), rtol=1e-3, atol=1e-4 * np.abs(found).max())


# ---- intervals -----------------------------------------------------------------------


def made(noise: float, seed: int = 0, subsets: int = 64, queries: int = 12, examples: int = 40):
  """True scores, masks, and losses that the scores foretell up to noise."""
  rng = np.random.default_rng(seed)
  scores = rng.standard_normal((queries, examples))
  masks = rng.random((subsets, examples)).argsort(axis=1) < examples // 2
  clean = -(masks @ scores.T)
  return scores, masks, clean, clean + noise * clean.std() * rng.standard_normal(clean.shape)


def test_measure_is_evaluation_lds_and_its_intervals_widen_in_order():
  scores, masks, _, losses = made(1.0)
  found = datamodeling.measure(scores, masks, losses)
  interval, by_query = statistics.lds(scores, masks, losses)
  np.testing.assert_array_equal(found.by_query, by_query)
  assert found.queries == interval and found.mean == interval.mean and 0.5 < found.mean < 0.8
  width = lambda interval: interval.high - interval.low  # noqa: E731
  assert width(found.both) > max(width(found.queries), width(found.subsets))
  assert found.both.low < found.mean < found.both.high
  perfect = datamodeling.measure(scores, masks, made(0.0)[3])
  assert perfect.mean == pytest.approx(1) and perfect.both.low == pytest.approx(1)


def test_redrawn_correlations_are_those_of_scipy_on_the_redrawn_subsets():
  scores, masks, _, losses = made(1.0, subsets=9, queries=3)
  found = datamodeling.measure(scores, masks, losses, seed=5, draws=20)
  rows = np.random.default_rng(5).integers(0, 9, (20, 9))
  predicted = masks @ scores.T
  wanted = [[statistics.spearman(predicted[some, q], -losses[some, q]) for q in range(3)] for some in rows]
  np.testing.assert_allclose(found.drawn, wanted, atol=1e-12)


def test_the_interval_over_models_covers_other_models():
  """The mean over queries of LDS on fresh subsets falls into `both` nearly always; what all queries share is noise."""
  inside = []
  for seed in range(30):
    scores, masks, clean, _ = made(0.0, seed, subsets=40, queries=6)
    rng = np.random.default_rng((seed, 1))
    shared = 1.5 * clean.std(axis=0) * rng.standard_normal((len(masks), 1))  # a training's luck hits all queries alike
    found = datamodeling.measure(scores, masks, clean + shared, seed, draws=150)
    truth = 6 / np.pi * np.arcsin(1 / np.sqrt(1 + 1.5**2) / 2)  # of two normal variables with that correlation
    inside.append((found.both.low <= truth <= found.both.high, found.queries.low <= truth <= found.queries.high))
  both, queries = np.mean(inside, axis=0)
  assert both >= 0.85 and queries < both - 0.1


def test_differences_are_paired():
  scores, masks, _, losses = made(1.0)
  worse = scores + 0.7 * np.random.default_rng(3).standard_normal(scores.shape)
  good, bad = (datamodeling.measure(values, masks, losses) for values in (scores, worse))
  change = good.minus(bad)
  assert change.mean == pytest.approx(good.mean - bad.mean) and change.both.low > 0
  assert change.both.high - change.both.low < good.both.high - good.both.low
  assert good.minus(good).both.high == 0
  with pytest.raises(UserError, match="cannot be paired"):
    good.minus(datamodeling.measure(scores, masks[:9], losses[:9]))
  with pytest.raises(UserError, match="cannot be paired"):
    good.minus(datamodeling.measure(scores, masks, losses, seed=1))


def test_a_query_without_order_is_left_out():
  scores, masks, _, losses = made(1.0)
  losses[:, 4] = 0
  found = datamodeling.measure(scores, masks, losses)
  rest = datamodeling.measure(np.delete(scores, 4, 0), masks, np.delete(losses, 4, 1))
  assert np.isnan(found.by_query).tolist() == [query == 4 for query in range(12)] and found.both.count == 11
  assert (found.mean, found.queries) == (pytest.approx(rest.mean), rest.queries)
  assert found.subsets.low == pytest.approx(rest.subsets.low) and np.isfinite(found.both.low)
  with pytest.raises(UserError, match="nothing can be correlated"):
    datamodeling.agreement(np.zeros((4, 2)), np.zeros((4, 2)))
  with pytest.raises(UserError, match="at least 3"):
    datamodeling.agreement(losses[:2], losses[:2])


def test_the_ceiling_is_what_the_true_scores_reach():
  scores, masks, clean, first = made(1.0, subsets=400)
  second = clean + clean.std() * np.random.default_rng(9).standard_normal(clean.shape)
  repeated = datamodeling.agreement(first, second, draws=10)
  reached = datamodeling.measure(scores, masks, first, draws=10).mean
  assert repeated.mean < 0.6 and datamodeling.ceiling(repeated) == pytest.approx(reached, abs=0.05)
  assert np.isnan(datamodeling.ceiling(datamodeling.agreement(first, -first, draws=10)))


# ---- sentences -----------------------------------------------------------------------


def test_conclusions_say_no_more_than_the_intervals():
  scores, masks, _, losses = made(0.5)
  rng = np.random.default_rng(2)
  blurred = lambda much: scores + much * rng.standard_normal(scores.shape)  # noqa: E731
  name = fidelity.Variant
  values = {
    name("cg", "last:1", 0.1, "full"): blurred(1.0),
    name("cg", "last:1", 0.01, "full"): blurred(1.0),
    name("identity", "last:1", np.nan, "full"): blurred(3.0),
    name("ekfac", "last:1", 0.1, "full"): scores,
    name("ekfac", "last:1", 0.01, "full"): scores,
  }
  measured = {variant: datamodeling.measure(each, masks, losses) for variant, each in values.items()}
  solver, damping = report.conclusions(measured)
  assert solver.startswith("Solver: ekfac has the highest LDS") and "above cg, identity by more" in solver
  assert solver.endswith("It follows: ekfac rather than cg.")
  assert damping.startswith("Damping ratio: 0.") and damping.endswith(
    "LDS does not speak against 0.1; the seconds are in the table."
  )
  rows = report.difference_rows(measured)
  assert [(row["LDS of"], row["minus that of"]) for row in rows] == [
    ("cg, last:1, damping 0.1, full", "identity, last:1, full"),
    ("cg, last:1, damping 0.01, full", "identity, last:1, full"),
  ]


def test_a_default_without_damping_is_compared_with_the_others_first():
  scores, masks, _, losses = made(0.5)
  name = fidelity.Variant
  ways = [name("identity", "last:1", np.nan, "full"), name("identity", "last:1", np.nan, "base")]
  ways += [name("cg", "last:1", ratio, "full") for ratio in (0.01, 0.1)]
  measured = {way: datamodeling.measure(scores, masks, losses) for way in ways}
  solver, at = report.conclusions(measured)
  assert solver.startswith("Solver: identity has the highest LDS")
  assert solver.endswith("cannot be distinguished from cg.")
  assert at.startswith("Where gradients are taken: ")


def left_out(what, seed, loss):
  """A training of the leave-out curves, judged on 20 examples that all differ alike."""
  facts = {"what": what, "share": 0.1, "seed": seed, "examples": 3, "response_tokens": 9}
  points = {"tokens": np.full(20, 7), "groups": np.arange(20), "by": "example"}
  judged = {"eval": loss, "test": 1.0 + seed}
  losses = {part: points | {"losses": value + np.linspace(-1, 1, 20)} for part, value in judged.items()}
  return facts | judged | {"points": losses}


def test_what_the_noise_does_not_tell_is_said():
  _, _, _, losses = made(0.5)
  said = report.ceiling_sentence(datamodeling.agreement(losses, -losses, draws=10), 8)
  assert "no better than chance, so nothing can be said" in said and "nan" not in said
  said = report.ceiling_sentence(datamodeling.agreement(losses, losses, draws=10), 8)
  assert "an LDS of about 1.00, the square root (1.00 to 1.00)." in said
  once = [left_out("top, cg", 0, 2.0), left_out("random", 0, 1.0)]
  rows = report.curve_rows(once)
  assert report.printed_curves(rows)[0]["eval minus random"] == "+1.000 (one seed each)"
  assert report.curve_sentences(rows)[0] == (
    "Without top, cg: eval loss cannot be distinguished from random's by one seed each."
  )


def test_curves_are_compared_with_random_sets_of_the_same_size():
  curves = [left_out("top, cg", 0, 2.0), left_out("opponents, cg", 0, 1.05)]
  curves += [left_out("random", seed, 1.0 + 0.1 * seed) for seed in range(3)]
  rows = report.curve_rows(curves)
  assert rows[0]["eval minus random"] == pytest.approx(0.9) and rows[0]["eval change low"] > 0
  lines = report.curve_sentences(rows)
  assert lines[0] == "Without top, cg: eval loss above random's at 10%."
  assert lines[2] == "Without opponents, cg: eval loss cannot be distinguished from random's at any share."
