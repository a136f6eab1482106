from experiments import cli, flags
from experiments.settings import FinetuneFlags
from in2core_jax.estimate import dry_run
from in2core_jax.pipeline.finetune import __doc__, run  # noqa: F401 -- __doc__ is the text of --help


def main(_) -> None:
  """Entry point."""
  settings = flags.read(FinetuneFlags, tells_costs=True)
  if settings.dry_run:
    dry_run.run(settings, "finetune")
  else:
    run(settings)


if __name__ == "__main__":
  flags.define(FinetuneFlags)
  cli.run(main)
