"""What the commands of single stages have in common."""

from collections.abc import Callable

from experiments import cli, flags
from in2core_jax.estimate import dry_run
from in2core_jax.pipeline.settings import Settings


def start(name: str, kind: type[Settings], run: Callable[[Settings], object]) -> None:
  """Runs a stage with the flags that were given, or tells what it would take (--dry_run); ends the process.

  Args:
    name: of the stage, as `dry_run` knows it.
    kind: its settings class.
    run: the stage.
  """

  def main(_) -> None:
    settings = flags.read(kind, tells_costs=True)
    if settings.dry_run:
      dry_run.run(settings, name)
    else:
      run(settings)

  flags.define(kind)
  cli.run(main)
