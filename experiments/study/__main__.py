from experiments import cli, flags
from experiments.study.study import __doc__, main  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  flags.define(run_dir="runs/study", seeds="0,1,2,3,4", fixed_seeds="0,1,2")
  cli.run(main, alone=True)
