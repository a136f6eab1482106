from experiments import cli, flags
from experiments.transfer.settings import TransferSettings
from experiments.transfer.transfer import __doc__, main  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  flags.define(TransferSettings)
  cli.run(main, alone=True)
