"""Scores every training example by its influence on the evaluation set, and chooses the coreset.

./run.sh select --train_data=jsonl:mine.jsonl --budget=0.5 --run_dir=runs/mine/select

Needs records alone. Writes coreset.jsonl (the choice), scores.parquet, report.html and train_with.md into --run_dir.
"""

from experiments import stages
from experiments.settings import SelectFlags

if __name__ == "__main__":
  stages.start("select", SelectFlags)
