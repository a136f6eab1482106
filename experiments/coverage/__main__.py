from experiments import cli, flags
from experiments.coverage.coverage import __doc__, main  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  flags.define(run_dir="runs/coverage", layers="last:2", trainable_layers="last:2", solver="identity")
  cli.run(main, alone=True)
