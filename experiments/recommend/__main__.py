"""Which part of the data to train on, how much of it, and whether that is as good: rules tried on your data.

./run.sh recommend --train_data=jsonl:mine.jsonl --eval_data=jsonl:target.jsonl --minutes=20

The evaluation set is cut in two halves. Rules see one half, and models that are trained on their choices are judged on
the other, and the other way round. Random sets, length-matched ones, the longest examples and full data always take
part. The answer is one sentence: a rule with a budget, random examples, or all of the data. Writes it with its evidence
as recommendation.html, and coreset.jsonl with train_with.md, into --run_dir. --dry_run tells the plan alone.
"""

import importlib

from experiments import cli, flags
from experiments.recommend.settings import RecommendFlags


def main(_) -> None:
  """The trial, or with --dry_run the plan alone."""
  settings = flags.read(RecommendFlags, tells_costs=True)
  run = importlib.import_module("in2core_jax.recommendation.run")  # --help and wrong flags do not wait for it
  if settings.dry_run:
    run.dry_run(settings)
  else:
    run.run(settings)


if __name__ == "__main__":
  flags.define(RecommendFlags)
  cli.run(main, alone=True)
