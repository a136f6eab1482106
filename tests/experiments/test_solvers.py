"""The comparison of the solvers on a small random model: what it writes, that it resumes, that divergence is told."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tiny

from experiments.solvers import solvers
from experiments.solvers.settings import SolversSettings
from in2core_jax.data.records import Record
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.ihvp import solvers as ihvp

quick_compile = tiny.quick_compile


def settings_of(folder, **changes):
  small = {
    "train_limit": 30,
    "eval_limit": 6,
    "test_limit": 6,
    "layers": "last:1",
    "curve_every": 2,
    "solver_tol": 1e-3,
    "cg_steps": 30,
    "krylov": 3,
    "steps": 3,
    "compare_ratios": "0.5,0.05",
    "agreement_ratios": "0.5",
    "compare_bfloat16": False,
    "mislabelled": 0.2,
  }
  config = dataclasses.replace(tiny.CONFIG, num_layers=2)
  return tiny.run_settings(folder, config, SolversSettings, **(small | changes))


@pytest.mark.slow
@pytest.mark.real
def test_solvers_are_compared_and_finished_cells_are_kept(tmp_path, monkeypatch):
  settings = settings_of(tmp_path)
  session = tiny.open_session(settings)
  lissa, calls = ihvp.lissa, []

  def diverging(sampled, v, key, options, on_state=None):
    calls.append(options)
    if options.acceleration == "momentum":
      raise ihvp.DivergenceError("LiSSA at step 5: the norm grows")
    return lissa(sampled, v, key, options, on_state)

  monkeypatch.setattr(ihvp, "lissa", diverging)
  folder = pathlib.Path(solvers.run(settings, session))
  result = json.loads((folder / "solvers.json").read_text())
  rows = {(row["solver"], row["damping ratio"]): row for row in result["residuals"]}
  for ratio in (0.5, 0.05):
    assert rows["lissa, momentum", ratio]["residual"] == "diverged"
    assert rows["cg", ratio]["residual"] < 1e-3 < rows["lissa, last iterate", ratio]["residual"]
    # Preconditioned or not, the same system: both stop where it is solved.
    assert rows["cg, ekfac", ratio]["residual"] < 1e-3
    assert rows["lissa", ratio]["products of one example"] == 6 * 8
    assert rows["cg", ratio]["products of one example"] == rows["cg", ratio]["steps"] * 8
  assert rows["lissa", 0.05]["residual"] > rows["lissa", 0.5]["residual"]
  table = {row[""]: row for row in result["agreement"]["0.5"] if "" in row}
  assert set(table) == {*solvers.ITERATIVE, *solvers.DIRECT, *solvers.FREE} - {"lissa, momentum"}
  assert table["cg"]["cg, ekfac"] > 0.999 and table["cg"]["cg"] == 1 and table["cg"]["lissa"] == table["lissa"]["cg"]
  assert table["cg"]["lissa"] > table["cg"]["identity"]
  found = result["mislabelled"]
  assert found["examples"] == 30 and 0 < found["wrong"] <= 6 and found["steps"] == 3
  assert all(0 <= interval["low"] <= interval["mean"] <= interval["high"] <= 1 for interval in found["auc"].values())
  text = (folder / "solvers.md").read_text()
  assert "lissa, momentum at 0.05: LiSSA at step 5: the norm grows" in text
  assert (folder / "residuals.csv").read_text().count("cg") > 4
  # Again: the same tables, and no solver runs.
  calls.clear()
  (folder / "solvers.json").unlink()
  monkeypatch.setattr(solvers.Comparison, "solve", lambda *_: pytest.fail("a finished cell was computed again"))
  solvers.run(settings, session)
  assert json.loads((folder / "solvers.json").read_text()) == result and (folder / "solvers.md").read_text() == text
  with pytest.raises(UserError, match="krylov is 3 there and 4 now"):
    solvers.run(settings.replace(krylov=4), session)


def test_answers_are_dealt_out_among_the_chosen_rows_only():
  say = lambda i, answer: Record(  # noqa: E731
    str(i), ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}), "", "{}", "test", i
  )
  records = [say(i, f"a{i}") for i in range(8)] + [say(8, "a7")]
  rows = np.array([1, 3, 4, 7, 8])
  dealt, wrong = solvers.deal_answers(records, rows, seed=0)
  answers = [record.messages[-1]["content"] for record in dealt]
  assert sorted(answers) == sorted(record.messages[-1]["content"] for record in records)
  assert [record.messages[0] for record in dealt] == [record.messages[0] for record in records]
  changed = np.array([new != old.messages[-1]["content"] for new, old in zip(answers, records, strict=True)])
  np.testing.assert_array_equal(wrong, changed)
  assert set(np.flatnonzero(wrong)) <= set(rows) and wrong.sum() >= 3
  again, _ = solvers.deal_answers(records, rows, seed=0)
  assert again == dealt
  assert any(solvers.deal_answers(records, rows, seed=seed)[0] != dealt for seed in range(1, 4))


def test_an_interval_of_a_rank_correlation_covers_its_estimate():
  rng = np.random.default_rng(0)
  a = rng.standard_normal(100)
  b = a + rng.standard_normal(100)
  interval = solvers.spearman_interval(a, b, draws=200)
  assert interval.mean == statistics.spearman(a, b) and interval.low < interval.mean < interval.high
  # Its standard error is about (1 - rho^2) / sqrt(N).
  assert 2 < (interval.high - interval.low) / ((1 - interval.mean**2) / 10) < 6
  exact = solvers.spearman_interval(a, np.exp(a), draws=50)
  assert exact.low == pytest.approx(1) and exact.high == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "0.1,x", "0.1,0", "0.1,0.1", "nan"])
def test_ratios_that_mean_nothing_are_refused(text):
  with pytest.raises(UserError, match="--compare_ratios=.* is not a list of different numbers above 0"):
    solvers.ratios(text, "compare_ratios")
  assert solvers.ratios("0.1, 0.01", "compare_ratios") == [0.1, 0.01]


def test_scores_are_compared_only_where_solutions_are(tmp_path):
  with pytest.raises(UserError, match="--agreement_ratios=0.2 must be among --compare_ratios=0.5,0.05"):
    solvers.run(settings_of(tmp_path, agreement_ratios="0.2"))


def test_layers_of_the_last_comparison_are_refused_before_the_first(tmp_path):
  settings = settings_of(tmp_path, mislabelled_layers="last:9")
  with pytest.raises(UserError, match="^--mislabelled_layers=last:9: 9 is not between 1 and 2"):
    solvers.run(settings, tiny.open_session(settings))
  assert not pathlib.Path(settings.run_dir).exists()
