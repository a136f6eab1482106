from experiments import stages
from experiments.settings import EvaluateFlags
from in2core_jax.pipeline.evaluate import __doc__, run  # noqa: F401 -- __doc__ is the text of --help

if __name__ == "__main__":
  stages.start("evaluate", EvaluateFlags, run)
