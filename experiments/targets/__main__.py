from experiments import cli, flags
from experiments.targets.settings import TargetsSettings
from experiments.targets.targets import __doc__, main  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  flags.define(TargetsSettings)
  cli.run(main, alone=True)
