"""Gradients along a short training on a random part, for greedy matching: what is learnt at once no longer decides.

  f_i = (sqrt(eta_k / sum eta) P g_i(theta_k)) for k = 1 ... K

theta_k are K checkpoints of the warm-up at equal distances, eta_k the mean learning rate on the way to each, P the
random projection of `matching`, the same everywhere. So |mean f - t|^2 is the mean over the checkpoints of what greedy
matching brings down at one (gradient trajectory pursuit, arXiv 2410.16710; LESS, arXiv 2402.04333, without Adam).
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from in2core_jax.errors import how_many
from in2core_jax.params import subtree
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.retraining import Retrainer, equal_steps
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs.progress import Progress
from in2core_jax.selection.whitening import spread_among
from in2core_jax.training import train_loop

SHARE = 0.25  # of the training examples


@dataclasses.dataclass
class _Snapshots(train_loop.TrainLog):
  """Keeps the trained parameters of some steps in memory.

  Attributes:
    wanted: steps.
    found: step -> parameters on the host.
  """

  wanted: tuple[int, ...] = ()
  found: dict[int, Any] = dataclasses.field(default_factory=dict)

  def due(self, step: int, steps: int) -> bool:
    """Whether it is one of them."""
    return step in self.wanted

  def save(self, step: int, sub, state, losses) -> None:
    """Copies the parameters, which the next step takes over."""
    self.found[step] = jax.device_get(sub)


def random_part(session: Session, share: float) -> np.ndarray:
  """A share of the training examples, drawn by a hash of their ids, int64, sorted: what a warm-up trains on."""
  usable = trainable_rows(session)
  return np.sort(spread_among(session.splits["train"].ids, usable, max(1, round(share * len(usable)))))


def warm_up(session: Session, s: Settings, checkpoints: int) -> list[tuple[float, Any]]:
  """(share of the learning rates, parameters of the model) at so many checkpoints of a training on a random part.

  The part is drawn by a hash of ids and is trained for as many epochs as all of the data is.

  Args:
    session: data and model.
    s: the recipe.
    checkpoints: K; fewer where there are fewer steps.
  """
  usable, rows = trainable_rows(session), random_part(session, SHARE)
  judge, steps = Retrainer(session, s, [usable]), equal_steps(session, s, rows, "epochs")
  wanted = sorted({max(1, round(steps * (number + 1) / checkpoints)) for number in range(checkpoints)})
  packer = session.packer("train", judge.chosen, session.model.params, rows, judge.shapes)
  with Progress(steps, f"warm-up on {how_many(len(rows), 'example')}", "steps") as progress:
    log = _Snapshots(on_step=lambda step, steps, loss, rate: progress.update(1, loss=round(loss, 3)), wanted=(*wanted,))
    judge.trainer.train(judge.sub, judge.frozen, packer, s.seed, log, steps)
  rates = train_loop.step_weights(dataclasses.asdict(judge.recipe) | {"steps": steps}, wanted)
  whole = lambda sub: session.model.place(subtree.merge(sub, judge.frozen, judge.chosen))  # noqa: E731
  return [(rates[step] / sum(rates.values()), whole(log.found[step])) for step in wanted]


def along(session: Session, s: Settings, checkpoints: int) -> dict:
  """Fields of `PolicyInputs` for greedy matching, with features and target of all checkpoints beside each other.

  Args:
    session: data and model.
    s: the recipe, how gradients are projected, what matching aims at.
    checkpoints: K.
  """
  found, joined = {}, {"features": [], "target": []}
  for share, params in warm_up(session, s, checkpoints):
    found = ChoiceInputs(session, s, params, stored=False).of({"matching"})
    for name, parts in joined.items():
      parts.append(np.sqrt(np.float32(share)) * found[name])
  return found | {name: np.concatenate(parts, axis=1) for name, parts in joined.items()}
