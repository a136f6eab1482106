"""Stage 3: fine-tunes the model on the training set (all of it, or the examples of a coreset).

python -m experiments.finetune --run_dir=runs/full --trainable_layers=last:4
"""

from experiments import stages
from experiments.settings import FinetuneFlags

if __name__ == "__main__":
  stages.start("finetune", FinetuneFlags)
