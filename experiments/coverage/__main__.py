from experiments import cli, flags
from experiments.coverage.coverage import __doc__, main  # noqa: F401 -- __doc__ is the text of --help
from experiments.coverage.settings import CoverageSettings

if __name__ == "__main__":
  flags.define(CoverageSettings)
  cli.run(main, alone=True)
