"""Fine-tunes the model on the training set: on all of it, or on the examples of a coreset.

./run.sh finetune --train_data=jsonl:mine.jsonl --trainable_layers=last:4 --run_dir=runs/mine/finetune

Needs records alone. Writes checkpoint/, for --checkpoint of other commands and for export, into --run_dir.
"""

from experiments import stages
from experiments.settings import FinetuneFlags

if __name__ == "__main__":
  stages.start("finetune", FinetuneFlags)
