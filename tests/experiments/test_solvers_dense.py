"""The comparison with dense inverses: its rows, and that they measure what they say."""

import json
import pathlib

import pytest
from tiny import quick_compile  # noqa: F401, an autouse fixture

from experiments import flags, oracle
from experiments.settings import OracleFlags
from experiments.solvers import dense, solvers
from experiments.solvers.settings import SolversSettings
from in2core_jax.errors import UserError
from in2core_jax.ihvp.solvers import DivergenceError, NegativeCurvatureError


@pytest.mark.slow
@pytest.mark.real
def test_rows_measure_the_distance_to_the_dense_inverse(x64, tmp_path, monkeypatch):
  monkeypatch.setattr(dense, "STEPS", 30)
  monkeypatch.setattr(dense, "EXAMPLES", 24)
  monkeypatch.setattr(dense, "RATIOS", (0.1,))
  monkeypatch.setattr(dense, "CURVATURES", ("ggn",))
  monkeypatch.setattr(dense, "SOLVERS", {name: dense.SOLVERS[name] for name in ("lissa", "cg", "identity")})
  folder = pathlib.Path(dense.run(SolversSettings(run_dir=str(tmp_path / "run"), dense=60)))
  rows = {row["solver"]: row for row in json.loads((folder / "oracle.json").read_text())["rows"]}
  assert rows["cg"]["error"] < 1e-6
  assert rows["cg"]["reported residual"] == pytest.approx(rows["cg"]["residual"], abs=1e-9)
  assert rows["lissa"]["reported residual"] == pytest.approx(rows["lissa"]["residual"], rel=1e-6)
  assert rows["lissa, all examples a step"]["error"] < 0.05 < rows["identity"]["error"]
  assert 1e-6 < rows["lissa"]["error"] < 1
  assert "| ggn |" in (folder / "oracle.md").read_text()


def test_the_flag_and_the_old_command_start_the_same_comparison(monkeypatch, caplog):
  started = []
  monkeypatch.setattr(dense, "start", started.append)
  monkeypatch.setattr(flags, "read", lambda kind: OracleFlags() if kind is OracleFlags else SolversSettings(dense=400))
  solvers.main([])
  with caplog.at_level("INFO"):
    oracle.main([])
  assert [(s.dense, s.run_dir) for s in started] == [(400, "runs/solvers"), (400, "runs/oracle")]
  assert "oracle is now solvers --dense=400; the old name works for one more release" in caplog.text


def test_a_model_of_the_users_is_refused(tmp_path):
  with pytest.raises(UserError, match="--model=gemma3: --dense compares on a small model and data of its own"):
    dense.run(SolversSettings(run_dir=str(tmp_path), dense=400, model="gemma3"))


@pytest.mark.parametrize(
  ("error", "cell"),
  [
    (DivergenceError("LiSSA: whatever it says: more", 20), "diverged at step 20"),
    (DivergenceError("ekfac: the right-hand side holds NaN"), "diverged"),
    (NegativeCurvatureError("low rank: -3"), "met negative curvature"),
    (UserError("--solver=ekfac with --curvature=hessian"), "not for this curvature"),
  ],
)
def test_a_row_without_an_error_says_why_in_plain_words(error, cell):
  assert dense.reason(error) == cell


def test_older_folders_of_solvers_go_on():
  assert "dense" not in SolversSettings().identity("solvers")
