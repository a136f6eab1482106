"""The old name of `solvers --dense=400`, for one more release.

./run.sh oracle --run_dir=runs/oracle
"""

import logging

from experiments import cli, flags
from experiments.settings import OracleFlags
from experiments.solvers import dense
from experiments.solvers.settings import SolversSettings

log = logging.getLogger(__name__)


def main(_) -> None:
  """Entry point."""
  s = flags.read(OracleFlags)
  log.info("oracle is now solvers --dense=%d; the old name works for one more release", s.depth)
  dense.start(SolversSettings.of(s, dense=s.depth))


if __name__ == "__main__":
  flags.define(OracleFlags)
  cli.run(main, alone=True)
