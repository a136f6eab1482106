"""The command of an installed package: names, help, mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import console

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
  code = f"import sys; sys.argv[1:] = {list(arguments)!r}; from experiments import console; console.main()"
  return subprocess.run(
    [sys.executable, "-P", "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
  )


def test_commands_are_those_of_run_sh():
  shown = subprocess.run([ROOT / "run.sh", "help"], capture_output=True, text=True, check=True).stdout
  assert set(console.commands()) <= set(re.findall(r"\w+", shown)) and {"select", "study", "demo"} < set(
    console.commands()
  )


@pytest.mark.parametrize(
  ("arguments", "code", "words"),
  [
    ((), 0, "usage: in2core-jax COMMAND"),
    (("selct",), 2, "unknown command 'selct'; did you mean select?"),
    (("xyz",), 2, "unknown command 'xyz'; commands: ablate_layers"),
    (("select", "--no_such=1"), 2, "no_such"),
    (("study", "--help"), 0, "run_dir"),
  ],
)
def test_what_a_word_does(arguments, code, words):
  done = run(*arguments)
  assert done.returncode == code and words in done.stdout + done.stderr
  assert "Traceback" not in done.stderr
