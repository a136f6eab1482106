"""Scores every training example by its influence on the evaluation set, and chooses the coreset.

./run.sh select --train_data=jsonl:mine.jsonl --budget=0.5 --run_dir=runs/mine/select
"""

from experiments import stages
from experiments.settings import SelectFlags

if __name__ == "__main__":
  stages.start("select", SelectFlags)
