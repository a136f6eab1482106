from experiments import cli, flags
from experiments.ablate_layers.ablate_layers import __doc__, main  # noqa: F401 -- __doc__ is the text of --help
from experiments.ablate_layers.settings import AblateLayersSettings

if __name__ == "__main__":
  flags.define(AblateLayersSettings)
  cli.run(main, alone=True)
