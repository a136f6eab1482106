"""The command `in2core-jax NAME --flag=...` of an installed package, the same as `python -m experiments.NAME ...`."""

import difflib
import pathlib
import runpy
import sys
from typing import NoReturn

_HERE = pathlib.Path(__file__).parent
MAIN = {  # run.sh reads these lines too
  "demo": "the whole chain on a small model and data: fine-tune, choose, retrain, judge",
  "recommend": "try the rules on your data: which examples to train on, how many, and is it as good",
  "finetune": "fine-tune on all examples",
  "select": "score the training examples and choose a coreset",
  "evaluate": "retrain on chosen sets and compare them",
}


def commands() -> list[str]:
  """Names of the modules and packages in this folder that run as programs."""
  own = [path.stem for path in _HERE.glob("*.py") if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]
  return sorted([*own, *(path.parent.name for path in _HERE.glob("*/__main__.py"))])


def usage() -> str:
  """The main commands with a line each, then the others."""
  others = " ".join(name for name in commands() if name not in MAIN)
  head = "usage: in2core-jax COMMAND [flags]     (--help after a command lists its flags)"
  return "\n".join([head, "", *(f"  {name:<10} {job}" for name, job in MAIN.items()), "", f"others: {others}"])


def main() -> NoReturn:
  """Runs the command that the first argument names."""
  name = sys.argv[1] if len(sys.argv) > 1 else "help"
  if name in ("help", "-h", "--help"):
    print(usage())
    sys.exit(0)
  if name not in commands():
    near = difflib.get_close_matches(name, commands(), 1)
    hint = f"did you mean {near[0]}?" if near else f"commands: {' '.join(commands())}"
    print(f"error: unknown command '{name}'; {hint}", file=sys.stderr)
    sys.exit(2)
  own = [f"--flagfile={_HERE / 'flags' / 'demo.flags'}"] if name == "demo" else []  # as ./run.sh demo
  sys.argv = [name, *own, *sys.argv[2:]]
  runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
  sys.exit(0)  # not reached: commands exit by themselves
