from experiments import cli, flags
from experiments.solvers.settings import SolversSettings
from experiments.solvers.solvers import __doc__, main  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  flags.define(SolversSettings)
  cli.run(main, alone=True)
