from experiments import cli, flags
from experiments.recommend.settings import RecommendFlags
from in2core_jax.recommendation.run import __doc__, dry_run, run  # noqa: F401 -- __doc__ is the text of --help


def main(_) -> None:
  """The trial, or with --dry_run the plan alone."""
  settings = flags.read(RecommendFlags, tells_costs=True)
  if settings.dry_run:
    dry_run(settings)
  else:
    run(settings)


if __name__ == "__main__":
  flags.define(RecommendFlags)
  cli.run(main, alone=True)
