"""Metagradients of the training set: through the whole training on it, from the loss of the evaluation set."""

import jax
import numpy as np

from in2core_jax.model.objective import make_objective
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.training.metagradient import Unrolled


def metagradient(session: Session, s: Settings) -> np.ndarray:
  """-d L_q / d w_i of every training example, f64 [N]: L_q the mean evaluation loss after the training on all data.

  Args:
    session: data and model.
    s: the recipe and its seed.

  Returns:
    0 for an example without response, which is not trained on.
  """
  train, evals = session.splits["train"], session.splits["eval"]
  rows, queries = (np.flatnonzero(part.num_response_tokens) for part in (train, evals))
  judge = Retrainer(session, s, [rows])
  packer = session.packer("train", judge.chosen, session.model.params, rows, judge.shapes)
  asked = session.packer("eval", judge.chosen, session.model.params, queries)

  def gradient_fn(sub):
    mean = judge.problem.at(sub, judge.frozen).mean_gradient(session.stream(asked))
    return jax.tree.map(lambda leaf: leaf[0], mean)

  objective = make_objective(session.model.config, judge.chosen)
  unrolled = Unrolled(objective, judge.trainer, judge.frozen, packer, s.seed, judge.recipe.steps)
  found = np.zeros(len(train))
  found[rows] = unrolled.metagradient(judge.sub, gradient_fn, np.ones(len(rows), np.float32))
  return found
