"""Scores and gradient features -> the rows of the coreset, in order of choice. NumPy only.

Letters: N examples of the pool, Q queries, G evaluation topics, d features, S chosen rows.

Rules that hold for every policy:
- Ties are broken by `example_id` (then by row), never by the order of reading: rows are sorted by id before anything
  else, random policies included, so the same pool in another order gives the same coreset.
- Examples without response tokens teach nothing and are never selected. A fraction is a fraction of the others; a
  `num_examples` that cannot be met without them is a UserError.
- A token budget counts all tokens of an example. The order is walked until the next example would exceed the budget,
  and ends there: skipping on to whatever still fits would fill the rest with short examples, an unwanted length bias.
- Copies of one example are different rows with ids of their own and may all be chosen; `selection_warnings` counts
  them, by content.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from in2core_jax.errors import UserError, how_many
from in2core_jax.selection import density, distillation, matching, reasons
from in2core_jax.selection.aggregation import aggregate, finite, ids_of, turn_order, whose_turns
from in2core_jax.selection.inputs import (
  SIMILARITIES,
  Budget,
  PolicyInputs,
  matching_target,
)
from in2core_jax.selection.two_samples import Apart

_LENGTH_BINS = 20
# From where on `auto` aims at the queries: the squared distance of their mean from the pool's (`two_samples.apart`),
# 0.002 at most for evaluation sets of a pool's own kind and 0.025 at least for others (docs/selection.md), and its p.
LEAST_DISTANCE, MOST_P = 0.01, 0.01


# ---------------------------------------------------------------- policies: pure functions, orders of row numbers


def proponents(scores: np.ndarray) -> np.ndarray:
  """Rows from the highest score down (the rule of the paper, arXiv 2408.03560); ties in row order."""
  return np.argsort(-np.asarray(scores, np.float64), kind="stable")


def opponents(scores: np.ndarray) -> np.ndarray:
  """Rows from the lowest score up; ties in row order."""
  return np.argsort(np.asarray(scores, np.float64), kind="stable")


def longest(num_response_tokens: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
  """Rows by response tokens, most first; equal ones by all tokens, then in row order."""
  return np.lexsort((-np.asarray(num_tokens, np.int64), -np.asarray(num_response_tokens, np.int64)))


def random_order(size: int, seed: int) -> np.ndarray:
  """A permutation of the rows, the same for the same seed."""
  return np.random.default_rng(seed).permutation(size)


def length_matched(chosen: np.ndarray, num_response_tokens: np.ndarray, seed: int) -> np.ndarray:
  """Random rows with the response-length histogram of `chosen`.

  The lengths of the pool are cut into at most 20 bins of about equal count (exact lengths would leave nothing to draw
  in thinly filled places), and each bin gives as many rows, drawn without replacement, as `chosen` has in it.
  """
  rng, bins = np.random.default_rng(seed), length_bins(num_response_tokens)
  wanted = np.bincount(bins[chosen], minlength=bins.max() + 1)
  drawn = [rng.permutation(np.flatnonzero(bins == b))[:n] for b, n in enumerate(wanted)]
  return rng.permutation(np.concatenate(drawn))


def length_bins(num_response_tokens: np.ndarray) -> np.ndarray:
  """Bins of response length, at most 20 of about equal count, int [N]."""
  edges = np.unique(np.quantile(num_response_tokens, np.linspace(0, 1, _LENGTH_BINS + 1)[1:-1]))
  return np.searchsorted(edges, num_response_tokens, side="left")


def topic_quota(order: np.ndarray, topics: Sequence[str]) -> np.ndarray:
  """Reorders so that every beginning of the order holds (to within rounding) the same fraction of every topic.

  The k-th best of a topic of n examples comes at (k + 1/2) / n, as in Sainte-Lague's rule; equal places keep `order`.
  """
  codes = np.unique(np.asarray(topics, dtype=np.str_), return_inverse=True)[1]
  order = np.asarray(order)
  ordered = codes[order]
  place = (2 * times_before(ordered) + 1) / np.bincount(codes)[ordered]
  return order[np.argsort(place, kind="stable")]


def copies_last(order: np.ndarray, first_of: np.ndarray) -> np.ndarray:
  """Reorders so that no example comes a second time before every other has come once; equal places keep `order`.

  Args:
    order: int [N], rows, best first.
    first_of: int [rows], the same number for copies.
  """
  return order[np.argsort(times_before(first_of[order]), kind="stable")]


def times_before(names: np.ndarray) -> np.ndarray:
  """How often each entry has come before, int [N]."""
  _, codes, counts = np.unique(names, return_inverse=True, return_counts=True)
  found = np.empty(len(names), np.int64)
  found[np.argsort(codes, kind="stable")] = np.arange(len(names)) - np.repeat(np.cumsum(counts) - counts, counts)
  return found


# --------------------------------------------------------------------------------------------- the one entry


@dataclass(frozen=True, eq=False)
class Choice:
  """What `select_by` gives.

  Attributes:
    rows: int64 [S], row numbers of the inputs in order of choice, each once.
    reasons_fn: makes `reasons`; most callers want none.
    weights: f64 [S], of each row's loss in a training, above 0, mean 1; None: all alike.
  """

  rows: np.ndarray
  reasons_fn: Callable[[], list[str]]
  weights: np.ndarray | None = None

  @property
  def in_source_order(self) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows in growing order, and their weights."""
    order = np.argsort(self.rows)
    return self.rows[order], None if self.weights is None else self.weights[order]

  @functools.cached_property
  def reasons(self) -> list[str]:
    """Why each row was taken, S phrases."""
    return self.reasons_fn()


@dataclass(frozen=True, eq=False)
class _Order:
  """Pool positions in a policy's order, best first, and why each stands where it does.

  `weigh`, of a policy that gives weights: of the positions that the budget keeps.
  """

  positions: np.ndarray
  reasons: reasons.Reasons
  weigh: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class _Task:
  """One call of `select_rows`: the pool is sorted by id, so orders of pool positions break ties by id."""

  inputs: PolicyInputs
  pool: np.ndarray
  budget: Budget
  seed: int
  policy: str

  def values(self, name: str) -> np.ndarray:
    """The pool's part of a per-example array; NaN matters only where it could be chosen."""
    part = getattr(self.inputs, name)
    ids = ids_of(self.inputs.ids, self.pool)
    return finite(None if part is None else part[self.pool], name, f"policy {self.policy}", ids)

  @property
  def tokens(self) -> np.ndarray:
    """Tokens of each example of the pool, int [P]."""
    return self.inputs.num_tokens[self.pool]

  @property
  def topics(self) -> np.ndarray:
    """Topic of each example of the pool, str [P]."""
    return np.asarray(self.inputs.topics, dtype=np.str_)[self.pool]


def _matching(task: _Task, per_token: bool = False, in_strata: bool = False) -> _Order:
  """Pool positions chosen by `greedy_matching` towards the mean; by decrease for a token, or in strata of length."""
  inputs, more = task.inputs, {}
  lengths = inputs.num_response_tokens[task.pool]
  if per_token:
    more["costs"] = lengths.astype(np.float64)
  if in_strata:  # every beginning of the order has the pool's share of each stratum, to within rounding
    bins = length_bins(lengths)
    more["strata"] = bins, bins[topic_quota(np.arange(len(bins)), bins)]
  features = finite(inputs.features, "features", f"policy {task.policy}", inputs.ids)
  finite(inputs.target, "target", f"policy {task.policy}", None)
  target = matching_target(inputs)
  rows = matching.greedy_matching(features, target, task.budget.limit(task.tokens), task.pool, **more)
  position = np.empty(len(features), np.int64)
  position[task.pool] = np.arange(len(task.pool))

  def why(chosen: np.ndarray) -> list[str]:  # walks the choices again, only where reasons are wanted
    return reasons.closer(matching.path(features, target, rows[: len(chosen)]), "the set's mean gradient")(chosen)

  return _Order(position[rows], why)


def _by_similarity(task: _Task, name: str) -> _Order:
  inputs, values = task.inputs, task.inputs.similarities.get(name)
  if values is None:
    raise UserError(f"policy {task.policy} needs {name}, which were not given; compute them or choose another policy")
  how = inputs.aggregate or SIMILARITIES[name]
  topics = [""] * len(values) if inputs.similar_topics is None else inputs.similar_topics
  ids = ids_of(inputs.ids, task.pool)
  value = aggregate(values[:, task.pool], topics, how, ids, inputs.similar_tokens, inputs.similar_sources)
  order = proponents(value)
  return _copies_last(task, _Order(order, _similar(inputs, how, value, topics)))


def _similar(inputs: PolicyInputs, how: str, value: np.ndarray, topics: Sequence[str]) -> reasons.Reasons:
  """Why a policy by similarity takes an example: its turn, or its rank."""
  size, queries = len(topics), inputs.similar_ids
  names = list(range(1, size + 1) if queries is None else queries)
  if how in ("round_robin", "weighted_turns"):
    whose = whose_turns(how, size, len(value), inputs.similar_tokens, inputs.similar_sources)
    return reasons.in_turn(value, whose, names, "query")
  if how == "topic_quota":
    names = sorted(set(map(str, topics)))
    return reasons.in_turn(value, turn_order(np.ones(len(names)), len(value)), names, "evaluation topic")
  return reasons.ranked(proponents(value), "by similarity to the evaluation examples")


def _copies_last(task: _Task, order: _Order) -> _Order:
  if task.inputs.alike is None:
    return order
  first_of = np.asarray(task.inputs.alike)[task.pool]
  times = np.empty(len(first_of), np.int64)
  times[order.positions] = times_before(first_of[order.positions])
  return _Order(copies_last(order.positions, first_of), reasons.repeated(order.reasons, times))


def aims(inputs: PolicyInputs) -> bool:
  """Whether `auto` takes what is similar to the queries, else it draws at random."""
  return apart_enough(inputs.apart)


def apart_enough(apart: Apart | None) -> bool:
  """Whether queries are of another kind than the pool; not where nobody can tell."""
  return apart is not None and apart.distance >= LEAST_DISTANCE and apart.p <= MOST_P


def _matching_hybrid(task: _Task) -> _Order:
  inputs = task.inputs
  if inputs.kernel is None or inputs.towards is None:
    raise UserError(f"policy {task.policy} needs kernel and towards, which were not given")
  kernel = np.asarray(inputs.kernel)[np.ix_(task.pool, task.pool)]
  towards = np.asarray(inputs.towards)[task.pool]
  order = matching.herding(kernel, towards, task.budget.limit(task.tokens))
  what = "the set's mean gradient and hidden states"
  return _Order(order, lambda chosen: reasons.closer(matching.herding_path(kernel, towards, chosen), what)(chosen))


def _density(task: _Task) -> _Order:
  inputs = task.inputs
  if inputs.kernel is None or "hybrid" not in inputs.similarities:
    raise UserError(f"policy {task.policy} needs kernel and hybrid, which were not given")
  similarity = np.asarray(inputs.similarities["hybrid"])[:, task.pool]
  mass = density.transported(similarity, np.asarray(inputs.kernel)[np.ix_(task.pool, task.pool)])
  order = np.lexsort((-similarity.mean(axis=0), -mass))
  return _Order(order, reasons.ranked(order, "by what the evaluation examples send to it, shared with its like"))


def _distillation(task: _Task) -> _Order:
  inputs = task.inputs
  features = finite(inputs.features, "features", f"policy {task.policy}", inputs.ids)[task.pool]
  finite(inputs.target, "target", f"policy {task.policy}", None)
  gram = matching.products_of_pairs(features)
  towards = (features @ matching_target(inputs).astype(features.dtype)).astype(np.float64)
  order, strength = distillation.order(gram, towards, task.budget.limit(task.tokens))

  def weigh(kept: np.ndarray) -> np.ndarray:
    return distillation.weights(gram[np.ix_(kept, kept)], towards[kept], strength)

  return _Order(order, reasons.ranked(order, "by its weight in the step towards the evaluation set"), weigh)


def _auto(task: _Task) -> _Order:
  if aims(task.inputs):
    return _by_similarity(task, "hybrid")
  return _copies_last(task, _random(task))


def _random(task: _Task) -> _Order:
  return _Order(random_order(len(task.pool), task.seed), reasons.same("drawn at random"))


def _length_matched_random(task: _Task) -> _Order:
  chosen = task.budget.cut(proponents(task.values("scores")), task.tokens)
  drawn = length_matched(chosen, task.inputs.num_response_tokens[task.pool], task.seed)
  return _Order(drawn, reasons.same("drawn at random among responses of its length"))


def _topic_quota(task: _Task) -> _Order:
  order = proponents(task.values("scores"))
  return _Order(topic_quota(order, task.topics), reasons.ranked_in_topic(order, task.topics, "by influence"))


def _longest(task: _Task) -> np.ndarray:
  return longest(task.inputs.num_response_tokens[task.pool], task.tokens)


def _ranked(task: _Task, order_fn: Callable[[_Task], np.ndarray], by: str) -> _Order:
  order = order_fn(task)
  return _Order(order, reasons.ranked(order, by))


def _by(order_fn: Callable[[_Task], np.ndarray], by: str) -> Callable[[_Task], _Order]:
  return functools.partial(_ranked, order_fn=order_fn, by=by)


_POLICIES: dict[str, Callable[[_Task], _Order]] = {
  "auto": _auto,
  "proponents": _by(lambda task: proponents(task.values("scores")), "by influence"),
  "opponents": _by(lambda task: opponents(task.values("scores")), "by influence, lowest first"),
  "random": _random,
  "length_matched_random": _length_matched_random,
  "longest": _by(_longest, "by response tokens"),
  "highest_loss": _by(lambda task: proponents(task.values("loss")), "by loss"),
  **{name: functools.partial(_by_similarity, name=name) for name in SIMILARITIES},
  "topic_quota": _topic_quota,
  "matching": _matching,
  "matching_hybrid": _matching_hybrid,
  "matching_per_token": functools.partial(_matching, per_token=True),
  "matching_strata": functools.partial(_matching, in_strata=True),
  "distillation": _distillation,
  "density": _density,
  "loss_drop": _by(lambda task: proponents(task.values("drop")), "by the loss that the evaluation examples take off"),
}
# Rules that were not better than the one they changed, and are gone -> that one.
GONE = dict.fromkeys(("matching_topic", "matching_round_robin", "matching_quota"), "matching")
POLICIES = tuple(_POLICIES)
SHRUNK_POLICIES = ("matching",)  # whose one target may be drawn towards the pool's mean
PAIR_POLICIES = ("matching_hybrid", "density")  # which compare all pairs of examples
HYBRID_POLICIES = ("auto", "hybrid", *PAIR_POLICIES)  # which compare gradients and hidden states
WEIGHTED_POLICIES = ("distillation",)  # which say how much each example's loss counts in a training
FEATURE_POLICIES = ("matching", "matching_per_token", "matching_strata", *WEIGHTED_POLICIES)
GRADIENT_POLICIES = (
  *FEATURE_POLICIES,
  *HYBRID_POLICIES,
  "whitened_cosine",
  "layer_ranks",
)  # which need projected gradients
HIDDEN_POLICIES = (*HYBRID_POLICIES, "whitened_embedding", "embedding", "rds")  # which need last hidden states
SEEDED_POLICIES = ("random", "length_matched_random")
# What a select run must have measured first.
SCORE_POLICIES = ("proponents", "opponents", "length_matched_random", "topic_quota", "highest_loss")


def select_rows(policy: str, inputs: PolicyInputs, budget: Budget, seed: int = 0) -> np.ndarray:
  """The rows of `select_by`, int64 [S]."""
  return select_by(policy, inputs, budget, seed).rows


def select_by(policy: str, inputs: PolicyInputs, budget: Budget, seed: int = 0) -> Choice:
  """Chooses the coreset.

  Args:
    policy: one of `POLICIES`. auto: hybrid where the queries are of another kind than the pool (`aims`), else random
      with copies last. proponents, opponents: highest, lowest score first. random. length_matched_random: random
      with the response lengths of the proponents. longest: most response tokens. highest_loss. hybrid,
      whitened_cosine, whitened_embedding, embedding, rds, bm25: most similar to the queries by gradients and hidden
      states, by one of the two, by embeddings (rds: as RDS+ makes them), by the words of the texts;
      `PolicyInputs.aggregate` says over which queries. topic_quota: proponents, every training
      topic keeping the same fraction. matching: greedy gradient matching to `matching_target`.
      matching_hybrid: the same in the kernel of gradients and hidden states, to the queries' mean. matching_per_token:
      by the decrease of the distance for a response token. matching_strata: every stratum of response length keeps its
      share. distillation: the largest weights of a mean gradient that is close to it, which are kept. density: what
      queries send to their nearest, divided among those that are alike. loss_drop: the largest
      share of its loss taken off by a training on the queries. layer_ranks: whitened_cosine in every layer, ranks
      averaged.
    inputs: what to choose from.
    budget: how much.
    seed: of the random policies; the others do not look at it.

  Returns:
    The rows in order of choice, and why each was taken.

  Raises:
    UserError: unknown policy, missing or non-finite inputs, a budget that cannot be met.
  """
  if policy not in _POLICIES:
    raise UserError(f"policy={policy} is unknown; choose one of {', '.join(POLICIES)}")
  pool = inputs.pool()
  if pool.size == 0:
    raise UserError(
      f"none of the {how_many(len(inputs.ids), 'example')} has response tokens; check the data fields and max length"
    )
  task = _Task(inputs, pool, budget, seed, policy)
  budget.limit(task.tokens)  # a budget that cannot be met is told before the work
  order = _POLICIES[policy](task)
  kept = budget.cut(order.positions, task.tokens)
  weights = None if order.weigh is None else order.weigh(kept)
  return Choice(pool[kept].astype(np.int64), lambda: order.reasons(kept), weights)


def select_copies_last(
  policy: str, inputs: PolicyInputs, budget: Budget, first_of: np.ndarray, seed: int = 0
) -> np.ndarray:
  """As `select_rows`, but no example a second time while there is another text; `first_of` as for `copies_last`."""
  every = copies_last(select_rows(policy, inputs, Budget(fraction=1.0), seed), first_of)
  return every[budget.cut(np.arange(len(every)), inputs.num_tokens[every])]


# ------------------------------------------------------------------------------------------------ warnings
