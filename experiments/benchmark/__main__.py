from experiments import cli, flags
from experiments.benchmark.benchmark import __doc__, main  # noqa: F401 -- __doc__ is the text of --help
from experiments.benchmark.settings import BenchmarkSettings

if __name__ == "__main__":
  flags.define(BenchmarkSettings)
  cli.run(main)
