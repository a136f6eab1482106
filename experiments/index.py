"""An index of a large pool: a few numbers for each example, from which `select --index` chooses in seconds.

python -m experiments.index --train_data=pool.jsonl --eval_data=mine.jsonl --run_dir=runs/pool

One pass over the pool. The same command goes on where it was stopped, and adds what is new in --train_data.
"""

import importlib

from experiments import cli, flags
from experiments.settings import IndexFlags


def main(_) -> None:
  """Makes the index, or adds to it."""
  settings = flags.read(IndexFlags)
  importlib.import_module("in2core_jax.pipeline.index").run(settings)  # --help does not wait for it


if __name__ == "__main__":
  flags.define(IndexFlags)
  cli.run(main)
