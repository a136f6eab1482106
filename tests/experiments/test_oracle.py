"""The comparison with dense inverses: its rows, and that they measure what they say."""

import json
import pathlib

import pytest
from tiny import quick_compile  # noqa: F401, an autouse fixture

from experiments import oracle
from experiments.settings import OracleFlags


@pytest.mark.slow
@pytest.mark.real
def test_rows_measure_the_distance_to_the_dense_inverse(x64, tmp_path, monkeypatch):
  monkeypatch.setattr(oracle, "STEPS", 30)
  monkeypatch.setattr(oracle, "EXAMPLES", 24)
  monkeypatch.setattr(oracle, "RATIOS", (0.1,))
  monkeypatch.setattr(oracle, "CURVATURES", ("ggn",))
  monkeypatch.setattr(oracle, "SOLVERS", {name: oracle.SOLVERS[name] for name in ("lissa", "cg", "identity")})
  folder = pathlib.Path(oracle.run(OracleFlags(run_dir=str(tmp_path / "run"), depth=60)))
  rows = {row["solver"]: row for row in json.loads((folder / "oracle.json").read_text())["rows"]}
  assert rows["cg"]["error"] < 1e-6
  assert rows["cg"]["reported residual"] == pytest.approx(rows["cg"]["residual"], abs=1e-9)
  assert rows["lissa"]["reported residual"] == pytest.approx(rows["lissa"]["residual"], rel=1e-6)
  assert rows["lissa, all examples a step"]["error"] < 0.05 < rows["identity"]["error"]
  assert 1e-6 < rows["lissa"]["error"] < 1
  assert "| ggn |" in (folder / "oracle.md").read_text()
