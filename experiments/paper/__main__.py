from experiments import cli, flags
from experiments.paper.paper import __doc__, main  # noqa: F401 -- __doc__ is the text of --help
from experiments.paper.settings import PaperSettings

if __name__ == "__main__":
  flags.define(PaperSettings)
  cli.run(main, alone=True)
