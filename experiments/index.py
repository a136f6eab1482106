from experiments import stages
from experiments.settings import IndexFlags
from in2core_jax.pipeline.index import __doc__, run  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  stages.start("index", IndexFlags, run)
