"""Commands that keep much: one flipped bit in every file that they leave, and kills of all processes of `paper`."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from tiny import open_session, quick_compile, run_settings  # noqa: F401, an autouse fixture

from experiments import kill_test
from experiments.paper.settings import PaperSettings
from experiments.study import study
from experiments.study.settings import StudySettings
from in2core_jax.errors import UserError
from in2core_jax.pipeline import evaluate, finetune
from in2core_jax.runs import locks, run_folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  small = {"solver": "identity", "sketch_size": 4, "train_limit": 24, "eval_limit": 8, "test_limit": 8, "steps": 4}
  small |= {"policies": "full,random,bm25", "variants": "matching; highest loss", "checkpoint_every": 2}
  return run_settings(tmp_path_factory.mktemp("strength"), kind=StudySettings, **small)


@pytest.fixture(scope="module")
def opened(settings):
  return open_session(settings)


def flip_a_bit(path: pathlib.Path) -> None:
  data = path.read_bytes()
  at = random.Random(len(data)).randrange(len(data))
  path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("command", [finetune, evaluate, study], ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_flipped_bit_in_any_file_is_refused_by_its_name_or_mended(settings, opened, tmp_path, command):
  """After the next run every result has its bytes again, or one line names the file and nothing was used."""
  s = settings.replace(run_dir=str(tmp_path / "run"))
  folder = pathlib.Path(s.run_dir)
  command.run(s, opened)
  wanted, refused = kill_test.results_of(folder), set()
  files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != locks.NAME]
  shutil.copytree(folder, tmp_path / "whole")
  for path in filter(lambda path: path.stat().st_size, files):
    flip_a_bit(path)
    try:
      if path.is_relative_to(folder / "checkpoint" / "2"):  # only who reads that step reads it
        same_weights(opened, tmp_path, 2)
      else:
        command.run(s, opened)
        others = kill_test.differences(wanted, kill_test.results_of(folder))
        unread = "cells" in path.parts and others == [str(path.relative_to(folder))]  # a step before the last result
        assert unread or not others and not run_folder.RunDir.load(folder).damaged(), path
    except UserError as error:
      assert "\n" not in str(error) and (path.name in str(error) or "step 2" in str(error) or "2 is no" in str(error))
      refused.add(path.relative_to(folder).parts[0])
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "whole", folder)
  assert refused == {run_folder.MANIFEST} | ({"checkpoint"} if command is finetune else set())


def same_weights(opened, place: pathlib.Path, step: int) -> None:
  ours, whole = (opened.checkpoint_params(str(place / name / "checkpoint"), step) for name in ("run", "whole"))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


PAPER = """
import pathlib, sys
from experiments import cli, flags
from experiments.paper import job, paper
from experiments.paper.settings import PaperSettings
from experiments.paper.steps import Step
job.FLAGS = pathlib.Path(sys.argv.pop(1))
paper.STEPS = (
  Step("scores", "select", "report", "own.flags", "scores"),
  Step("judged", "evaluate", "evaluation", "own.flags", "trainings", ("--select_runs={runs}/scores",)),
)
flags.define(PaperSettings)
cli.run(paper.main)
"""
_TIMES = ("seconds", "date", "machine", "commit")


def results_of(folder: pathlib.Path) -> dict[str, object]:
  """What paper has made, without times."""
  found = {name: kill_test.results_of(folder / "runs" / name) for name in ("scores", "judged")}
  for path in sorted((folder / "results").rglob("*")):
    if path.suffix in (".csv", ".svg"):
      found[path.name] = path.read_bytes()
    elif path.name == "run.json":
      facts = json.loads(path.read_text())
      found[f"{path.parent.name}/run.json"] = {name: facts[name] for name in facts if name not in _TIMES}
  return found


@pytest.mark.slow
def test_a_paper_whose_processes_are_killed_ends_in_the_same_results(settings, tmp_path):
  """SIGKILL for the command and the experiment that it runs, as when a machine stops."""
  (tmp_path / "own.flags").write_text("\n".join(settings.replace(run_dir="").as_flags()))

  made = tmp_path / "made"  # one place for both, as paths of runs are in what evaluate writes

  def start(moment=None):
    s = PaperSettings(run_dir=str(made / "runs"), results_dir=str(made / "results"))
    command = [sys.executable, "-c", PAPER, str(tmp_path), *s.as_flags(), f"--model={settings.model}"]
    variables = tiny.child_environment(devices=1)
    with (tmp_path / "log").open("a") as log:
      process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
      try:
        return process.wait(moment)
      except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None

  began = os.times().elapsed
  assert start() == 0, (tmp_path / "log").read_text()[-3000:]
  took = os.times().elapsed - began
  wanted, kills = results_of(made), 0
  shutil.rmtree(made)
  for moment in kill_test.moments(3, took, seed=5):
    kills += start(moment) is None
  assert start() == 0, (tmp_path / "log").read_text()[-3000:]
  assert kills >= 1 and results_of(made) == wanted
