from experiments import cli, flags
from experiments.fidelity.fidelity import __doc__, main  # noqa: F401 -- __doc__ is the text of --help
from experiments.fidelity.settings import FidelitySettings

if __name__ == "__main__":
  flags.define(FidelitySettings)
  cli.run(main, alone=True)
