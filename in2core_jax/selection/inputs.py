"""What a policy chooses by: the budget, the scores, and other facts of the examples; NumPy only."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from in2core_jax.errors import UserError, how_many
from in2core_jax.selection import aggregation, matching
from in2core_jax.selection.two_samples import Apart

TARGETS = ("both", "tokens", "examples")


# Policies by how similar each example is to each query: the inputs they choose from, and how these become one order
# (`aggregation`).
SIMILARITIES = {
  "hybrid": "round_robin",
  "whitened_cosine": "nearest",
  "layer_ranks": "nearest",
  "whitened_embedding": "nearest",
  "embedding": "mean",
  "rds": "round_robin",
  "bm25": "mean",
}


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

  @classmethod
  def read(cls, given: str | float) -> "Budget":
    """The budget of a word: 0.5 or 1.0 is a share, 500 a number of examples, 40000tok a number of tokens.

    Raises:
      UserError: it is none of these.
    """
    word = str(given).strip()
    tokens = re.fullmatch(r"(\d{1,16}) ?tok(?:ens)?", word)
    try:
      if tokens:
        return cls(token_budget=int(tokens[1]))
      return cls(num_examples=int(word)) if re.fullmatch(r"\d{1,10}", word) else cls(fraction=float(word))
    except ValueError:  # UserError is one
      raise UserError(
        f"budget={word} is not a budget: give a share above 0.0 and up to 1.0 such as 0.5, a number of examples such "
        "as 500, or a number of tokens such as 40000tok"
      ) from None

  def __str__(self) -> str:
    """The word that `read` takes; the same for the same budget."""
    if self.fraction is not None:
      return repr(float(self.fraction))
    return str(int(self.num_examples)) if self.num_examples is not None else f"{int(self.token_budget)}tok"

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
          f"budget={self} is more than the {how_many(size, 'example')} with response tokens; ask for fewer"
        )
      return int(self.num_examples)
    fitting = int(np.sum(np.cumsum(np.sort(num_tokens)) <= self.token_budget))
    if fitting == 0:
      raise UserError(
        f"budget={self} is less than the shortest example's {how_many(num_tokens.min(), 'token')}; raise it"
      )
    return fitting

  def cut(self, order: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """The longest beginning of `order` (rows of the pool) that the budget holds."""
    if self.token_budget is None:
      return order[: self.limit(num_tokens)]
    kept = order[: int(np.sum(np.cumsum(num_tokens[order]) <= self.token_budget))]
    if kept.size == 0:
      raise UserError(
        f"budget={self} is less than the {how_many(num_tokens[order[0]], 'token')} of the first choice; raise it"
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
    query_tokens: int [Q], response tokens of the queries; needed for a target by tokens.
    target_mean: the target is the mean over the queries' response tokens, as token-weighted perplexity counts (features
      are gradients of mean losses), over the queries, or half of each: a word of `TARGETS`.
    shrink: whether `matching` draws the target towards the pool's mean (`matching.shrunk_target`).
    token_weights: f64 [N], the pool's weights in a mean over tokens; `num_response_tokens` when None. They differ where
      another tokenizer's model took the gradients.
    similarities: name of a policy of `SIMILARITIES` -> [Q, N], how similar each example is to each query. hybrid and
      its parts whitened_cosine, whitened_embedding: see `hybrid`. embedding: cosine of embeddings; rds: of embeddings
      that weigh tokens by position. layer_ranks: `aggregation.mean_ranks` of whitened_cosine in single layers. bm25:
      of each query with the example's text.
    kernel: [N, N], hybrid similarity of every pair of examples, for `matching_hybrid`.
    towards: [N], mean hybrid similarity of each example with the queries, for the same.
    apart: how far the queries are from the pool as a whole, which decides for `auto`; None: not known.
    similar_topics: topics of the queries of `similarities`, for an aggregate by topic.
    similar_ids: ids of the queries of `similarities`, for the reasons of a choice.
    similar_tokens: int [Q], their response tokens, for weighted turns.
    similar_sources: of the queries of `similarities`, where sources have weights.
    target_sources: of the queries of `target`, likewise.
    aggregate: how the similarity of a policy of `SIMILARITIES` with single queries becomes one order, a word of
      `aggregation.AGGREGATES`; None: the policy's own.
    alike: int [N], the same number for copies and near copies: a policy of `SIMILARITIES` takes none a second time
      before every other example is in.
    drop: f64 [N], share of an example's loss that a training on the queries takes off, for `loss_drop`.
    content_keys: N names or numbers, equal for copies; no policy looks at them, `selection_warnings` does.

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
  similarities: Mapping[str, np.ndarray] = field(default_factory=dict)
  kernel: np.ndarray | None = None
  towards: np.ndarray | None = None
  apart: Apart | None = None
  similar_topics: Sequence[str] | None = None
  similar_ids: Sequence[str] | None = None
  similar_tokens: np.ndarray | None = None
  similar_sources: aggregation.Sources | None = None
  target_sources: aggregation.Sources | None = None
  aggregate: str | None = None
  alike: np.ndarray | None = None
  query_tokens: np.ndarray | None = None
  target_mean: str = "examples"
  shrink: bool = False
  token_weights: np.ndarray | None = None
  drop: np.ndarray | None = None
  content_keys: Sequence[str] | np.ndarray | None = None

  def __post_init__(self):
    types = {"scores": np.float64, "loss": np.float64, "num_tokens": np.int64, "num_response_tokens": np.int64}
    for name, dtype in types.items():
      if getattr(self, name) is not None:
        object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
    size = len(self.ids)
    if size == 0:
      raise UserError("there are no examples to select from; check the training data")
    lengths = (
      "scores",
      "loss",
      "num_tokens",
      "num_response_tokens",
      "topics",
      "features",
      "content_keys",
      "alike",
      "drop",
    )
    for name in lengths:
      value = getattr(self, name)
      if value is not None and len(value) != size:
        raise UserError(
          f"{name} has {how_many(len(value), 'entr[y|ies]')} for {how_many(size, 'example id')}; they must be as many"
        )
    for name, values in self.similarities.items():
      if np.ndim(values) != 2 or np.shape(values)[1] != size:
        raise UserError(
          f"{name} has the shape {np.shape(values)} for {how_many(size, 'example id')}; need [queries, examples]"
        )
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
    target, kept, beyond_chance = zip(*(_target(self, by_token) for by_token in means(self)), strict=True)
    return matching.Shrunk(np.mean(target, axis=0), float(np.mean(kept)), float(np.mean(beyond_chance)))

  @property
  def asked(self) -> int:
    """How many queries a policy by similarity compares examples with."""
    return len(next(iter(self.similarities.values())) if self.similar_ids is None else self.similar_ids)

  def pool(self) -> np.ndarray:
    """Rows with response tokens, in order of their ids (equal ids: in order of the rows)."""
    by_id = aggregation.id_order(self.ids)
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
  return PolicyInputs(scores, loss, *sizes, dataset.topics, dataset.ids, content_keys=dataset.copies, **more)


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


def matching_target(inputs: PolicyInputs) -> np.ndarray:
  """What `matching` brings the mean feature of the selected set close to, f64 [d].

  Args:
    inputs: with features and target.

  Raises:
    UserError: an unknown target_mean, or no token count for each query.
  """
  return inputs.aim.target


def means(inputs: PolicyInputs) -> list[bool]:
  """Over what the target is a mean: over tokens (True), over queries (False)."""
  if inputs.target_mean not in TARGETS:
    raise UserError(f"target_mean={inputs.target_mean} is unknown; choose one of {', '.join(TARGETS)}")
  return {"both": [True, False], "tokens": [True], "examples": [False]}[inputs.target_mean]


def query_weights(inputs: PolicyInputs, by_token: bool) -> np.ndarray:
  """Weight of each query in the mean, f64 [Q]."""
  weights = _plain_weights(inputs, by_token)
  return weights if inputs.target_sources is None else inputs.target_sources.spread(weights)


def _plain_weights(inputs: PolicyInputs, by_token: bool) -> np.ndarray:
  size = len(inputs.target)
  if not by_token:
    return np.ones(size)
  weights = np.asarray(0 if inputs.query_tokens is None else inputs.query_tokens)
  if weights.shape != (size,) or weights.min() < 0 or not weights.any():
    raise UserError(
      f"query_tokens have shape {weights.shape} for {how_many(size, 'quer[y|ies]')}; need their response tokens"
    )
  return weights.astype(np.float64)


def _target(inputs: PolicyInputs, by_token: bool) -> matching.Shrunk:
  """One mean of the queries, perhaps drawn towards the same mean of the pool."""
  weights = query_weights(inputs, by_token)
  if not inputs.shrink:
    return matching.Shrunk(weights @ inputs.target / weights.sum(), 1.0, 1.0)
  tokens = inputs.num_response_tokens if inputs.token_weights is None else inputs.token_weights
  answered = tokens if by_token else np.asarray(tokens) > 0
  return matching.shrunk_target(inputs.target, inputs.features, weights, answered)
