from experiments import cli, flags
from experiments.fidelity.fidelity import __doc__, main  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  flags.define(run_dir="runs/fidelity")
  cli.run(main, alone=True)
