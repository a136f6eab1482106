"""Whether another trainer gets the same loss: one step of TRL's SFTTrainer on a model and a coreset that we wrote.

./run.sh interop --run_dir=runs/interop

Writes interop.md into --run_dir; exit code 1 when the losses differ.
"""

from experiments import cli, flags
from experiments.interop import interop
from experiments.settings import InteropFlags


def main(_) -> int:
  """Entry point; exit code 1 when the losses differ."""
  return 0 if interop.run(flags.read(InteropFlags)) else 1


if __name__ == "__main__":
  flags.define(InteropFlags)
  cli.run(main, alone=True)
