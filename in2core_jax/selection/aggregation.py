"""From how much an example serves each single query to one value per example. NumPy only.

  mean         s(i) = mean over q of S(q, i): what serves all queries together
  nearest      s(i) = mean of the k largest S(q, i) over q: what serves some queries well
  round_robin  queries take turns; each takes its best example that is not taken yet, so that every query is served
  weighted_turns  the same, but queries with long responses have more turns: half of all turns are dealt out equally, as
               perplexity by example counts, half by response tokens, as perplexity by token does. The first turn of
               every query comes before the second of any
  topic_max    mean inside each evaluation topic, divided by that topic's root mean square, then the largest over topics
  topic_quota  topics take turns

"round_robin" is how LESS and RDS+ choose in arXiv 2602.14696 and 2503.01807, "topic_max" LESS in arXiv 2402.04333.

Letters: N examples of the pool, Q queries, G evaluation topics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from in2core_jax.errors import UserError, how_many

BY_TOPIC = ("topic_max", "topic_quota")
BY_QUERY = ("nearest", "round_robin", "weighted_turns")  # which need the value for every single query
WEIGHED = ("mean", "round_robin", "weighted_turns")  # in which sources of queries can have weights
AGGREGATES = ("mean", *BY_QUERY, *BY_TOPIC)
NEAREST = 10  # queries: of 1, 3, 5, 10, 20 the one that found most of the sources (docs/selection.md)


@dataclass(frozen=True, eq=False)
class Sources:
  """Where queries come from, and how much each source counts.

  Attributes:
    codes: int [Q], number of each query's source.
    shares: f64 [S], of each source, above 0.
  """

  codes: np.ndarray
  shares: np.ndarray

  def take(self, rows: np.ndarray) -> "Sources":
    """Of some queries."""
    return Sources(self.codes[rows], self.shares)

  def spread(self, weights: np.ndarray) -> np.ndarray:
    """Weights of queries, [Q], brought to a sum of each source that is its share; f64 [Q]."""
    totals = np.bincount(self.codes, weights, len(self.shares))[self.codes]
    return np.divide(weights * self.shares[self.codes], totals, out=np.zeros(len(totals)), where=totals > 0)


def aggregate(
  scores: np.ndarray,
  query_topics: Sequence[str],
  how: str = "mean",
  ids: Sequence[str] | None = None,
  tokens: np.ndarray | None = None,
  sources: Sources | None = None,
) -> np.ndarray:
  """Per-query scores -> one value per example.

  topic_max divides because inner products need it, or the topic with the largest gradients decides alone; LESS
  compares cosines and does not. Zero and sign keep their meaning. round_robin and topic_quota give a priority, N for
  the first choice down to 1, not an influence: use it to choose, not to report.

  Args:
    scores: [Q, N].
    query_topics: Q names.
    how: a word of `AGGREGATES`.
    ids: N example ids, for the ties of those that take turns; without them ties go by row.
    tokens: [Q], response tokens of the queries, for weighted_turns.
    sources: of the queries, whose shares of the mean or of the turns are theirs; None: all queries count alike.

  Returns:
    f64 [N].

  Raises:
    UserError: unknown `how`, shapes that do not match, scores that are not finite.
  """
  if how not in AGGREGATES:
    raise UserError(f"aggregate={how} is unknown; choose one of {', '.join(AGGREGATES)}")
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 2 or not len(scores) or len(query_topics) != scores.shape[0]:
    raise UserError(
      f"scores have shape {scores.shape} for {how_many(len(query_topics), 'query topic')}; expected [Q, N]"
    )
  finite(scores.T, "scores", f"aggregate={how}", ids)
  if sources is not None and how not in WEIGHED:
    raise UserError(f"aggregate={how} has no weights of sources; use {', '.join(WEIGHED)}")
  if how == "mean":
    return scores.mean(axis=0) if sources is None else source_mean(scores, sources)
  if how == "nearest":
    return nearest_mean(scores)
  if how in ("round_robin", "weighted_turns"):
    return _turns(scores, ids, whose_turns(how, *scores.shape, tokens, sources))
  by_topic = topic_means(scores, query_topics)
  if how == "topic_max":
    rms = np.sqrt(np.mean(by_topic**2, axis=1, keepdims=True))
    return np.max(by_topic / np.where(rms > 0, rms, 1.0), axis=0)
  return _turns(by_topic, ids)


def source_mean(values: np.ndarray, sources: Sources | None) -> np.ndarray:
  """Mean of rows [Q, ...], each source with its share of it."""
  weights = None if sources is None else sources.spread(np.ones(len(values)))
  return np.average(values, axis=0, weights=weights)


def nearest_mean(scores: np.ndarray, count: int = NEAREST) -> np.ndarray:
  """Mean of each example's `count` largest values over the queries: how well its nearest queries match it.

  Args:
    scores: [Q, N].
    count: at least 1; all queries where there are fewer.

  Returns:
    f64 [N].
  """
  if count < 1:
    raise UserError(f"nearest queries: {count} of them; need at least 1")
  kept = min(count, len(scores))
  return np.partition(scores, len(scores) - kept, axis=0)[len(scores) - kept :].mean(axis=0)


def mean_ranks(scores: Sequence[np.ndarray]) -> np.ndarray:
  """Mean over several [Q, N] of each row's ranks, 1 for the best down to 1 / N; ties share the mean of their places.

  Ranks have no scale, so that no layer speaks louder than another (Borda's count).
  """
  from scipy import stats  # settings read this module, and --help does not wait for scipy

  return np.mean([stats.rankdata(values, axis=1) / values.shape[1] for values in scores], axis=0)


def topic_means(values: np.ndarray, topics: Sequence[str], weights: np.ndarray | None = None) -> np.ndarray:
  """Rows [Q, ...] -> means by topic [G, ...], topics in sorted order; weights [Q], equal when None."""
  codes = np.unique(np.asarray(topics, dtype=np.str_), return_inverse=True)[1]
  weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
  return np.stack([np.average(values[codes == g], axis=0, weights=weights[codes == g]) for g in range(codes.max() + 1)])


def turn_shares(tokens: np.ndarray | None, size: int) -> np.ndarray:
  """Each query's share of the turns, f64 [Q]: half of them equal, half by response tokens.

  Raises:
    UserError: no token count for each query.
  """
  tokens = np.asarray(0 if tokens is None else tokens, np.float64)
  if tokens.shape != (size,) or tokens.min() < 0 or not tokens.any():
    raise UserError(
      f"weighted_turns needs the response tokens of {how_many(size, 'quer[y|ies]')}, got shape {tokens.shape}"
    )
  return 0.5 / size + 0.5 * tokens / tokens.sum()


def whose_turns(
  how: str, size: int, turns: int, tokens: np.ndarray | None = None, sources: Sources | None = None
) -> np.ndarray:
  """Whose turn it is where `aggregate` lets `size` queries take turns, int [turns]; other arguments as there.

  Sources take turns by their shares, and in each its queries do, so that every beginning has the sources' shares.
  """
  shares = turn_shares(tokens, size) if how == "weighted_turns" else np.ones(size)
  if sources is None:
    return turn_order(shares, turns)
  there, codes = np.unique(sources.codes, return_inverse=True)
  whose = np.empty(turns, np.int64)
  of_sources = turn_order(sources.shares[there], turns)
  for number in range(len(there)):
    own, mine = np.flatnonzero(codes == number), of_sources == number
    whose[mine] = own[turn_order(shares[own], np.count_nonzero(mine))]
  return whose


def turn_order(shares: np.ndarray, turns: int) -> np.ndarray:
  """Whose turn it is, int [turns]: query q has its k-th turn at time (k - 1) / share_q; ties go by position.

  Equal shares give 0, 1, ..., Q - 1, 0, 1, ... . Everyone has a turn before anyone has two, so that few turns leave
  nobody out (Adams's apportionment); after that no query is ahead of its share by more than one turn.

  Raises:
    UserError: shares that are not positive and finite.
  """
  shares = np.asarray(shares, np.float64)
  if shares.ndim != 1 or not np.isfinite(shares).all() or not (shares > 0).all():
    raise UserError("shares of turns must be positive and finite, one for each query")
  most = np.minimum(turns, np.ceil(turns * shares / shares.sum()).astype(np.int64) + 1)  # no query has more
  relative = shares / shares.max()  # equal ones are 1, so that their times are whole numbers and tie
  times = np.concatenate([np.arange(count) / share for count, share in zip(most, relative, strict=True)])
  whose = np.repeat(np.arange(len(shares)), most)
  return whose[np.lexsort((whose, times))[:turns]]


def _turns(scores: np.ndarray, ids: Sequence[str] | None, whose: np.ndarray | None = None) -> np.ndarray:
  """Priorities N..1 from rows of scores that take turns; `whose` turn it is, int [N], else one after the other."""
  size = scores.shape[1]
  by_id = np.arange(size) if ids is None else id_order(ids)
  best_first = by_id[np.argsort(-scores[:, by_id], axis=1, kind="stable")]
  place, priority = np.zeros(len(scores), np.int64), np.zeros(size)
  for turn, mine in enumerate(turn_order(np.ones(len(scores)), size) if whose is None else whose):
    while priority[best_first[mine, place[mine]]]:
      place[mine] += 1
    priority[best_first[mine, place[mine]]] = size - turn
  return priority


def id_order(ids: Sequence[str]) -> np.ndarray:
  """int64 [N], the rows in the order of their ids; equal ids as they stand."""
  return ids.order() if hasattr(ids, "order") else np.argsort(np.asarray(ids, dtype=np.str_), kind="stable")


def ids_of(ids: Sequence[str], rows: np.ndarray) -> Sequence[str]:
  """The ids of some rows, without an object for each where they are kept in columns."""
  return ids.take(rows) if hasattr(ids, "take") else [ids[row] for row in rows]


def finite(values: np.ndarray | None, name: str, what: str, ids: Sequence[str] | None) -> np.ndarray:
  """`values` [N] or [N, d], or a UserError when they are missing or not finite (with the count and the first ids)."""
  if values is None:
    raise UserError(f"{what} needs {name}, which were not given; compute them or choose another policy")
  good = np.isfinite(values if values.ndim == 1 else values.sum(axis=1, dtype=np.float64))
  if not good.all():
    bad = np.flatnonzero(~good)
    first = ", ".join(f"row {i}" if ids is None else str(ids[i]) for i in bad[:3])
    raise UserError(
      f"{name}: {bad.size} of {good.size} are NaN or infinite (first: {first}); check weights, learning rate, damping"
    )
  return values
