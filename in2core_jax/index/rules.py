"""Rules of selection on an index: those of `selection.coreset`, in blocks, for pools of a million examples.

What a policy looks at is never held for all queries and all examples: values of an example are added up block by block,
queries that take turns keep a list of their best. Ties go by example id, and copies come last, as everywhere.

Letters: N examples, Q queries, S chosen rows, r numbers of a row.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from in2core_jax.errors import UserError, how_many
from in2core_jax.index import best
from in2core_jax.index import matching as block_matching
from in2core_jax.index.metric import KINDS, Asked, IndexMetric, smooth
from in2core_jax.index.rows import Block, Rows
from in2core_jax.selection import aggregation, coreset, matching, reasons
from in2core_jax.selection.inputs import SIMILARITIES, TARGETS, Budget, PolicyInputs
from in2core_jax.selection.two_samples import Apart, apart
from in2core_jax.selection.whitening import spread_among

SIMILAR = ("auto", *KINDS)
MATCHING = coreset.SHRUNK_POLICIES
# Served as they are, by scores, lengths or chance: they look at no features.
PLAIN = ("proponents", "opponents", "random", "length_matched_random", "longest", "highest_loss", "topic_quota")
POLICIES = (*SIMILAR, *MATCHING, *PLAIN)
MOST_COUNTED = 65_536  # examples that make the metric: more hardly move it
_PAIRS = 1024  # examples of the pool that stand for it where kinds are compared, as in `selection.hybrid`


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
  """The queries, as rows of the index's basis.

  Attributes:
    block: of Q queries; those with a response, in the order of their ids.
    copies: int [Q], for each the first one of the same content: only these are asked one by one.
    ids: Q ids. topics: Q names. tokens: int [Q], response tokens.
  """

  block: Block
  copies: np.ndarray
  ids: Sequence[str]
  topics: Sequence[str]
  tokens: np.ndarray

  def asked(self) -> "Questions":
    """Without copies."""
    kept = np.flatnonzero(self.copies == np.arange(len(self.copies)))
    ids, topics = ([names[row] for row in kept] for names in (self.ids, self.topics))
    return Questions(self.block.take(kept), np.arange(len(kept)), ids, topics, self.tokens[kept])


@dataclasses.dataclass(frozen=True)
class How:
  """How a policy works.

  Attributes:
    aggregate: a word of `aggregation.AGGREGATES`; "" for the policy's own.
    target_mean: what matching aims at, a word of `TARGETS`.
    shrink: whether its target is drawn towards the pool's mean.
    seed: of the random policies.
  """

  aggregate: str = ""
  target_mean: str = "both"
  shrink: bool = True
  seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
  """What `choose` gives.

  Attributes:
    choice: rows and reasons.
    apart: how far the queries are from the pool; None where nobody asked, or nobody can tell.
    aim: of matching; None for other policies.
    queries: how many are asked one by one; None where none are.
  """

  choice: coreset.Choice
  apart: Apart | None = None
  aim: matching.Shrunk | None = None
  queries: int | None = None


def choose(
  policy: str, inputs: PolicyInputs, rows: Rows, questions: Questions, counted: np.ndarray, budget: Budget, how: How
) -> Outcome:
  """Chooses the coreset from an index.

  Args:
    policy: a word of `POLICIES`.
    inputs: the pool, with scores and losses where the policy needs them; `alike` for the policies that put copies last.
    rows: the pool's.
    questions: the queries.
    counted: bool [N], which examples make the metric: those with a response, of copies the first.
    budget: how much.
    how: else.

  Raises:
    UserError: a policy that an index does not serve, missing inputs, a budget that cannot be met.
  """
  if policy not in POLICIES:
    raise UserError(f"policy={policy} is not served by an index, which has {', '.join(POLICIES)}: leave --index out")
  if policy in PLAIN:
    return Outcome(coreset.select_by(policy, inputs, budget, how.seed))
  pool = inputs.pool()
  if not pool.size:
    raise UserError(
      f"none of the {how_many(len(inputs.ids), 'example')} has response tokens; check the data fields and max length"
    )
  limit = budget.limit(inputs.num_tokens[pool])
  places = np.full(len(inputs.ids), -1, np.int64)
  places[pool] = np.arange(len(pool))
  if policy in MATCHING:
    aim = aim_at(rows, questions, inputs.num_response_tokens, how)
    order = block_matching.greedy_matching(rows, aim.target, limit, places)
    return Outcome(_matched(rows, budget.cut(order, inputs.num_tokens), aim), aim=aim)
  asked = questions.asked()
  kind = "hybrid" if policy == "auto" else policy
  similar = _Similar(IndexMetric.fit(rows, _some(counted, inputs.ids), kind), rows, asked, inputs, places)
  away = similar.apart(counted) if kind == "hybrid" else None
  if policy == "auto" and not coreset.apart_enough(away):
    drawn = coreset.select_by("auto", dataclasses.replace(inputs, apart=away), budget, how.seed)
    return Outcome(drawn, away, queries=len(asked.ids))
  choice = similar.choose(kind, how.aggregate or SIMILARITIES[kind], budget, limit)
  return Outcome(choice, away, queries=len(asked.ids))


def _some(counted: np.ndarray, ids: Sequence[str]) -> np.ndarray:
  """At most `MOST_COUNTED` of the examples that count, by the hashes of their ids; bool [N]."""
  named = np.flatnonzero(counted)
  if len(named) <= MOST_COUNTED:
    return counted
  kept = np.zeros_like(counted)
  kept[spread_among(ids, named, MOST_COUNTED)] = True
  return kept


# ---- similarity ----------------------------------------------------------------------


class _Similar:
  """A policy by similarity, on one pool and for some queries."""

  def __init__(self, metric: IndexMetric, rows: Rows, questions: Questions, inputs: PolicyInputs, places: np.ndarray):
    self.metric, self.rows, self.questions, self.inputs, self.places = metric, rows, questions, inputs, places
    self.asked = metric.asked(questions.block)

  def apart(self, counted: np.ndarray) -> Apart | None:
    """How far the queries are from the pool as a whole, by some examples of it."""
    named = np.flatnonzero(counted)
    some = spread_among(self.inputs.ids, named, _PAIRS)
    if min(len(self.asked), len(some)) < 2:
      return None
    sample = self.metric.asked(self.rows.take(some))
    both = Asked(tuple(np.concatenate(pair) for pair in zip(self.asked.unit, sample.unit, strict=True)))
    return apart(both.among(), len(self.asked))

  def choose(self, kind: str, how: str, budget: Budget, limit: int) -> coreset.Choice:
    """The rows in order, copies last, and why."""
    speaking = smooth(self.asked) if kind == "hybrid" else self.asked
    if how in ("round_robin", "weighted_turns", "topic_quota"):
      return self._by_turns(*self._speakers(speaking, how), budget, limit)
    value = self._values(speaking, how)
    pool = np.flatnonzero(self.places >= 0)
    pool = pool[np.argsort(self.places[pool])]
    order = coreset.proponents(value[pool])
    why = reasons.ranked(order, "by similarity to the evaluation examples")
    return self._choice(pool[order], budget, lambda kept: why(self.places[kept]))

  def _speakers(self, speaking: Asked, how: str) -> tuple[Asked, np.ndarray, Sequence[str], str]:
    """(who takes turns, their shares of the turns, their names, what they are)."""
    size = len(speaking)
    if how == "round_robin":
      return speaking, np.ones(size), self.questions.ids, "query"
    if how == "weighted_turns":
      return speaking, aggregation.turn_shares(self.questions.tokens, size), self.questions.ids, "query"
    names, means = self._topics()
    return speaking.averaged(means), np.ones(len(names)), names, "evaluation topic"

  def _topics(self) -> tuple[list[str], np.ndarray]:
    """Names of the evaluation topics, and the weights [G, Q] that take means over each."""
    names, codes = np.unique(np.asarray(self.questions.topics, np.str_), return_inverse=True)
    member = (codes == np.arange(len(names))[:, None]).astype(np.float64)
    return names.tolist(), member / member.sum(axis=1, keepdims=True)

  def _walk(self, speaking: Asked) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for block in self.rows.blocks():
      yield block.rows, self.metric.similarity(speaking, block)

  def _values(self, speaking: Asked, how: str) -> np.ndarray:
    """One value for each example, f64 [N], added up block by block."""
    if how == "mean":
      speaking = speaking.averaged(np.full((1, len(speaking)), 1 / len(speaking)))
    elif how == "topic_max":
      speaking = speaking.averaged(self._topics()[1])
    elif how != "nearest":
      raise UserError(f"aggregate={how} is not served by an index; leave --index out")
    scale = np.ones(len(speaking))
    if how == "topic_max":
      pool = self.places >= 0
      square = sum((values[:, pool[rows]].astype(np.float64) ** 2).sum(axis=1) for rows, values in self._walk(speaking))
      scale = np.sqrt(square / np.count_nonzero(pool))
      scale[scale == 0] = 1
    found = np.empty(len(self.places))
    for rows, values in self._walk(speaking):
      found[rows] = aggregation.nearest_mean(values) if how == "nearest" else (values / scale[:, None]).max(axis=0)
    return found

  def _by_turns(
    self, speaking: Asked, shares: np.ndarray, names: Sequence[str], what: str, budget: Budget, limit: int
  ) -> coreset.Choice:
    """As many turns as the budget needs where copies do not count: more of them where there were too many copies."""
    pool_size, alike = int(np.count_nonzero(self.places >= 0)), self.inputs.alike
    walk, turns = lambda: self._walk(speaking), 0
    while turns < pool_size:
      turns = min(pool_size, max(limit + limit // 8 + 64, 2 * turns))
      whose = aggregation.turn_order(shares, turns)
      order = best.in_turns(walk, whose, len(speaking), self.places)
      if alike is None or len(np.unique(np.asarray(alike)[order])) >= limit:
        break
    turn = np.full(len(self.places), -1, np.int64)
    turn[order] = np.arange(len(order))
    why = reasons.in_turn(len(turn) - turn, whose, names, what)
    return self._choice(order, budget, why)

  def _choice(self, order: np.ndarray, budget: Budget, why: reasons.Reasons) -> coreset.Choice:
    """Copies last, then as much as the budget holds."""
    tokens, alike = self.inputs.num_tokens, self.inputs.alike
    if alike is not None:
      times = coreset.times_before(np.asarray(alike)[order])
      at = np.full(len(self.places), 0, np.int64)
      at[order] = times
      order = order[np.argsort(times, kind="stable")]
      why = reasons.repeated(why, at)
    kept = order[: _held(budget, order, tokens, int(np.count_nonzero(self.places >= 0)))]
    return coreset.Choice(kept, lambda: why(kept))


def _held(budget: Budget, order: np.ndarray, tokens: np.ndarray, pool: int) -> int:
  """How many of an order, or of its beginning, the budget holds; a fraction is one of the whole pool."""
  if budget.token_budget is None:
    return Budget(fraction=budget.fraction, num_examples=budget.num_examples).limit(np.zeros(pool))
  return len(budget.cut(order, tokens))


# ---- matching ------------------------------------------------------------------------


def aim_at(rows: Rows, questions: Questions, response_tokens: np.ndarray, how: How) -> matching.Shrunk:
  """What matching aims at in the basis: `PolicyInputs.aim` on index rows, in one pass for each mean.

  Args:
    rows: of the pool.
    questions: the queries, copies among them.
    response_tokens: int [N].
    how: target_mean and shrink.
  """
  if how.target_mean not in TARGETS:
    raise UserError(f"target_mean={how.target_mean} is unknown; choose one of {', '.join(TARGETS)}")
  by_token = {"both": (True, False), "tokens": (True,), "examples": (False,)}[how.target_mean]
  found = [_one_aim(rows, questions, response_tokens, tokens, how.shrink) for tokens in by_token]
  target, kept, beyond = zip(*found, strict=True)
  return matching.Shrunk(np.mean(target, axis=0), float(np.mean(kept)), float(np.mean(beyond)))


def _one_aim(rows: Rows, questions: Questions, response_tokens, by_token: bool, shrink: bool) -> matching.Shrunk:
  weights = questions.tokens.astype(np.float64) if by_token else np.ones(len(questions.tokens))
  own = Rows.in_memory(gradients=questions.block.gradients, square=questions.block.square)
  own = dataclasses.replace(own, position=questions.copies)
  q, q_noise, _ = mean_and_noise(own, weights)
  if not shrink:
    return matching.Shrunk(q, 1.0, 1.0)
  pool = response_tokens.astype(np.float64) if by_token else (response_tokens > 0).astype(np.float64)
  return matching.drawn_to((q, q_noise), mean_and_noise(rows, pool))


def mean_and_noise(rows: Rows, weights: np.ndarray) -> tuple[np.ndarray, float, float]:
  """(weighted mean f64 [r], its expected squared error, of how many equal draws): `selection.matching`'s, in blocks.

  Copies share a row of the index and are one draw. Lengths are whole ones, outside of the basis too.
  """
  weights = weights / weights.sum()
  together = np.bincount(rows.position, weights, int(rows.position.max()) + 1)[rows.position]
  first = np.zeros(len(rows), bool)
  first[np.unique(rows.position, return_index=True)[1]] = True
  together = np.where(first, together, 0.0)
  mean = np.zeros(rows.width)
  for own, numbers in rows.gradients():
    mean += together[own].astype(np.float32) @ numbers
  square, spread = rows.values("square").astype(np.float64), 0.0
  for own, numbers in rows.gradients():
    away = square[own] - 2 * (numbers @ mean.astype(np.float32)) + mean @ mean
    spread += float(together[own] ** 2 @ np.maximum(away, 0))
  concentration = float(together @ together)
  return mean, spread / (1 - concentration) if concentration < 1 - 1e-12 else np.inf, 1 / concentration


def _matched(rows: Rows, chosen: np.ndarray, aim: matching.Shrunk) -> coreset.Choice:
  def why() -> list[str]:
    numbers = rows.take(chosen).gradients
    path = matching.path(numbers, aim.target, np.arange(len(chosen)))
    return reasons.closer(path, "the set's mean gradient")(chosen)

  return coreset.Choice(chosen, why)
