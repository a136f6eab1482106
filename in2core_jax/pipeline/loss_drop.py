"""What a short training on evaluation examples takes off the loss of each training example."""

import numpy as np

from in2core_jax.data import packing
from in2core_jax.model.objective import make_objective
from in2core_jax.params import subtree
from in2core_jax.pipeline import phases
from in2core_jax.pipeline.finetune import recipe_of
from in2core_jax.pipeline.session import BoundSubtree, Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs.progress import Progress
from in2core_jax.training import train_loop


def loss_drop(session: Session, s: Settings, chosen: BoundSubtree, queries: np.ndarray) -> np.ndarray:
  """(l_i(theta) - l_i(theta_q)) / l_i(theta) of every training example, theta_q trained on the queries from theta.

  After arXiv 2605.09404. The chosen layers are trained by the recipe of the fine-tuning: --epochs of the queries.

  Args:
    session: data and model.
    s: the recipe.
    chosen: what is trained, at theta.
    queries: int [Q], rows of the evaluation set.

  Returns:
    f64 [N]; 0 for an example without response.
  """
  tree, params = chosen.tree, chosen.params
  shape = packing.training_shape([session.packer("eval", rows=queries)], s.batch_size, [s.seed])
  packer = session.packer("eval", tree, params, queries, [shape])
  recipe = recipe_of(s.replace(steps=0), len(queries))
  sub, frozen = subtree.split(params, tree)
  trainer = train_loop.Trainer(
    make_objective(session.model.config, tree), recipe, session.batching.place, session.model.place
  )
  with Progress(recipe.steps, phases.DROP, "steps") as progress:
    log = train_loop.TrainLog(on_step=lambda step, steps, loss, rate: progress.update(1, loss=round(loss, 3)))
    trained = trainer.train(sub, frozen, packer, s.seed, log)
  train = session.packer("train", tree, params)
  losses = lambda at: session.kernels(tree).at(at, frozen).losses(session.stream(train), len(train)).astype(np.float64)  # noqa: E731
  before, after = losses(sub), losses(trained.sub)
  return np.divide(before - after, before, out=np.zeros_like(before), where=before > 0)
