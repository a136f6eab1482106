"""How fast this machine is, measured on a few examples before anything is made of all of them."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np

from in2core_jax.data import packed_rows
from in2core_jax.data.records import firsts
from in2core_jax.pipeline.hidden_states import Place
from in2core_jax.pipeline.projection import MOST_NUMBERS
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.pipeline.session import Session
from in2core_jax.recommendation.plan import Pace
from in2core_jax.recommendation.rules import RULES
from in2core_jax.recommendation.settings import RecommendSettings

_FEW = 16  # evaluation examples; of the training set at least twice as many, and enough for a few steps
_TIMED = 4  # steps whose seconds are measured
# In optimiser steps for each batch of examples: what gradients, hidden states and products cost beside a step.
_GRADIENTS, _HIDDEN, _PRODUCT = 2.0, 0.6, 2.5
_BYTES_A_SECOND = 5e9  # of memory


def few_of(session: Session, s: RecommendSettings) -> Session:
  """A few examples of each part, drawn at random, with a response; all of a part that is not much larger."""
  rows = {}
  for part, wanted in (("train", max(2 * _FEW, 2 * s.batch_size)), ("eval", _FEW)):
    answered = np.flatnonzero(session.splits[part].num_response_tokens)
    drawn = np.random.default_rng((s.seed, 37)).permutation(answered)[:wanted]
    if len(drawn) < len(answered) / 2:
      rows[part] = np.sort(drawn)
  few = session.of_rows(**rows) if rows else session
  return _in_memory(few) if rows else few


def _in_memory(session: Session) -> Session:
  """The same, but nothing of it is written."""
  where = session.hidden.where
  kept = where if where.how == "off" else Place("memory", 0.0, where.run_dir)
  return dataclasses.replace(session, hidden=dataclasses.replace(session.hidden, where=kept))


def measured(
  judge: Retrainer, s: RecommendSettings, rules: Sequence[str], largest: float, began: float, trained: bool = False
) -> Pace:
  """Times steps, a look at evaluation examples and hidden states on a few examples; the rest follows from these.

  Args:
    judge: of all examples; nothing is computed of them.
    s: the flags.
    rules: to be tried.
    largest: budget, a share of the pool.
    began: when the command began, of `time.monotonic`.
    trained: whether the training on all data is there.
  """
  session, seed = judge.session, s.seed
  few = judge.over(few_of(session, s))
  rows = np.arange(len(few.session.splits["train"]))
  rows = rows[few.session.splits["train"].num_response_tokens > 0]
  first = few.train(rows, seed, "compilation", 2)
  result = few.train(rows, seed, "timing", _TIMED)
  few.losses(result.sub, "eval")
  start = time.monotonic()
  few.losses(result.sub, "eval")
  a_look, step = (time.monotonic() - start) / _looks(few.session, "eval"), result.seconds / _TIMED
  position, hidden = _second_of_a_position(few), dict.fromkeys(("train", "eval", "test"), 0.0)
  for part in hidden:
    if not session.hidden.holds(part, judge.chosen, session.model.params):
      hidden[part] = position * _positions(session, part)
  programs = sum(any(getattr(RULES[rule], what) for rule in rules) for what in ("gradients", "hidden", "solves"))
  compiling = programs * max(0.0, first.seconds - 2 * step)  # they are compiled too
  spent = time.monotonic() - began + hidden["eval"] + hidden["test"] + compiling
  looks = [a_look * _looks(session, part) for part in ("eval", "test")]
  shared = step * _batches(session, s) * _of_batches(rules)
  usable = session.splits["train"].num_response_tokens > 0
  wholes = (not trained) + (not firsts(session.splits["train"].records)[usable].all())
  return Pace(step, *looks, shared, _own(judge, s, rules, largest, step), spent, hidden["train"], wholes)


def _looks(session: Session, part: str) -> int:
  """Batches in which losses of a part are measured."""
  return len(session.packer(part).sequential_plan(session.batching.batch_tokens))


def _positions(session: Session, part: str) -> int:
  """Token positions of the packed rows in which the hidden states of a part are made."""
  plan = packed_rows.packed_plan(
    session.splits[part].num_tokens, session.batching.batch_tokens, session.batching.groups
  )
  return sum(length * height for length, height, _ in plan)


def _second_of_a_position(few: Retrainer) -> float:
  """Seconds of a token position through the layers below the trained ones, by a second pass over the few examples."""
  session = _in_memory(few.session)
  if not session.hidden.where.serves(few.chosen):
    return 0.0
  again = dataclasses.replace(session.hidden, kept={}, embedded={}, rows={}, splits=session.splits)
  again.below("eval", few.chosen, session.model.params)  # compiles what is not compiled yet
  start = time.monotonic()
  again.below("train", few.chosen, session.model.params)
  return (time.monotonic() - start) / _positions(session, "train")


def _batches(session: Session, s: RecommendSettings) -> float:
  return sum(len(session.splits[part]) for part in ("train", "eval")) / s.batch_size


def _of_batches(rules: Sequence[str]) -> float:
  """Steps for each batch of examples that what several rules choose by costs."""
  gradients, hidden = (any(getattr(RULES[rule], what) for rule in rules) for what in ("gradients", "hidden"))
  return _GRADIENTS * gradients + _HIDDEN * hidden


def _own(
  judge: Retrainer, s: RecommendSettings, rules: Sequence[str], largest: float, step: float
) -> Mapping[str, float]:
  """What each rule costs beyond that, for the folds of one seed."""
  session, size = judge.session, len(judge.session.splits["train"])
  products = s.depth * min(s.curvature_examples, size) / s.batch_size * _PRODUCT
  # Greedy matching reads all gradients for every choice, at most 2,000 times; so many numbers has an example's.
  width = 7 * len(judge.chosen.layers) * s.sketch_size**2 or MOST_NUMBERS
  reads = 2 * min(2000, largest * size) * size * width * 4 / _BYTES_A_SECOND
  price = {"matching": reads, "proponents": 2 * step * (products + _batches(session, s) * 1.5)}
  return {rule: price.get(RULES[rule].policy, 0.0) + 0.1 * step for rule in rules}
