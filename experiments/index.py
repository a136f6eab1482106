"""An index of a large pool: a few numbers for each example, from which `select --index` chooses in seconds.

./run.sh index --train_data=pool.jsonl --eval_data=mine.jsonl --run_dir=runs/pool

One pass over the pool. The same command goes on where it was stopped, and adds what is new in --train_data. Writes
rows/, queries/ and basis/ (numbers) and index.json into --run_dir, which `select --index` names.
"""

from experiments import stages
from experiments.settings import IndexFlags

if __name__ == "__main__":
  stages.start("index", IndexFlags)
