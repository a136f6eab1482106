from experiments import cli, flags
from experiments.study.settings import StudySettings
from experiments.study.study import __doc__, main  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  flags.define(StudySettings)
  cli.run(main, alone=True)
