"""Metagradients of the training set: through the whole training on it, from losses of the evaluation set."""

import copy
from collections.abc import Sequence

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.model.objective import make_objective
from in2core_jax.params import subtree
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import resumable
from in2core_jax.runs.progress import Progress
from in2core_jax.runs.unfinished import Work
from in2core_jax.training.metagradient import Unrolled

_BYTES = 2**30  # of cotangents at the same time: parameters and both moments of a block of queries


def check_trained(s: Settings, given: str = "") -> None:
  """Refuses a training that has no metagradient, of LoRA factors.

  Args:
    s: the recipe.
    given: what asks for it, for the message.

  Raises:
    UserError: it has none.
  """
  if s.trainable == "lora":
    why = "fresh LoRA factors have a gradient of 0, at which Adam has no slope: give --trainable=full"
    raise UserError(f"{given}, metagradient: {why}" if given else why)


class AllData:
  """The training on all examples with a response, as `Retrainer` does it, and what walks it back."""

  def __init__(self, session: Session, s: Settings):
    """Trains nothing yet.

    Args:
      session: data and model.
      s: the recipe and its seed.
    """
    self.session, self.size = session, len(session.splits["train"])
    self.rows = np.flatnonzero(session.splits["train"].num_response_tokens)
    self.judge = judge = Retrainer(session, s, [self.rows])
    packer = session.packer("train", judge.chosen, session.model.params, self.rows, judge.shapes)
    objective, self.steps = make_objective(session.model.config, judge.chosen), judge.recipe.steps
    self._unrolled = Unrolled(objective, judge.trainer, judge.frozen, packer, s.seed, self.steps)

  def in_order_of(self, seed: int) -> "AllData":
    """The same with the data in another order."""
    other = copy.copy(self)
    other._unrolled = self._unrolled.in_order_of(seed)
    return other

  def metagradient(self, gradient_fn, on_step=lambda: None) -> np.ndarray:
    """f64 [Q, N], 0 for an example without response, which is not trained on; arguments as of `Unrolled`."""
    ones = np.ones(len(self.rows), np.float32)
    of_rows = self._unrolled.metagradient(self.judge.sub, gradient_fn, ones, on_step)
    found = np.zeros((len(of_rows), self.size))
    found[:, self.rows] = of_rows
    return found


def metagradient(session: Session, s: Settings) -> np.ndarray:
  """-d L_q / d w_i of every training example, f64 [N]: L_q the mean evaluation loss after the training on all data.

  Args:
    session: data and model.
    s: the recipe and its seed.
  """
  whole = AllData(session, s)
  judge, queries = whole.judge, np.flatnonzero(session.splits["eval"].num_response_tokens)
  asked = session.packer("eval", judge.chosen, session.model.params, queries)
  return whole.metagradient(lambda sub: judge.problem.at(sub, judge.frozen).mean_gradient(session.stream(asked)))[0]


def query_metagradients(
  session: Session, s: Settings, queries: np.ndarray, seeds: Sequence[int], work: Work
) -> np.ndarray:
  """The same for single evaluation examples, float32 [Q, N], at most `--query_block` at a time.

  A mean over orders of the data: with one order, an example counts by the learning rate of the steps that it came in.

  Args:
    session: data and model.
    s: the recipe.
    queries: int [Q], rows of the evaluation set.
    seeds: of the orders.
    work: keeps finished blocks.
  """
  whole, size = AllData(session, s), len(queries)
  judge = whole.judge
  most = max(1, min(s.query_block, size, _BYTES // (12 * subtree.count(judge.sub))))
  block = -(-size // -(-size // most))  # blocks of about one size
  store = work.pieces("metagradients").store("blocks", block=block, queries=queries.tolist(), seeds=list(seeds))
  jobs = [(seed, start) for seed in seeds for start in range(0, size, block)]
  found = np.zeros((size, whole.size), np.float32)

  def of_block(seed: int, rows: np.ndarray, progress: Progress) -> np.ndarray:
    asked = session.batcher("eval", judge.chosen, session.model.params, rows)
    gradient_fn = lambda sub: judge.problem.at(sub, judge.frozen).gradients(session.stream(asked), len(rows))  # noqa: E731
    return whole.in_order_of(seed).metagradient(gradient_fn, lambda: progress.update(1)).astype(np.float32)

  with Progress(len(jobs) * whole.steps, "metagradients", "steps") as progress:
    for number, (seed, start) in enumerate(jobs):
      rows = queries[np.minimum(np.arange(start, start + block), size - 1)]  # a filled last block compiles nothing new
      compute = lambda seed=seed, rows=rows: {"scores": of_block(seed, rows, progress)}  # noqa: E731
      of_rows = resumable.kept(store, number, compute)["scores"]
      found[start : start + block] += of_rows[: size - start] / np.float32(len(seeds))
      progress.skip((number + 1) * whole.steps - progress.count)  # what an earlier run has done
  return found
