from experiments import cli, flags
from experiments.settings import SelectFlags
from in2core_jax.estimate import dry_run
from in2core_jax.pipeline.select import __doc__, run  # noqa: F401 -- __doc__ is the text of --help


def main(_) -> None:
  """Entry point."""
  settings = flags.read(SelectFlags, tells_costs=True)
  if settings.dry_run:
    dry_run.run(settings, "select")
  else:
    run(settings)


if __name__ == "__main__":
  flags.define(SelectFlags)
  cli.run(main)
