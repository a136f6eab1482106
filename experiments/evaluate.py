"""Stage 5: retrains from the base model on each selection with one recipe and compares perplexities on the test set.

python -m experiments.evaluate --select_runs=runs/a,runs/b --policies=full,random,opponents --seeds=0,1,2
python -m experiments.evaluate --select_runs=runs/a --fractions=0.05,0.1,0.25,0.5,0.75 --equal=steps,epochs
"""

from experiments import stages
from experiments.settings import EvaluateFlags

if __name__ == "__main__":
  stages.start("evaluate", EvaluateFlags)
