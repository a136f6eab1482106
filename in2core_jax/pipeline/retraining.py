"""Retrains on sets of examples with one recipe and measures the result: what every table of perplexities rests on."""

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Sequence

import numpy as np

from in2core_jax.data import packing, tokenizing
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.model.objective import make_objective
from in2core_jax.params import subtree
from in2core_jax.pipeline.finetune import identity_of, recipe_of, start_params, trainable_rows
from in2core_jax.pipeline.judging import judged, loss_tokens
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings, words
from in2core_jax.runs import files, run_folder
from in2core_jax.runs.progress import Progress
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)

# What trainings on sets of different sizes can have in common: optimiser steps or response tokens of the training on
# all data, passes over their own set, or the response tokens of such passes with examples of mean length.
EQUAL = ("steps", "epochs", "tokens", "budget_tokens")
_MANY_TIMES = 5.0  # as often as all of the data is passed over: beyond what those who train on a small set do


@dataclasses.dataclass(frozen=True)
class TrainingSubset:
  """A set of training rows to retrain on.

  Attributes:
    policy: what chose them.
    seed: of the order of the data, and of a random policy.
    rows: of the training set.
    fraction: budget of a sweep; None where there is one budget.
    weights: f64 [rows], of the examples' losses; None: all alike.
  """

  policy: str
  seed: int
  rows: np.ndarray
  fraction: float | None = None
  weights: np.ndarray | None = None

  @property
  def key(self) -> tuple:
    """Names what is trained on."""
    weights = () if self.weights is None else (np.asarray(self.weights).tolist(),)
    return (self.rows.tolist(), *weights)

  @property
  def name(self) -> tuple[str, int, float | None]:
    """Different for different candidates."""
    return self.policy, self.seed, self.fraction

  @property
  def file_name(self) -> str:
    """The same as a name for a file, without its ending."""
    share = "" if self.fraction is None else f"-{self.fraction:g}"
    return f"{self.policy.replace(' ', '_').replace('/', '_')}{share}-{self.seed}"

  def __str__(self) -> str:
    share = "" if self.fraction is None else f" {self.fraction:.3g}"
    return f"{self.policy}{share}, seed {self.seed}"


def equal_of(s: Settings) -> list[str]:
  """The words of --equal.

  Raises:
    UserError: none, or one that is unknown.
  """
  found = words(s.equal, "equal", EQUAL)
  if not found:
    raise UserError(f"--equal is empty: use one or several of {', '.join(EQUAL)}")
  return found


def equal_steps(session: Session, s: Settings, rows: np.ndarray, equal: str) -> int:
  """Optimiser steps of a training on some rows, so that it has as many steps, epochs or tokens as that on all."""
  every = trainable_rows(session)
  steps = recipe_of(s, len(every)).steps
  responses = session.splits["train"].num_response_tokens
  epochs, shorter = len(rows) / len(every), responses[every].mean() / responses[rows].mean()
  share = {"steps": 1.0, "epochs": epochs, "tokens": shorter, "budget_tokens": epochs * shorter}
  return max(1, round(steps * share[equal]))


def many_passes(equal: str, rows: Sequence[statistics.RetrainRow], batch_size: int) -> list[str]:
  """One sentence where trainings that are compared repeat a small set far more often than all of the data is repeated.

  Args:
    equal: what they have in common, a word of `EQUAL`.
    rows: of all candidates, full data among them; without it there is nothing to compare with.
    batch_size: examples of a step.
  """
  passes = {row: row.steps * batch_size / row.examples for row in rows}
  full = [passes[row] for row in rows if row.policy == statistics.FULL]
  if not full or max(passes.values()) <= _MANY_TIMES * full[0]:
    return []
  most = max(rows, key=passes.__getitem__)
  return [
    f"Equal {equal}: {most.policy} passes {passes[most]:.0f} times over its {most.examples:,} examples, full data "
    f"{full[0]:.2g} times. Nobody trains on so few examples for so long: read --equal=epochs or --equal=budget_tokens."
  ]


def perplexity_on_test(session: Session, losses: np.ndarray) -> float:
  """Token-weighted perplexity of mean nats per response token of each test example, [N]."""
  tokens = loss_tokens(session.splits["test"])
  counted = tokens > 0
  return statistics.perplexity(losses[counted] * tokens[counted], tokens[counted])


class Retrainer:
  """Trains from the base model and measures losses; few programs serve all sets."""

  def __init__(self, session: Session, s: Settings, row_sets: Sequence[np.ndarray]):
    """Prepares one start and few batch shapes for all sets.

    Args:
      session: data and model.
      s: the recipe; its steps are those of the full training set.
      row_sets: every set that will be trained on.
    """
    self.session, self.settings, self.shown = session, s, True
    self.params, self.chosen = start_params(session, s)
    self.sub, self.frozen = subtree.split(self.params, self.chosen)
    self.recipe = recipe_of(s, len(trainable_rows(session)))
    self.problem = session.kernels(self.chosen)
    sets = [session.packer("train", rows=rows) for rows in row_sets]
    self.shapes = packing.training_shapes(sets, s.batch_size, self.recipe.steps)
    # Of this judge, and gone with it: a cache of the class would keep every judge's model.
    self._packer = functools.cache(self._packer)
    objective = make_objective(session.model.config, self.chosen)
    self.trainer = train_loop.Trainer(objective, self.recipe, session.batching.place, session.model.place)

  def over(self, session: Session, shown: bool = True) -> "Retrainer":
    """The same start and programs over other examples that the same batches hold (`Session.of_rows`).

    Args:
      session: with the examples.
      shown: whether each training has a progress display.
    """
    other = copy.copy(self)
    other.shown = shown
    other.session, other._packer = session, functools.cache(functools.partial(Retrainer._packer, other))
    return other

  def _packer(self, part: str) -> packing.Packer:
    return self.session.packer(part, self.chosen, self.session.model.params)

  def losses(self, sub, part: str = "test", rows: np.ndarray | None = None) -> np.ndarray:
    """Mean nats per response token of the examples of a part, or of some `rows` of it, at a trained subtree, f64.

    Of preference pairs it is the DPO loss.
    """
    packer, dataset = self._packer(part), self.session.splits[part]
    if rows is not None:
      packer = self.session.packer(part, self.chosen, self.session.model.params, rows)
      dataset = dataset.take(rows)
    found = self.problem.at(sub, self.frozen).losses(self.session.stream(packer), len(packer)).astype(np.float64)
    by_sum = self.session.settings.loss_reduction == "sum" and dataset.second is None
    return found / np.maximum(dataset.num_response_tokens, 1) if by_sum else found

  def train(
    self, rows: np.ndarray, seed: int, label: str, steps: int = 0, weights: np.ndarray | None = None
  ) -> train_loop.TrainResult:
    """Trains from the base model on some rows.

    Args:
      rows: of the training set.
      seed: of the order of the data.
      label: names the training in a progress display.
      steps: of the optimiser; the recipe's when 0.
      weights: f64 [rows], of the examples' losses; None: all alike.
    """
    steps = steps or self.recipe.steps
    packer = self.session.packer("train", self.chosen, self.session.model.params, rows, self.shapes, weights)
    with Progress(steps, label, "steps") if self.shown else contextlib.nullcontext() as progress:
      on_step = lambda step, steps, loss, rate: progress and progress.update(1, loss=round(loss, 3))  # noqa: E731
      return self.trainer.train(self.sub, self.frozen, packer, seed, train_loop.TrainLog(on_step=on_step), steps)

  def retrain(self, candidate: TrainingSubset, label: str, steps: int = 0) -> statistics.RetrainRow:
    """Trains on the candidate's rows, unless --checkpoint is that very training, and measures the test set."""
    of_recipe = steps in (0, self.recipe.steps) and candidate.seed == self.settings.seed
    if candidate.policy == "full" and of_recipe and self._checkpoint_is_full():
      log.info("%s: the checkpoint of --checkpoint is this very training", label)
      sub = train_loop.load_sub(self.settings.checkpoint, self.sub)
      stored = run_folder.RunDir.load(files.absolute(self.settings.checkpoint).parent).load_json("finetune.json")
      return self.row(candidate, sub, stored["trained_response_tokens"], self.recipe.steps)
    result = self.train(candidate.rows, candidate.seed, label, steps, candidate.weights)
    return self.row(candidate, result.sub, result.trained_response_tokens, steps or self.recipe.steps)

  def _checkpoint_is_full(self) -> bool:
    """Whether --checkpoint was fine-tuned on this full training set with this recipe, start and seed."""
    if not self.settings.checkpoint:
      return False
    identity = run_folder.hash_of(identity_of(self.session, self.settings))
    return train_loop.checkpoint_meta(self.settings.checkpoint)["identity"] == identity

  def row(self, candidate: TrainingSubset, sub, trained_response_tokens: int, steps: int) -> statistics.RetrainRow:
    """A trained subtree, measured on the test set.

    Args:
      candidate: what it was trained on.
      sub: the subtree.
      trained_response_tokens: seen in training, repeats counted.
      steps: of the optimiser.
    """
    parts = self.session.splits
    return retrain_row(candidate, parts["train"], parts["test"], self.losses(sub), trained_response_tokens, steps)


def retrain_row(
  candidate: TrainingSubset,
  train: tokenizing.TokenizedDataset,
  test: tokenizing.TokenizedDataset,
  losses: np.ndarray,
  trained_response_tokens: int,
  steps: int,
) -> statistics.RetrainRow:
  """A training by its losses on test examples.

  Args:
    candidate: what it was trained on, rows of `train`.
    train: the training set.
    test: N test examples.
    losses: f64 [N], mean nats of each; of preference pairs the DPO loss, and perplexity is exp of its mean.
    trained_response_tokens: seen in training, repeats counted.
    steps: of the optimiser.
  """
  counted = test.num_response_tokens > 0
  tokens = loss_tokens(test)[counted]
  nll = losses[counted] * tokens
  row = statistics.RetrainRow(
    candidate.policy,
    candidate.seed,
    len(candidate.rows),
    int(train.num_tokens[candidate.rows].sum()),
    int(train.num_response_tokens[candidate.rows].sum()),
    steps,
    trained_response_tokens,
    statistics.perplexity(nll, tokens),
    statistics.example_perplexity(nll, tokens),
    losses[counted],
  )
  return judged(test, row)
