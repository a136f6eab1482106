"""What the commands of single stages have in common."""

import importlib

from experiments import cli, flags
from in2core_jax.pipeline.settings import Settings


def start(name: str, kind: type[Settings]) -> None:
  """Runs a stage with the flags that were given, or tells what it would take (--dry_run); ends the process.

  Args:
    name: of the stage: of its module in `pipeline`, and as `dry_run` knows it.
    kind: its settings class.
  """

  def main(_) -> None:
    settings = flags.read(kind, tells_costs=True)
    # --help and wrong flags do not wait for these imports.
    if settings.dry_run:
      importlib.import_module("in2core_jax.estimate.dry_run").run(settings, name)
    else:
      importlib.import_module(f"in2core_jax.pipeline.{name}").run(settings)

  flags.define(kind)
  cli.run(main)
