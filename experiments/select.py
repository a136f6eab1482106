"""Stage 4, the heart: influence of every training example on the evaluation set, and the coreset that follows from it.

python -m experiments.select --train_data=jsonl:mine.jsonl --layers=last:8 --budget=0.5 --run_dir=runs/mine
"""

from experiments import stages
from experiments.settings import SelectFlags

if __name__ == "__main__":
  stages.start("select", SelectFlags)
