"""The public functions: what a notebook calls, against what the commands write."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
from tiny import CONFIG, open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

import in2core_jax as i2c


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  small = dataclasses.replace(CONFIG, num_layers=2)
  changes = {"layers": "last:1", "trainable_layers": "last:1", "steps": 3, "policies": "full,random", "seeds": "0"}
  return run_settings(tmp_path_factory.mktemp("api"), small, fixed_seeds="0", **changes)


@pytest.fixture(scope="module")
def session(settings):
  return open_session(settings)


@pytest.fixture(scope="module")
def chain(settings, session, tmp_path_factory):
  folder = tmp_path_factory.mktemp("chain")
  tuned = i2c.finetune(settings, session=session, run_dir=folder / "finetune")
  chosen = i2c.select(settings, session=session, run_dir=folder / "select", checkpoint=tuned.checkpoint, budget=0.25)
  judged = i2c.evaluate(
    settings, session=session, run_dir=folder / "evaluate", select_runs=[chosen], checkpoint=tuned.checkpoint
  )
  return tuned, chosen, judged


def test_results_are_what_the_run_folders_hold(chain):
  tuned, chosen, judged = chain
  assert tuned.summary == json.loads((tuned.run_dir / "finetune.json").read_text()) and tuned.checkpoint.is_dir()
  lines = chosen.coreset.read_text().splitlines()
  assert len(chosen.ids) == len(lines) == chosen.summary["selected"] and chosen.scores.num_rows == 40
  assert {"example_id", "influence", "rank", "selected", "topic"} <= set(chosen.scores.column_names)
  assert judged.table.column("policy").to_pylist() == [row["policy"] for row in judged.summary["table"]]
  assert {"full", "random"} < set(judged.table.column("policy").to_pylist()) and judged.verdict
  for result in chain:
    again = i2c.load(result.run_dir)
    assert type(again) is type(result) and again.summary == result.summary and repr(again) == repr(result)


def test_the_same_call_reads_what_is_there(chain, settings, session, monkeypatch):
  tuned, chosen, _ = chain
  monkeypatch.setattr("in2core_jax.pipeline.select.score", lambda *_: pytest.fail("scored again"))
  same = settings.replace(run_dir=str(chosen.run_dir), checkpoint=str(tuned.checkpoint), budget=0.25)
  assert i2c.select(same, session=session).ids == chosen.ids


def test_results_are_shown_as_text_and_in_notebooks(chain):
  for result in chain:
    text, page = repr(result), result._repr_html_()
    assert str(result.run_dir) in text and "<table>" in page and page.count("<table>") == page.count("</table>")
  assert " --" not in repr(chain[1]) and "dedup=True" in repr(chain[1])  # parameters, not flags
  assert "| choice |" in repr(chain[1]) and "10 of 40 examples" in repr(chain[1])
  assert "| policy |" in repr(chain[2]) and chain[2].verdict[0] in repr(chain[2])


def test_texts_of_a_data_set_are_escaped_in_notebooks(chain):
  hostile = i2c.load(chain[1].run_dir)
  object.__setattr__(hostile, "warnings", ("<script>alert(1)</script>",))
  assert "<script>" not in hostile._repr_html_() and "&lt;script&gt;" in hostile._repr_html_()


def test_mistakes_are_told_in_the_callers_words(settings, session, tmp_path):
  with pytest.raises(i2c.UserError, match="^no_such is no setting"):
    i2c.select(settings, no_such=1)
  with pytest.raises(i2c.UserError) as told:
    i2c.select(settings, session=session, run_dir=tmp_path / "x", budget=0.0)
  assert "--budget" not in str(told.value) and "budget=0.0" in str(told.value)
  with pytest.raises(i2c.UserError, match="no finished|no run folder|manifest"):
    i2c.load(tmp_path)


def test_importing_the_package_loads_neither_jax_nor_transformers():
  code = "import sys, in2core_jax; print(in2core_jax.__version__, {'jax', 'transformers', 'absl'} & set(sys.modules))"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1]
  )
  assert done.stdout.split(" ", 1)[1].strip() == "set()", done.stderr
  assert "select" in dir(i2c) and not hasattr(i2c, "nothing")


def test_the_library_knows_no_flags_and_ends_no_process():
  for path in (pathlib.Path(__file__).parents[1] / "in2core_jax").rglob("*.py"):
    text = path.read_text()
    assert "sys.exit" not in text and "import absl" not in text and "from absl" not in text, path
