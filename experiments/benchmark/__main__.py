from experiments import cli, flags
from experiments.benchmark.benchmark import __doc__, main  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  flags.define(run_dir="runs/benchmark")
  cli.run(main)
