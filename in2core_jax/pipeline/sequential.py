"""Selection in rounds: choose a part, train on all that is chosen so far, and let that model choose on."""

import dataclasses
import logging

import numpy as np

from in2core_jax.errors import how_many
from in2core_jax.params import subtree
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.retraining import Retrainer, equal_steps
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import Budget, inputs_of

log = logging.getLogger(__name__)


def choose(session: Session, s: Settings, policy: str, count: int, rounds: int) -> np.ndarray:
  """The rows that a policy takes in so many rounds of about equal size: what is learnt no longer attracts.

  Gradients of the first round are those of the base model, of round r those of a model that was trained from it on what
  the rounds before have chosen, for as many epochs as all of the data is trained. Nothing that is chosen is given back.

  Args:
    session: data and model.
    s: the recipe, and how the policy chooses.
    policy: one that looks at gradients.
    count: examples to choose.
    rounds: R, at least 1.

  Returns:
    int64 [count], sorted.
  """
  train, judge, params = session.splits["train"], None, session.model.params
  rows = np.zeros(0, np.int64)
  for number in range(rounds):
    size = round(count * (number + 1) / rounds) - len(rows)
    if not size:
      continue
    if len(rows):
      judge = judge or Retrainer(session, s, [np.flatnonzero(train.num_response_tokens)])
      label = f"training before round {number + 1} of {rounds}, on {how_many(len(rows), 'example')}"
      trained = judge.train(rows, s.seed, label, equal_steps(session, s, rows, "epochs"))
      params = session.model.place(subtree.merge(trained.sub, judge.frozen, judge.chosen))
    inputs = inputs_of(train, **ChoiceInputs(session, s, params, stored=False).of({policy}))
    # An example without response tokens is never taken; the mean of the pool is still that of all.
    left = np.where(np.isin(np.arange(len(train)), rows), 0, train.num_response_tokens)
    inputs = dataclasses.replace(inputs, num_response_tokens=left, token_weights=train.num_response_tokens)
    rows = np.sort(np.append(rows, coreset.select_rows(policy, inputs, Budget(num_examples=size), s.seed)))
  return rows
