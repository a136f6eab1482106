from experiments import cli, flags
from experiments.settings import EvaluateFlags
from in2core_jax.estimate import dry_run
from in2core_jax.pipeline.evaluate import __doc__, run  # noqa: F401 -- __doc__ is the text of --help


def main(_) -> None:
  """Entry point."""
  settings = flags.read(EvaluateFlags, tells_costs=True)
  if settings.dry_run:
    dry_run.run(settings, "evaluate")
  else:
    run(settings)


if __name__ == "__main__":
  flags.define(EvaluateFlags)
  cli.run(main)
