"""The environment of `interop`, without what would be installed, and what it says of two losses.

TRL itself runs in the command: `./run.sh interop`.
"""

import pathlib
import sys

import pytest

from experiments.interop import environment, interop
from in2core_jax.errors import UserError


@pytest.fixture
def pins(tmp_path) -> pathlib.Path:
  path = tmp_path / "requirements.txt"
  path.write_text("one==1\n")
  return path


def test_an_environment_is_made_once_and_again_when_its_pins_change(pins, tmp_path, monkeypatch):
  calls, cache = [], tmp_path / "cache"

  def install(command, trace, mode):
    calls.append(command)
    if "venv" in command:
      python = pathlib.Path(command[-1]) / "bin" / "python"
      python.parent.mkdir(parents=True)
      python.write_text(str(len(calls)))
    elif pins.read_text() == "broken\n":
      raise UserError("pip says no")

  monkeypatch.setattr(environment, "_call", install)
  python = environment.python(pins, cache)
  assert python == cache / "interop" / "bin" / "python" and python.read_text() == "1"
  assert calls[1][-2:] == ["-r", str(pins)] and str(cache / "interop.new") in calls[1][0]
  assert environment.python(pins, cache) == python and len(calls) == 2
  pins.write_text("one==2\n")
  (cache / "interop.new").mkdir()  # of a set-up that was killed
  assert environment.python(pins, cache).read_text() == "3"
  pins.write_text("broken\n")
  with pytest.raises(UserError, match="pip says no"):
    environment.python(pins, cache)
  assert python.read_text() == "3"  # the old one stays
  assert {path.name for path in cache.iterdir()} == {"interop", "interop-setup"}


@pytest.mark.parametrize(
  ("said", "told"),
  [
    ("ERROR: No matching distribution found for torch==9", "No matching distribution found for torch==9"),
    ("OSError: [Errno 28] No space left on device", "disk full while installing"),
    ("WARNING: NewConnectionError\nERROR: Could not find a version", "no network"),
    ("", "could not be made"),
  ],
)
def test_what_pip_says_becomes_one_line(said, told, tmp_path):
  command = [sys.executable, "-c", f"print({said!r}); raise SystemExit(1)"]
  with pytest.raises(UserError, match=told):
    environment._call(command, tmp_path / "log", "wb")


def test_the_pins_are_exact():
  lines = [line for line in environment.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
  assert all("==" in line for line in lines) and {"torch", "trl"} <= {line.split("==")[0] for line in lines}


def test_the_table_says_whether_the_losses_are_the_same():
  theirs = {"loss": 9.5, "examples": 8, "same_ids": True, "versions": {"trl": "1.0"}, "batches": 1}
  result = {"ours": 9.5, "theirs": theirs, "relative_error": 0.0, "rtol": 1e-5, "same": True}
  assert "| trl | 1.0 |" in interop.table(result) and "8 examples in one batch: the same" in interop.table(result)
  assert "NOT THE SAME" in interop.table(result | {"same": False, "theirs": theirs | {"same_ids": False}})


def test_a_step_that_fails_is_told_in_one_line(tmp_path):
  with pytest.raises(UserError, match="the step of TRL has failed: "):
    interop.trl_loss(pathlib.Path(sys.executable), tmp_path, tmp_path, tmp_path / "out.json")
