from experiments import cli, flags
from experiments.targets.targets import __doc__, main  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  flags.define(run_dir="runs/targets", fractions="0.1", equal="epochs")
  cli.run(main, alone=True)
