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
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from in2core_jax import matching
from in2core_jax.aggregation import aggregate, finite, topic_means
from in2core_jax.errors import UserError
from in2core_jax.two_samples import Apart

_LENGTH_BINS = 20
TARGETS = ("both", "tokens", "examples")
# Policies by how similar each example is to each query: the inputs they choose from, and how these become one order
# (`aggregation`).
SIMILARITIES = {
  "hybrid": "round_robin",
  "whitened_cosine": "nearest",
  "whitened_embedding": "nearest",
  "embedding": "mean",
  "rds": "round_robin",
  "bm25": "mean",
}
# From where on `auto` aims at the queries: the squared distance of their mean from the pool's (`two_samples.apart`),
# 0.002 at most for evaluation sets of a pool's own kind and 0.025 at least for others (docs/selection.md), and its p.
LEAST_DISTANCE, MOST_P = 0.01, 0.01


@dataclass(frozen=True)
class Budget:
  """How much to select; exactly one of the three.

  Args:
    fraction: share of the examples that have response tokens, in (0, 1]; rounded half up, at least one example.
    num_examples: number of examples, at least 1.
    token_budget: most tokens (prompt and response) that the coreset may have, at least 1.

  Raises:
    UserError: none or several are given, or one is out of its range.
  """

  fraction: float | None = None
  num_examples: int | None = None
  token_budget: int | None = None

  def __post_init__(self):
    given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
    if len(given) != 1:
      seen = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
      raise UserError(f"budget: {seen} given; give exactly one of fraction, num_examples, token_budget")
    ((name, value),) = given.items()
    if name == "fraction":
      if not 0.0 < value <= 1.0:
        raise UserError(f"fraction={value} is outside (0, 1]; 0.5 selects half")
    elif value != int(value) or value < 1:
      raise UserError(f"{name}={value} is not a whole number of at least 1")

  def limit(self, num_tokens: np.ndarray) -> int:
    """Most examples that the budget can hold, out of a pool with these token counts.

    Raises:
      UserError: the pool has too few examples, or not even its shortest example fits.
    """
    size = len(num_tokens)
    if self.fraction is not None:
      return max(1, math.floor(self.fraction * size + 0.5))
    if self.num_examples is not None:
      if self.num_examples > size:
        raise UserError(
          f"num_examples={self.num_examples} is more than the {size} examples with response tokens; ask for fewer"
        )
      return int(self.num_examples)
    fitting = int(np.sum(np.cumsum(np.sort(num_tokens)) <= self.token_budget))
    if fitting == 0:
      raise UserError(
        f"token_budget={self.token_budget} is less than the shortest example's {num_tokens.min()} tokens; raise it"
      )
    return fitting

  def cut(self, order: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """The longest beginning of `order` (rows of the pool) that the budget holds."""
    if self.token_budget is None:
      return order[: self.limit(num_tokens)]
    kept = order[: int(np.sum(np.cumsum(num_tokens[order]) <= self.token_budget))]
    if kept.size == 0:
      raise UserError(
        f"token_budget={self.token_budget} is less than the {num_tokens[order[0]]} tokens of the first choice; raise it"
      )
    return kept


@dataclass(frozen=True, eq=False)
class PolicyInputs:
  """What the policies choose from; all but the token counts, topics and ids may be None where the policy needs none.

  Args:
    scores: f64 [N], influence of each example on the aggregated query; positive = proponent.
    loss: f64 [N], nats.
    num_tokens: int [N]. num_response_tokens: int [N].
    topics: N names. ids: N example ids.
    features: f32 or f64 [N, d], (projected, preconditioned) gradient of each example.
    target: [d] or [Q, d], the same features of the queries.
    query_topics: Q names, for the policies that work by evaluation topic.
    query_tokens: int [Q], response tokens of the queries; needed for a target by tokens.
    target_mean: the target is the mean over the queries' response tokens, as token-weighted perplexity counts (features
      are gradients of mean losses), over the queries, or half of each: a word of `TARGETS`.
    shrink: whether `matching` and `matching_quota` draw the target towards the pool's mean (`matching.shrunk_target`).
    token_weights: f64 [N], the pool's weights in a mean over tokens; `num_response_tokens` when None. They differ where
      another tokenizer's model took the gradients.
    target_weights: [G], weight of each evaluation topic in sorted order of the names, for `matching_topic`.
    similarities: name of a policy of `SIMILARITIES` -> [Q, N], how similar each example is to each query. hybrid and
      its parts whitened_cosine, whitened_embedding: see `hybrid`. embedding: cosine of embeddings; rds: of embeddings
      that weigh tokens by position. bm25: of each query with the example's text.
    kernel: [N, N], hybrid similarity of every pair of examples, for `matching_hybrid`.
    towards: [N], mean hybrid similarity of each example with the queries, for the same.
    apart: how far the queries are from the pool as a whole, which decides for `auto`; None: not known.
    similar_topics: topics of the queries of `similarities`, for an aggregate by topic.
    aggregate: how the similarity of a policy of `SIMILARITIES` with single queries becomes one order, a word of
      `aggregation.AGGREGATES`; None: the policy's own.
    alike: int [N], the same number for copies and near copies: a policy of `SIMILARITIES` takes none a second time
      before every other example is in.
    content_keys: N names, equal for copies (`Record.content_key`); no policy looks at them, `selection_warnings` does.

  Raises:
    UserError: lengths or shapes differ, or there are no examples.
  """

  scores: np.ndarray | None
  loss: np.ndarray | None
  num_tokens: np.ndarray
  num_response_tokens: np.ndarray
  topics: Sequence[str]
  ids: Sequence[str]
  features: np.ndarray | None = None
  target: np.ndarray | None = None
  query_topics: Sequence[str] | None = None
  target_weights: np.ndarray | None = None
  similarities: Mapping[str, np.ndarray] = field(default_factory=dict)
  kernel: np.ndarray | None = None
  towards: np.ndarray | None = None
  apart: Apart | None = None
  similar_topics: Sequence[str] | None = None
  aggregate: str | None = None
  alike: np.ndarray | None = None
  query_tokens: np.ndarray | None = None
  target_mean: str = "examples"
  shrink: bool = False
  token_weights: np.ndarray | None = None
  content_keys: Sequence[str] | None = None

  def __post_init__(self):
    types = {"scores": np.float64, "loss": np.float64, "num_tokens": np.int64, "num_response_tokens": np.int64}
    for name, dtype in types.items():
      if getattr(self, name) is not None:
        object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
    size = len(self.ids)
    if size == 0:
      raise UserError("there are no examples to select from; check the training data")
    lengths = ("scores", "loss", "num_tokens", "num_response_tokens", "topics", "features", "content_keys", "alike")
    for name in lengths:
      value = getattr(self, name)
      if value is not None and len(value) != size:
        raise UserError(f"{name} has {len(value)} entries for {size} example ids; they must be as many")
    for name, values in self.similarities.items():
      if np.ndim(values) != 2 or np.shape(values)[1] != size:
        raise UserError(f"{name} has the shape {np.shape(values)} for {size} example ids; need [queries, examples]")
    if self.scores is not None and self.scores.ndim != 1:
      raise UserError(f"scores have shape {self.scores.shape}; policies take [N], so call aggregate first")
    if self.features is not None:
      dtype = np.float64 if np.asarray(self.features).dtype == np.float64 else np.float32
      object.__setattr__(self, "features", np.asarray(self.features, dtype))
    if self.target is not None:
      self._check_target()

  def _check_target(self):
    target = np.atleast_2d(np.asarray(self.target, np.float64))
    if self.features is None or self.features.ndim != 2 or target.shape[1] != self.features.shape[1]:
      shape = None if self.features is None else self.features.shape
      raise UserError(f"target has shape {np.shape(self.target)} but features have {shape}; both need the same width")
    object.__setattr__(self, "target", target)

  @functools.cached_property
  def aim(self) -> matching.Shrunk:
    """`matching_target` and what is known of it, the mean over its means; it reads all features, so once."""
    target, kept, beyond_chance = zip(*(_target(self, by_token) for by_token in _means(self)), strict=True)
    return matching.Shrunk(np.mean(target, axis=0), float(np.mean(kept)), float(np.mean(beyond_chance)))

  def pool(self) -> np.ndarray:
    """Rows with response tokens, in order of their ids (equal ids: in order of the rows)."""
    by_id = np.argsort(np.asarray(self.ids, dtype=np.str_), kind="stable")
    return by_id[self.num_response_tokens[by_id] > 0]


def inputs_of(dataset, scores: np.ndarray | None = None, loss: np.ndarray | None = None, **more) -> PolicyInputs:
  """What the policies choose from, of a data set.

  Args:
    dataset: N examples: its token counts, topics, ids and records.
    scores: f64 [N], or None for policies that need none.
    loss: f64 [N], or None.
    more: other fields of `PolicyInputs`.
  """
  sizes = dataset.num_tokens, dataset.num_response_tokens
  keys = [record.content_key for record in dataset.records]
  return PolicyInputs(scores, loss, *sizes, dataset.topics, dataset.ids, content_keys=keys, **more)


def taking_no_part(inputs: PolicyInputs, truncated: np.ndarray | None = None) -> str:
  """Why fewer are chosen than a fraction of all, in brackets: examples without a response are not counted.

  Args:
    inputs: what is chosen from.
    truncated: bool [N], which examples were cut at the maximal length; such a cut may have taken the response.
  """
  empty = inputs.num_response_tokens == 0
  if not empty.any():
    return ""
  cut = 0 if truncated is None else int(np.count_nonzero(empty & np.asarray(truncated, bool)))
  why = f", {cut:,} of them because --max_length cut it off," if cut else ""
  left = len(inputs.ids) - int(empty.sum())
  return f" ({int(empty.sum()):,} have no response{why} and take no part; a fraction is one of the other {left:,})"


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
  rng = np.random.default_rng(seed)
  edges = np.unique(np.quantile(num_response_tokens, np.linspace(0, 1, _LENGTH_BINS + 1)[1:-1]))
  bins = np.searchsorted(edges, num_response_tokens, side="left")
  wanted = np.bincount(bins[chosen], minlength=len(edges) + 1)
  drawn = [rng.permutation(np.flatnonzero(bins == b))[:n] for b, n in enumerate(wanted)]
  return rng.permutation(np.concatenate(drawn))


def topic_quota(order: np.ndarray, topics: Sequence[str]) -> np.ndarray:
  """Reorders so that every beginning of the order holds (to within rounding) the same fraction of every topic.

  The k-th best of a topic of n examples comes at (k + 1/2) / n, as in Sainte-Lague's rule; equal places keep `order`.
  """
  codes = np.unique(np.asarray(topics, dtype=np.str_), return_inverse=True)[1]
  order = np.asarray(order)
  ordered = codes[order]
  place = (2 * _times_before(ordered) + 1) / np.bincount(codes)[ordered]
  return order[np.argsort(place, kind="stable")]


def copies_last(order: np.ndarray, first_of: np.ndarray) -> np.ndarray:
  """Reorders so that no example comes a second time before every other has come once; equal places keep `order`.

  Args:
    order: int [N], rows, best first.
    first_of: int [rows], the same number for copies.
  """
  return order[np.argsort(_times_before(first_of[order]), kind="stable")]


def _times_before(names: np.ndarray) -> np.ndarray:
  """How often each entry has come before, int [N]."""
  _, codes, counts = np.unique(names, return_inverse=True, return_counts=True)
  found = np.empty(len(names), np.int64)
  found[np.argsort(codes, kind="stable")] = np.arange(len(names)) - np.repeat(np.cumsum(counts) - counts, counts)
  return found


# --------------------------------------------------------------------------------------------- the one entry


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
    ids = [self.inputs.ids[row] for row in self.pool]
    return finite(None if part is None else part[self.pool], name, f"policy {self.policy}", ids)

  @property
  def tokens(self) -> np.ndarray:
    """Tokens of each example of the pool, int [P]."""
    return self.inputs.num_tokens[self.pool]

  @property
  def topics(self) -> np.ndarray:
    """Topic of each example of the pool, str [P]."""
    return np.asarray(self.inputs.topics, dtype=np.str_)[self.pool]


def matching_target(inputs: PolicyInputs) -> np.ndarray:
  """What `matching` brings the mean feature of the selected set close to, f64 [d].

  Args:
    inputs: with features and target.

  Raises:
    UserError: an unknown target_mean, or no token count for each query.
  """
  return inputs.aim.target


def _means(inputs: PolicyInputs) -> list[bool]:
  """Over what the target is a mean: over tokens (True), over queries (False)."""
  if inputs.target_mean not in TARGETS:
    raise UserError(f"target_mean={inputs.target_mean} is unknown; choose one of {', '.join(TARGETS)}")
  return {"both": [True, False], "tokens": [True], "examples": [False]}[inputs.target_mean]


def _query_weights(inputs: PolicyInputs, by_token: bool) -> np.ndarray:
  """Weight of each query in the mean, f64 [Q]."""
  size = len(inputs.target)
  if not by_token:
    return np.ones(size)
  weights = np.asarray(0 if inputs.query_tokens is None else inputs.query_tokens)
  if weights.shape != (size,) or weights.min() < 0 or not weights.any():
    raise UserError(f"query_tokens have shape {weights.shape} for {size} queries; need their response tokens")
  return weights.astype(np.float64)


def _target(inputs: PolicyInputs, by_token: bool) -> matching.Shrunk:
  """One mean of the queries, perhaps drawn towards the same mean of the pool."""
  weights = _query_weights(inputs, by_token)
  if not inputs.shrink:
    return matching.Shrunk(weights @ inputs.target / weights.sum(), 1.0, 1.0)
  tokens = inputs.num_response_tokens if inputs.token_weights is None else inputs.token_weights
  answered = tokens if by_token else np.asarray(tokens) > 0
  return matching.shrunk_target(inputs.target, inputs.features, weights, answered)


def _matching(task: _Task, by_topic: bool = False, merge: bool = True, quota: bool = False) -> np.ndarray:
  """Pool positions chosen by `greedy_matching` towards the mean, the weighted topics or each topic in turn."""
  inputs = task.inputs
  features = finite(inputs.features, "features", f"policy {task.policy}", inputs.ids)
  target = finite(inputs.target, "target", f"policy {task.policy}", None)
  if by_topic:
    if inputs.query_topics is None or len(inputs.query_topics) != len(target):
      seen = "none" if inputs.query_topics is None else len(inputs.query_topics)
      raise UserError(f"policy {task.policy} needs query_topics, one for each row of target: {seen} for {len(target)}")
    target = np.mean(
      [topic_means(target, inputs.query_topics, _query_weights(inputs, by_token)) for by_token in _means(inputs)],
      axis=0,
    )
  if merge:
    target = matching.merged_target(target, inputs.target_weights) if by_topic else matching_target(inputs)
  count, topics = task.budget.limit(task.tokens), inputs.topics if quota else None
  rows = matching.greedy_matching(features, target, count, topics, task.pool)
  position = np.empty(len(features), np.int64)
  position[task.pool] = np.arange(len(task.pool))
  return position[rows]


def _by_similarity(task: _Task, name: str) -> np.ndarray:
  inputs, values = task.inputs, task.inputs.similarities.get(name)
  if values is None:
    raise UserError(f"policy {task.policy} needs {name}, which were not given; compute them or choose another policy")
  how = inputs.aggregate or SIMILARITIES[name]
  topics = [""] * len(values) if inputs.similar_topics is None else inputs.similar_topics
  order = proponents(aggregate(values[:, task.pool], topics, how, [inputs.ids[row] for row in task.pool]))
  return _copies_last(task, order)


def _copies_last(task: _Task, order: np.ndarray) -> np.ndarray:
  alike = task.inputs.alike
  return order if alike is None else copies_last(order, np.asarray(alike)[task.pool])


def aims(inputs: PolicyInputs) -> bool:
  """Whether `auto` takes what is similar to the queries, else it draws at random."""
  return apart_enough(inputs.apart)


def apart_enough(apart: Apart | None) -> bool:
  """Whether queries are of another kind than the pool; not where nobody can tell."""
  return apart is not None and apart.distance >= LEAST_DISTANCE and apart.p <= MOST_P


def _matching_hybrid(task: _Task) -> np.ndarray:
  inputs = task.inputs
  if inputs.kernel is None or inputs.towards is None:
    raise UserError(f"policy {task.policy} needs kernel and towards, which were not given")
  kernel = np.asarray(inputs.kernel)[np.ix_(task.pool, task.pool)]
  return matching.herding(kernel, np.asarray(inputs.towards)[task.pool], task.budget.limit(task.tokens))


def _auto(task: _Task) -> np.ndarray:
  if aims(task.inputs):
    return _by_similarity(task, "hybrid")
  return _copies_last(task, random_order(len(task.pool), task.seed))


def _length_matched_random(task: _Task) -> np.ndarray:
  chosen = task.budget.cut(proponents(task.values("scores")), task.tokens)
  return length_matched(chosen, task.inputs.num_response_tokens[task.pool], task.seed)


_POLICIES: dict[str, Callable[[_Task], np.ndarray]] = {
  "auto": _auto,
  "proponents": lambda task: proponents(task.values("scores")),
  "opponents": lambda task: opponents(task.values("scores")),
  "random": lambda task: random_order(len(task.pool), task.seed),
  "length_matched_random": _length_matched_random,
  "longest": lambda task: longest(task.inputs.num_response_tokens[task.pool], task.tokens),
  "highest_loss": lambda task: proponents(task.values("loss")),
  **{name: functools.partial(_by_similarity, name=name) for name in SIMILARITIES},
  "topic_quota": lambda task: topic_quota(proponents(task.values("scores")), task.topics),
  "matching": _matching,
  "matching_hybrid": _matching_hybrid,
  "matching_topic": lambda task: _matching(task, by_topic=True),
  "matching_round_robin": lambda task: _matching(task, by_topic=True, merge=False),
  "matching_quota": lambda task: _matching(task, quota=True),
}
POLICIES = tuple(_POLICIES)
SHRUNK_POLICIES = ("matching", "matching_quota")  # whose one target may be drawn towards the pool's mean
HYBRID_POLICIES = ("auto", "hybrid", "matching_hybrid")  # which compare gradients and hidden states
FEATURE_POLICIES = ("matching", "matching_topic", "matching_round_robin", "matching_quota")
GRADIENT_POLICIES = (*FEATURE_POLICIES, *HYBRID_POLICIES, "whitened_cosine")  # which need projected gradients
HIDDEN_POLICIES = (*HYBRID_POLICIES, "whitened_embedding", "embedding", "rds")  # which need last hidden states
SEEDED_POLICIES = ("random", "length_matched_random")
# What a select run must have measured first.
SCORE_POLICIES = ("proponents", "opponents", "length_matched_random", "topic_quota", "highest_loss")


def select_rows(policy: str, inputs: PolicyInputs, budget: Budget, seed: int = 0) -> np.ndarray:
  """Chooses the coreset.

  Args:
    policy: one of `POLICIES`. auto: hybrid where the queries are of another kind than the pool (`aims`), else random
      with copies last. proponents, opponents: highest, lowest score first. random. length_matched_random: random
      with the response lengths of the proponents. longest: most response tokens. highest_loss. hybrid,
      whitened_cosine, whitened_embedding, embedding, rds, bm25: most similar to the queries by gradients and hidden
      states, by one of the two, by embeddings (rds: as RDS+ makes them), by the words of the texts;
      `PolicyInputs.aggregate` says over which queries. topic_quota: proponents, every training
      topic keeping the same fraction. matching: greedy gradient matching to `matching_target`.
      matching_hybrid: the same in the kernel of gradients and hidden states, to the queries' mean.
      matching_topic: to the evaluation topics, weighted (`matching.merged_target`). matching_round_robin: evaluation
      topics in turn, each matched by a set of its own. matching_quota: matching, every training topic keeping the same
      fraction.
    inputs: what to choose from.
    budget: how much.
    seed: of the random policies; the others do not look at it.

  Returns:
    int64 [S], row numbers of `inputs` in order of choice, each once.

  Raises:
    UserError: unknown policy, missing or non-finite inputs, a budget that cannot be met.
  """
  if policy not in _POLICIES:
    raise UserError(f"policy={policy} is unknown; choose one of {', '.join(POLICIES)}")
  pool = inputs.pool()
  if pool.size == 0:
    raise UserError(f"none of the {len(inputs.ids)} examples has response tokens; check the data fields and max length")
  task = _Task(inputs, pool, budget, seed, policy)
  budget.limit(task.tokens)  # a budget that cannot be met is told before the work
  return pool[budget.cut(_POLICIES[policy](task), task.tokens)].astype(np.int64)


def select_copies_last(
  policy: str, inputs: PolicyInputs, budget: Budget, first_of: np.ndarray, seed: int = 0
) -> np.ndarray:
  """As `select_rows`, but no example a second time while there is another text; `first_of` as for `copies_last`."""
  every = copies_last(select_rows(policy, inputs, Budget(fraction=1.0), seed), first_of)
  return every[budget.cut(np.arange(len(every)), inputs.num_tokens[every])]


# ------------------------------------------------------------------------------------------------ warnings


def selection_warnings(
  rows: np.ndarray, inputs: PolicyInputs, seed: int = 0, copies: bool = True, topics: bool = True
) -> list[str]:
  """What looks risky about a selection, from the selection alone: one sentence each, with numbers and a remedy.

  Looks at topics of more than 2 % of the pool that keep less than 20 % of their share, response tokens below 80 % of
  the share of examples, the distance of the mean feature to the target beyond all of 20 random draws, and copies.

  Args:
    rows: int [S], the selection. inputs: what it was chosen from; copies are found by its content_keys, where given.
    seed: of the random draws. copies: False where the reader has been told of the copies in the training set already.
    topics: False where topics and lengths of the queries are what was asked for.
  """
  rows, pool = np.asarray(rows), inputs.pool()
  found = _dropped_topics(rows, inputs, pool) if topics else []
  share = rows.size / pool.size
  tokens, total = (int(inputs.num_response_tokens[r].sum()) for r in (rows, pool))
  if topics and tokens < 0.8 * share * total:
    found.append(
      f"The selection has {tokens:,} response tokens, {tokens / (share * total):.0%} of what {rows.size:,} average "
      f"examples would have ({share * total:,.0f}): it prefers short responses. "
      f"Use the policy matching, or a token budget."
    )
  if inputs.features is not None and inputs.target is not None and rows.size < pool.size:
    found += _poor_coverage(rows, inputs, pool, seed)
  if copies and inputs.content_keys is not None:
    repeats = rows.size - len({inputs.content_keys[r] for r in rows})
    if repeats:
      found.append(
        f"{repeats:,} of the {rows.size:,} selected examples repeat another selected one, message for message: give "
        "--drop_copies, to finetune, select and evaluate alike."
      )
  return found


def _dropped_topics(rows: np.ndarray, inputs: PolicyInputs, pool: np.ndarray) -> list[str]:
  topics = np.asarray(inputs.topics, dtype=np.str_)
  found = []
  for topic, size in zip(*np.unique(topics[pool], return_counts=True), strict=True):
    if size <= 0.02 * pool.size:
      continue
    kept, share = int(np.sum(topics[rows] == topic)), size * rows.size / pool.size
    if share >= 1 and kept < 0.2 * share:
      found.append(
        f"Topic '{topic}' is almost dropped: {kept} of its {size} examples with a response are selected where an even "
        "share would be "
        f"{share:.0f}. Use the policy topic_quota, matching or matching_quota."
      )
  return found


def _poor_coverage(rows: np.ndarray, inputs: PolicyInputs, pool: np.ndarray, seed: int, draws: int = 20) -> list[str]:
  rng = np.random.default_rng(seed)
  weights = np.zeros((1 + draws, len(inputs.ids)))
  weights[0, rows] = 1 / rows.size
  for draw in weights[1:]:
    draw[rng.permutation(pool)[: rows.size]] = 1 / rows.size
  means = np.zeros((1 + draws, inputs.features.shape[1]))
  for start in range(0, len(inputs.ids), 1024):
    means += weights[:, start : start + 1024] @ inputs.features[start : start + 1024].astype(np.float64)
  target = matching_target(inputs)
  distance = np.linalg.norm(means - target, axis=1) / max(np.linalg.norm(target), np.finfo(np.float64).tiny)
  if distance[0] <= distance[1:].max():
    return []
  return [
    f"The mean gradient of the selection is {distance[0]:.3g} target lengths away from the evaluation set's (as far as "
    f"that is known), further than all {draws} random selections of the same size ({distance[1:].min():.3g} to "
    f"{distance[1:].max():.3g}). Use the policy matching or random."
  ]
