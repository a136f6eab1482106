from experiments import cli, flags
from experiments.settings import IndexFlags
from in2core_jax.pipeline import index
from in2core_jax.pipeline.index import __doc__  # noqa: F401 -- the text of --help


def main(_) -> None:
  """Makes the index, or adds to it."""
  index.run(flags.read(IndexFlags))


if __name__ == "__main__":
  flags.define(IndexFlags)
  cli.run(main)
