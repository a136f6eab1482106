"""Retrains the base model on each selection by one recipe, and compares perplexities on the test set.

./run.sh evaluate --train_data=jsonl:mine.jsonl --select_runs=runs/mine/select --policies=full,random
./run.sh evaluate --train_data=jsonl:mine.jsonl --select_runs=runs/mine/select --fractions=0.05,0.1,0.25 --equal=epochs

Needs run folders of select, or --policies alone. Writes evaluation.md (a table with a verdict) and evaluation.csv into
--run_dir.
"""

from experiments import stages
from experiments.settings import EvaluateFlags

if __name__ == "__main__":
  stages.start("evaluate", EvaluateFlags)
